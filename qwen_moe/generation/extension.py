"""Reads texts longer than a model was trained on, without more training."""

from typing import Literal

from qwen_moe.config import DualChunk, ModelConfig, RopeScaling
from qwen_moe.errors import UserError

Extension = Literal["none", "yarn", "dca", "auto", "plain"]

# The report on Qwen2.5-1M has chunks of 262,144 tokens of which 8,192 are local. In short chunks more are needed: after
# that many tokens of a chunk, the distances to the chunk before are no longer true ones.
_CHUNK_PER_LOCAL, _LEAST_LOCAL = 32, 64


def _local(chunk: int) -> int:
    return max(1, chunk // _CHUNK_PER_LOCAL, min(_LEAST_LOCAL, chunk // 4))


def check_chunk(size: int, trained: int) -> None:
    """Raise UserError for a chunk of dual chunk attention that a model, trained on ``trained`` tokens, cannot have."""
    if not 2 <= size <= trained:
        raise UserError(f"--chunk-size {size}: give 2 to {trained}, the length that the model was trained on")


def own_extension(config: ModelConfig) -> str:
    """The setting by which a model reaches further than it was trained, to which none is added; empty if it has none."""
    if config.rope_scaling is not None:
        return "model.rope_scaling"
    return "" if config.dual_chunk is None else "model.dual_chunk"


def extended(config: ModelConfig, extension: Extension, length: int, chunk: int | None = None) -> ModelConfig:
    """``config`` for texts of ``length`` tokens.

    ``yarn``: YaRN with the smallest whole factor that reaches (arXiv 2309.00071). ``dca``: dual chunk attention with chunks
    of ``chunk`` tokens, by default three quarters of the trained length as in the code of arXiv 2402.17463, because
    distances near the whole length are rare in training. ``auto``: nothing where the model reaches, else dual chunk
    attention. ``plain``: positions go on beyond the trained ones, to see the model fail. Raises UserError if the model
    reaches without, or has another extension.
    """
    if extension == "none" or (extension == "auto" and length <= config.reach):
        return config
    if length <= config.reach:
        raise UserError(
            f"--context-extension {extension}: the model reaches {config.reach} tokens and the longest text has {length}, "
            "prompt and answer together: leave the option out"
        )
    if own := own_extension(config):
        raise UserError(
            f"--context-extension {extension}: the model has its own extension ({own}), which reaches {config.reach} "
            f"tokens, and the longest text has {length}: shorten the text, or change the model's config"
        )
    trained = config.max_position_embeddings
    if extension == "yarn":
        factor = -(-length // trained)
        scaling = RopeScaling(type="yarn", factor=float(factor), original_max_position_embeddings=trained)
        change = {"rope_scaling": scaling, "max_position_embeddings": factor * trained}
    elif extension == "plain":
        change = {"max_position_embeddings": length}
    else:
        size = chunk or max(2, trained * 3 // 4)
        check_chunk(size, trained)
        chunks = DualChunk(
            chunk_size=size,
            local_size=_local(size),
            original_max_position_embeddings=size,
        )
        change = {"dual_chunk": chunks, "max_position_embeddings": length}
    return ModelConfig.model_validate(config.model_dump() | change)
