"""What evaluation asks of a model, and how a checkpoint answers it. Torch is imported only when a prompt is completed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen_moe.checkpoint.fingerprint import fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from qwen_moe.generation.extension import Extension
    from qwen_moe.generation.open import Attention

Done = Callable[[int, list[int]], None]


class Completer(Protocol):
    """A model with its tokenizer. ``identity`` names both: answers of one are never mixed with those of another."""

    @property
    def identity(self) -> dict[str, str]: ...

    @property
    def reach(self) -> int | None:
        """The most tokens of prompt and completion together; None if there is no limit."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def complete(self, prompts: list[list[int]], length: int, max_new_tokens: int, done: Done) -> None:
        """Continue every prompt greedily and call ``done(index, new tokens without the end token)`` once for each, in any
        order, as soon as it is complete. A prompt and its completion have at most ``length`` tokens. This number decides how
        they are read, so that the other prompts of a call make no difference."""

    def reading(self) -> dict[str, float]:
        """How the prompts of the last call were read: the share of attention that sparse prefill ``kept``, and its ``work``
        against dense attention's. Empty where attention was dense."""


@dataclass(frozen=True, kw_only=True)
class CompleterOptions:
    """How the model computes. ``dtype`` None: the stored dtype, or the run's compute dtype."""

    dtype: str | None = None
    context_extension: "Extension" = "auto"
    chunk_size: int | None = None
    attention: "Attention" = "dense"
    kept_share: float | None = None


def open_completer(checkpoint: Path, options: CompleterOptions) -> Completer:
    """A completer of a checkpoint, run or Hugging Face directory. Reads the tokenizer and the config; the weights are read
    with the first prompt. Raises UserError."""
    return _GeneratingCompleter(checkpoint, options)


class _GeneratingCompleter:
    """Completes with `qwen_moe.generation`. The context is extended only where the model does not reach."""

    def __init__(self, checkpoint: Path, options: CompleterOptions) -> None:
        from qwen_moe.generation.extension import check_chunk
        from qwen_moe.generation.open import HowToRead, Opened
        from qwen_moe.generation.tokenizer import tokenizer_folder

        self._opened = Opened(checkpoint)
        self._options = options
        self._how = HowToRead(
            extension=options.context_extension,
            chunk=options.chunk_size,
            attention=options.attention,
            kept_share=options.kept_share,
        )
        if options.chunk_size is not None:
            check_chunk(options.chunk_size, self._opened.config.max_position_embeddings)
        self._read: dict[str, float] = {}
        directory = self._opened.weights.directory
        self.identity = {
            "model": fingerprint(directory),
            "tokenizer": tokenizer_fingerprint(tokenizer_folder(directory)),
        }

    @property
    def reach(self) -> int | None:
        from qwen_moe.generation.extension import own_extension

        config = self._opened.config
        fixed = self._options.context_extension == "none" or own_extension(config)
        return config.reach if fixed else None

    def encode(self, text: str) -> list[int]:
        return self._opened.tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        return self._opened.tokenizer.decode(tokens, skip_special_tokens=True)

    def complete(self, prompts: list[list[int]], length: int, max_new_tokens: int, done: Done) -> None:
        from qwen_moe.generation.open import on_one_device
        from qwen_moe.generation.sampling import Sampling

        how = self._how.within(self._opened.config, length)
        engine = self._opened.engine(how, length, on_one_device(self._options.dtype))

        def answered(index: int, answers: list[Any]) -> None:
            tokens = answers[0].tokens
            self._read = {} if engine.record is None else engine.record.shares()
            done(index, tokens[:-1] if tokens[-1] in self._opened.end_tokens else tokens)

        engine.generate(prompts, Sampling(max_new_tokens=max_new_tokens, temperature=0), done=answered)

    def reading(self) -> dict[str, float]:
        return self._read
