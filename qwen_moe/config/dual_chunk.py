"""Dual chunk attention: how a model reads texts longer than it was trained on without a distance that it never saw."""

from typing import Literal, Self

from pydantic import model_validator

from qwen_moe.config.fields import Section, Size


class DualChunk(Section):
    """Hugging Face's dual_chunk_attention_config (arXiv 2402.17463); `DualChunkReader` computes it.

    ``chunk_size``: the length of text that the model was trained on. ``local_size``: how many of the distances below it are
    kept for the nearest keys of the chunk before. ``original_max_position_embeddings``: the length beyond which scores are
    scaled up, as YaRN does; without it they are not. ``clamp``: the largest position of a query, ``trained`` for
    chunk_size - 1 (the paper), ``code`` for chunk_size (the code published with it, and vLLM's).
    """

    chunk_size: Size
    local_size: Size
    original_max_position_embeddings: Size | None = None
    clamp: Literal["trained", "code"] = "trained"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.local_size >= self.chunk_size:
            raise ValueError(
                f"local_size {self.local_size} is not below chunk_size {self.chunk_size}: chunks advance by their "
                "difference; published models have local_size = chunk_size / 32"
            )
        return self

    @property
    def stride(self) -> int:
        """How many tokens a chunk advances; keys repeat their positions after as many."""
        return self.chunk_size - self.local_size

    @property
    def plain_length(self) -> int:
        """The longest text in which dual chunk attention is plain attention: at most one chunk, without two chunks between
        a query and a key, and without scaled scores."""
        scaled_beyond = self.original_max_position_embeddings or self.chunk_size
        return min(self.chunk_size, 2 * self.stride, scaled_beyond)
