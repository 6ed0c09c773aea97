"""Dual chunk attention in Hugging Face's config.json: `dual_chunk_attention_config`, as vLLM reads it."""

from typing import Any

from pydantic import ValidationError

from qwen_moe.checkpoint.huggingface.section_error import section_error
from qwen_moe.config import DualChunk, ModelConfig
from qwen_moe.errors import UserError

KEY = "dual_chunk_attention_config"
_OF_VLLM = {"chunk_size": 8192, "local_size": 1024}
_SPARSE = "sparse_attention_"  # keys of sparse prefill, in the same mapping: see `sparse.py`


def read_dual_chunk(values: dict[str, Any], where: str, notes: list[str]) -> DualChunk | None:
    """Dual chunk attention in a parsed config.json. Raises UserError for settings that contradict each other.

    ``clamp`` is a key of ours: other programs ignore it, and without it the value is `DualChunk`'s default.
    """
    inside = values.get(KEY)
    if inside is None:
        return None
    if not isinstance(inside, dict):
        raise UserError(f"{where}: {KEY} is {inside!r}, expected a mapping with chunk_size and local_size")
    known = {name: inside[name] for name in DualChunk.model_fields if inside.get(name) is not None}
    if known.get("original_max_position_embeddings") == 0:  # vLLM's way to say that scores are not scaled
        del known["original_max_position_embeddings"]
    unused = sorted(name for name in inside.keys() - DualChunk.model_fields.keys() if not name.startswith(_SPARSE))
    if unused:
        notes.append(f"not used in {KEY}: {', '.join(unused)}")
    try:
        return DualChunk.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        missing = f"; vLLM's default is {_OF_VLLM[str(first['loc'][0])]}" if first["type"] == "missing" else ""
        raise section_error(error, where, KEY, missing) from None


def write_dual_chunk(config: ModelConfig, original: dict[str, Any]) -> dict[str, Any]:
    """The key of config.json for ``config``, if it has dual chunk attention. Keeps the other keys of the mapping in
    ``original``, such as those of sparse prefill."""
    if config.dual_chunk is None:
        return {}
    inside = original.get(KEY)
    others = {} if not isinstance(inside, dict) else inside
    kept = {name: value for name, value in others.items() if name not in DualChunk.model_fields}
    return {KEY: config.dual_chunk.model_dump(exclude_defaults=True) | kept}
