"""What evaluation asks of a model, and how a checkpoint answers it. Torch is imported only when a prompt is completed."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qwen_moe.errors import UserError


class Completer(Protocol):
    """A model with its tokenizer. ``identity`` names both: answers of one are never mixed with those of another."""

    @property
    def identity(self) -> dict[str, str]: ...

    @property
    def reach(self) -> int | None:
        """The most tokens of prompt and completion together; None if there is no limit."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def complete(self, prompts: list[list[int]], max_new_tokens: int, done: Callable[[int, list[int]], None]) -> None:
        """Continue every prompt greedily and call ``done(index, new tokens without the end token)`` once for each, in any
        order, as soon as it is complete."""


@dataclass(frozen=True, kw_only=True)
class CompleterOptions:
    """How the model computes. ``dtype`` None: the stored dtype, or the run's compute dtype."""

    dtype: str | None = None
    context_extension: str = "auto"
    attention: str = "dense"


def open_completer(checkpoint: Path, options: CompleterOptions) -> Completer:
    """A completer of a checkpoint, run or Hugging Face directory. Reads the tokenizer and the config; the weights are read
    with the first prompt. Raises UserError."""
    if options.context_extension not in ("none", "auto") or options.attention != "dense":
        raise UserError(
            f"--context-extension {options.context_extension} --attention {options.attention} is not supported: the model "
            "is read with dense attention and the RoPE scaling of its own config"
        )
    return _GeneratingCompleter(checkpoint, options)


class _GeneratingCompleter:
    """Completes with `qwen_moe.generate`, one prompt at a time."""

    def __init__(self, checkpoint: Path, options: CompleterOptions) -> None:
        from qwen_moe.checkpoint.huggingface.config import model_config_from_hf
        from qwen_moe.checkpoint.huggingface.directory import CONFIG, read_json
        from qwen_moe.checkpoint.resolve import is_ours, model_config, resolve_checkpoint
        from qwen_moe.generate import _read_tokenizer, end_tokens, tokenizer_folder

        if not checkpoint.is_dir():
            raise UserError(
                f"{checkpoint} does not exist: give a checkpoint, a run directory or a Hugging Face directory"
            )
        self.ours = is_ours(checkpoint)
        self.directory = resolve_checkpoint(checkpoint) if self.ours else checkpoint
        if self.ours:
            self.config = model_config(self.directory)
        else:
            path = self.directory / CONFIG
            self.config = model_config_from_hf(read_json(path), str(path))
        self.dtype = options.dtype
        folder = tokenizer_folder(self.directory)
        self.tokenizer = _read_tokenizer(folder)
        self.ends = end_tokens(folder, self.tokenizer)
        self.identity = {
            "model": fingerprint(self.directory),
            "tokenizer": tokenizer_fingerprint(folder),
        }

    @property
    def reach(self) -> int:
        return self.config.reach

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @cached_property
    def model(self) -> Any:
        import torch

        from qwen_moe.checkpoint.huggingface.convert import from_pretrained, load_checkpoint

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return (load_checkpoint if self.ours else from_pretrained)(self.directory, dtype=self.dtype, device=device)

    def complete(self, prompts: list[list[int]], max_new_tokens: int, done: Callable[[int, list[int]], None]) -> None:
        import torch

        from qwen_moe.generate import Sampling, generate

        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0)
        device = self.model.head_weight.device
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], dtype=torch.int64, device=device)
            out = generate(self.model, ids, sampling, eos_token_id=self.ends or None)
            new = out[0, len(prompt) :].tolist()
            done(index, new[:-1] if new and new[-1] in self.ends else new)


_BLOCK, _BLOCKS = 4096, 64


def fingerprint(directory: Path) -> str:
    """A hash that tells the files of one model from those of another: names, sizes, and 64 blocks of each file.

    It does not read whole weights, so that a large model starts at once.
    """
    found = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        size = path.stat().st_size
        found.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for place in sorted({max(size - _BLOCK, 0) * block // (_BLOCKS - 1) for block in range(_BLOCKS)}):
                file.seek(place)
                found.update(file.read(_BLOCK))
    return found.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """A hash of the files that decide how text becomes tokens."""
    found = hashlib.sha256()
    names = (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "tokenizer_config.json",
    )
    for name in names:
        if (folder / name).is_file():
            found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()
