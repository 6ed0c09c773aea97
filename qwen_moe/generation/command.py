"""Samples text from a model with a key/value cache; the verb `qwen-moe generate`. Torch is imported only when it is used."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_moe.config.fields import LARGEST, LARGEST_SIZE
from qwen_moe.documents import json_object, read_text
from qwen_moe.errors import UserError
from qwen_moe.options import number, whole

if TYPE_CHECKING:
    import torch

    from qwen_moe.config import ModelConfig
    from qwen_moe.models.decoder import DecoderLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to continue a text: ``temperature`` 0 is greedy, ``top_p`` is the nucleus. Raises UserError if out of range."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give a positive number")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        if not 0 <= self.seed <= LARGEST:
            raise UserError(f"seed is {self.seed:.10g}: give a whole number from 0 to 2^63 - 1")


def _check_prompt(length: int, smallest: int, largest: int, max_new_tokens: int, config: "ModelConfig") -> None:
    if length == 0:
        raise UserError("the prompt is empty: give at least one token")
    if smallest < 0 or largest >= config.vocab_size:
        wrong = largest if largest >= config.vocab_size else smallest
        raise UserError(
            f"the prompt has token {wrong} but the model's vocabulary has {config.vocab_size}: the tokenizer belongs "
            "to another model"
        )
    if length + max_new_tokens > config.reach:
        raise UserError(
            f"a prompt of {length} tokens and {max_new_tokens} new ones make {length + max_new_tokens}, more than the "
            f"model's reach of {config.reach} tokens: shorten the prompt, or ask for at most "
            f"{max(config.reach - length, 0)} new tokens"
        )


def sample(logits: "torch.Tensor", temperature: float, top_p: float, generator: "torch.Generator") -> "torch.Tensor":
    """Pick one token per row of ``logits [B, V]``; returns ``[B]``.

    Takes the argmax at temperature 0. Otherwise draws from the nucleus (arXiv 1904.09751), which is the smallest set of
    tokens whose probabilities sum to at least ``top_p``. Draws on the CPU, so that a seed gives the same tokens on every
    device.
    """
    import torch

    if temperature == 0:
        return logits.argmax(-1)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Subtract the largest logit first. Dividing by a temperature near 0 can then overflow only to -inf, a probability of 0.
    logits = logits.to(wide)
    probabilities = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).softmax(-1).to(wide).cpu()
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        # Keep a token if the tokens before it have not yet reached top_p; always keep the first.
        beyond = ordered.cumsum(-1) - ordered >= top_p
        beyond[..., 0] = False
        ordered = ordered.masked_fill(beyond, 0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1).to(logits.device)


def generate(
    model: "DecoderLM",
    input_ids: "torch.Tensor",
    sampling: Sampling,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    progress: bool = False,
) -> "torch.Tensor":
    """Continue ``input_ids [B, S]`` (no padding) and return prompt and new tokens ``[B, S + N]``, N <= max_new_tokens.

    ``eos_token_id``: one or several ids that end a sequence. A sequence that has ended is filled with the first of them,
    and N is the number of new tokens in the longest. Raises UserError for tokens
    that the model does not know or has no positions for.
    """
    import torch
    from tqdm import tqdm

    from parallel.gemm import linear
    from qwen_moe.models.attention.cache import KeyValueCache

    smallest, largest = (int(input_ids.min()), int(input_ids.max())) if input_ids.numel() else (0, 0)
    _check_prompt(input_ids.shape[1], smallest, largest, sampling.max_new_tokens, model.config)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
    end_tensor = torch.tensor(ends, dtype=torch.int64, device=input_ids.device)
    generator = torch.Generator().manual_seed(sampling.seed)
    cache = KeyValueCache()
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    ids, new = input_ids, input_ids
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in tqdm(range(sampling.max_new_tokens), desc="generating", unit="token", disable=not progress):
                states, _ = model.hidden_states(new, cache=cache)
                logits = linear(states[:, -1], model.head_weight)
                if not bool(logits.isfinite().all()):
                    raise UserError(
                        "the model's outputs are NaN or infinite: its weights are damaged, or it needs a wider dtype "
                        "(--dtype fp32)"
                    )
                token = sample(logits, sampling.temperature, sampling.top_p, generator)
                if ends:
                    token = torch.where(ended, end_tensor[0], token)
                    ended = ended | torch.isin(token, end_tensor)
                new = token.unsqueeze(1)
                ids = torch.cat([ids, new], dim=1)
                if ends and bool(ended.all()):
                    break
    finally:
        model.train(was_training)
    return ids


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation. ``finish_reason`` is "stop" at an end token and "length" at max_new_tokens."""

    prompt: str
    completion: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    dtype: str
    seconds: float


def tokenizer_folder(directory: Path) -> Path:
    """The folder with the tokenizer of a checkpoint, run or Hugging Face directory. Raises UserError if there is none."""
    from qwen_moe.checkpoint.resolve import HF_FOLDER

    folder = directory / HF_FOLDER if (directory / HF_FOLDER).is_dir() else directory
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{folder} has no tokenizer (no tokenizer.json or vocab.json): copy the files of the model's tokenizer there"
        )
    return folder


def end_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """End tokens, read as Hugging Face does: from generation_config.json, else config.json, else the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).is_file():
            continue
        values = json_object(read_text(folder / name, "the model's", "the model's own directory"), str(folder / name))
        eos = values.get("eos_token_id")
        if eos is None:
            continue
        ends = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < 2**31 for end in ends):
            raise UserError(f"{folder / name}: eos_token_id is {eos!r}, expected an id or a list of ids")
        return ends
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _read_tokenizer(folder: Path) -> Any:
    """The Hugging Face tokenizer whose files lie in ``folder``. Raises UserError when they are damaged."""
    from transformers import AutoTokenizer

    try:
        # Never run code from the folder, and never ask whether to run it.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # for damaged files transformers raises plain Exception, KeyError, ...
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from None


def _check_text(prompt: str) -> None:
    if not prompt:
        raise UserError("the prompt is empty: give --prompt some text")
    if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not valid UTF-8 text: remove its broken characters")


def generate_text(
    directory: Path,
    prompt: str,
    sampling: Sampling,
    *,
    dtype: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Continuation:
    """Continue ``prompt`` with the model and tokenizer of a checkpoint, run or Hugging Face directory.

    ``dtype`` None: the stored dtype, or the run's compute dtype. ``device`` None: the GPU if there is one. Raises
    UserError.
    """
    _check_text(prompt)
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist: give a checkpoint, a run directory or a Hugging Face directory")
    import torch

    from qwen_moe.checkpoint.huggingface.convert import from_pretrained, load_checkpoint
    from qwen_moe.checkpoint.resolve import is_ours, resolve_checkpoint

    ours = is_ours(directory)
    if ours:
        directory = resolve_checkpoint(directory)
    folder = tokenizer_folder(directory)
    tokenizer = _read_tokenizer(folder)
    tokens = tokenizer(prompt)["input_ids"]
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = (load_checkpoint if ours else from_pretrained)(directory, dtype=dtype, device=device)
    ids = torch.tensor([tokens], dtype=torch.int64, device=device)
    ends = end_tokens(folder, tokenizer)
    begin = time.perf_counter()
    out = generate(model, ids, sampling, eos_token_id=ends or None, progress=progress)
    seconds = time.perf_counter() - begin
    new = out[0, len(tokens) :].tolist()
    stopped = bool(new) and new[-1] in ends
    return Continuation(
        prompt=prompt,
        completion=tokenizer.decode(new[:-1] if stopped else new),
        prompt_tokens=len(tokens),
        new_tokens=len(new),
        finish_reason="stop" if stopped else "length",
        dtype=str(model.head_weight.dtype).removeprefix("torch."),
        seconds=seconds,
    )


def register(subparsers: Any) -> None:
    """Add `generate` to the command's subparsers; ``args.func(args)`` returns the exit code."""
    parser = subparsers.add_parser("generate", help="continue a text with a checkpoint or Hugging Face directory")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a checkpoint, a run directory (its newest checkpoint) or a Hugging Face directory",
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--max-new-tokens",
        type=whole(1, LARGEST_SIZE),
        default=Sampling.max_new_tokens,
        metavar="N",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--temperature",
        type=number(least=0),
        default=Sampling.temperature,
        metavar="T",
        help="0 is greedy; default: %(default)s",
    )
    parser.add_argument(
        "--top-p",
        type=number(above=0, most=1),
        default=Sampling.top_p,
        metavar="P",
        help="nucleus sampling; default: %(default)s",
    )
    parser.add_argument("--seed", type=whole(), default=Sampling.seed, help="default: %(default)s")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32", "fp64"), help="default: as stored, or the run's compute dtype"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed
    )
    result = generate_text(args.checkpoint, args.prompt, sampling, dtype=args.dtype, progress=True)
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        print(result.prompt + result.completion)
        rate = result.new_tokens / max(result.seconds, 1e-9)
        print(f"{result.new_tokens} tokens, {rate:.1f} per second, {result.dtype}", file=sys.stderr)
    return 0
