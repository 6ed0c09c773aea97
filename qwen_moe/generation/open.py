"""Opens a checkpoint for generation: tokenizer, config, weights, and the way of reading."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from qwen_moe.checkpoint.huggingface.convert import Weights, open_weights, read_model
from qwen_moe.checkpoint.huggingface.sparse import read_sparse
from qwen_moe.checkpoint.resolve import check_exists
from qwen_moe.config import ModelConfig
from qwen_moe.data.chat import Chat
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Engine, Limits
from qwen_moe.generation.extension import Extension, extended
from qwen_moe.generation.runner import LocalRunner, Runner
from qwen_moe.generation.step import check_compiled_step
from qwen_moe.generation.tokenizer import end_tokens, tokenizer_folder
from qwen_moe.models.attention.sparse import SparseSettings

Attention = Literal["dense", "sparse"]
KEPT_SHARE = 0.95  # of attention, by sparse prefill


@dataclass(frozen=True, kw_only=True)
class HowToRead:
    """How prompts are read. ``chunk``: of dual chunk attention, by default the trained length. ``attention`` sparse leaves
    out keys in long prompts (`qwen_moe.models.attention.sparse`) and keeps ``kept_share``, by default `KEPT_SHARE`. Raises
    UserError for a share with dense attention, and for a chunk with another extension."""

    extension: Extension = "none"
    chunk: int | None = None
    attention: Attention = "dense"
    kept_share: float | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.kept_share is not None and self.attention == "dense":
            raise UserError(
                f"--kept-share {self.kept_share:g} is for sparse attention: add --attention sparse, or leave it out"
            )
        if self.chunk is not None and self.extension not in ("dca", "auto"):
            raise UserError(
                f"--chunk-size {self.chunk} is for dual chunk attention, and --context-extension is {self.extension}: give "
                "--context-extension dca or auto, or leave it out"
            )

    def within(self, config: ModelConfig, longest: int) -> "HowToRead":
        """How texts of at most ``longest`` tokens are read: without the extension where the model of ``config`` reaches so
        far, which would be refused."""
        return replace(self, extension="none", chunk=None) if longest <= config.reach else self


class Opened:
    """A checkpoint whose tokenizer and config are read. `engine` reads the weights, once."""

    def __init__(self, directory: Path) -> None:
        check_exists(directory)
        self.weights = open_weights(directory)
        if criteria := self.weights.config.criteria:
            raise UserError(
                f"{directory} is a reward model, which scores texts by {', '.join(criteria)} and writes none: use "
                "`qwen-moe score`, or give a language model"
            )
        self._folder = tokenizer_folder(self.weights.directory)
        self.tokenizer = read_tokenizer(self._folder)
        self.end_tokens = end_tokens(self._folder, self.tokenizer)
        self._runner: Runner | None = None

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @property
    def ends_turns(self) -> bool:
        """Whether the model stops where its chat template ends a turn, so that it was fine-tuned on conversations."""
        try:
            return Chat(self._folder, tokenizer=self.tokenizer).end in self.end_tokens
        except UserError:  # a tokenizer without a template, or with one for other uses
            return False

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens)

    def engine(self, how: HowToRead, longest: int, load: Callable[[Weights], Runner]) -> Engine:
        """An engine for texts of at most ``longest`` tokens, prompt and answer together. ``load`` reads the weights, at the
        first call. Raises UserError if the model does not reach so far."""
        config = extended(self.config, how.extension, longest, how.chunk)
        sparse = self._sparse(how)
        if self._runner is None:
            self._runner = load(self.weights)
        return Engine(
            self._runner, config, sparse=sparse, end_tokens=self.end_tokens, text=self.text, limits=how.limits
        )

    def _sparse(self, how: HowToRead) -> SparseSettings | None:
        if how.attention == "dense":
            return None
        published = read_sparse(self.weights.directory, self.config)
        share = how.kept_share or KEPT_SHARE
        return replace(published or SparseSettings(), kept_share=share)


def on_one_device(
    dtype: str | None = None, device: str | None = None, compiled: bool = False
) -> Callable[[Weights], Runner]:
    """Loads the whole model on ``device``, by default the GPU if there is one. ``dtype`` None: see `Weights`. ``compiled``:
    see `LocalRunner`."""

    def load(weights: Weights) -> Runner:
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if compiled:
            check_compiled_step(torch.device(chosen))
        return LocalRunner(read_model(weights, dtype, chosen), compiled=compiled)

    return load
