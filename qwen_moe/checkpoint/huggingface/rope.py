"""RoPE in Hugging Face's config.json: `rope_parameters` (transformers 5), `rope_scaling` and `rope_theta` (before)."""

from typing import Any, get_args

from pydantic import ValidationError

from qwen_moe.checkpoint.huggingface.section_error import section_error
from qwen_moe.config import ModelConfig, RopeScaling
from qwen_moe.errors import UserError

DEFAULT_ROPE_THETA = 10_000.0
_KINDS = get_args(RopeScaling.model_fields["type"].annotation)
_TYPE_KEYS = ("rope_type", "type")
# Zero means the same as no value, as in transformers.
_DEFAULT_IF_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_PARTIAL = "partial_rotary_factor"


def read_rope(values: dict[str, Any], where: str, notes: list[str]) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling in a parsed config.json. Raises UserError for what is not supported."""
    # As in transformers, rope_scaling replaces rope_parameters, and a theta inside overrides one outside.
    key = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    inside = values.get(key) or {}
    if not isinstance(inside, dict) or any(isinstance(value, dict) for value in inside.values()):
        raise UserError(f"{where}: {key} is {inside!r}, expected one set of RoPE parameters for all layers")
    return _theta(values, key, inside, notes), _scaling(values, key, inside, where, notes)


def _theta(values: dict[str, Any], key: str, inside: dict[str, Any], notes: list[str]) -> float:
    inner, outer = inside.get("rope_theta"), values.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        notes.append(f"{key}.rope_theta {inner} is used, rope_theta {outer} is not (as in transformers)")
    theta = outer if inner is None else inner
    if theta is None:
        notes.append(f"config.json gives no rope_theta: transformers' default {DEFAULT_ROPE_THETA:g} is used")
        return DEFAULT_ROPE_THETA
    return float(theta)


def _scaling(
    values: dict[str, Any], key: str, inside: dict[str, Any], where: str, notes: list[str]
) -> RopeScaling | None:
    kind = inside.get("rope_type", inside.get("type", "default"))
    # transformers moves one beside the other RoPE parameters to them.
    for name, factor in ((f"{key}.{_PARTIAL}", inside.get(_PARTIAL)), (_PARTIAL, values.get(_PARTIAL))):
        if factor is not None and factor != 1.0:
            raise UserError(f"{where}: {name} is {factor!r}: only 1 is supported")
    if kind == "default":
        _note_unused(inside, {}, key, notes)
        return None
    if kind not in _KINDS:
        raise UserError(
            f"{where}: {key} asks for RoPE scaling of type {kind!r}: supported are {', '.join(_KINDS)}; remove it from "
            "config.json to convert the model at its native context length"
        )
    known = {name: inside[name] for name in RopeScaling.model_fields if name != "type" and inside.get(name) is not None}
    if inside.get("truncate", True) is None:
        known["truncate"] = False  # as in transformers
    known = {name: value for name, value in known.items() if name not in _DEFAULT_IF_ZERO or value != 0}
    if kind == "yarn" and values.get("original_max_position_embeddings") is not None:
        known["original_max_position_embeddings"] = values["original_max_position_embeddings"]  # as in transformers
    if kind != "yarn":
        known = {name: known[name] for name in ("factor",) if name in known}
    _note_unused(inside, known, key, notes)
    if texts := [name for name, value in known.items() if isinstance(value, str)]:
        raise UserError(f"{where}: {key}.{texts[0]} is {known[texts[0]]!r}, expected it without quotation marks")
    try:
        return RopeScaling.model_validate({"type": kind} | known)
    except ValidationError as error:
        raise section_error(error, where, key) from None


def _note_unused(inside: dict[str, Any], known: dict[str, Any], key: str, notes: list[str]) -> None:
    others = inside.keys() - known.keys() - {"rope_theta", _PARTIAL, *_TYPE_KEYS}
    if unused := sorted(name for name in others if inside[name] is not None):
        kind = inside.get("rope_type", inside.get("type"))
        why = "" if kind else " (it names no type, so RoPE is not scaled, as in transformers)"
        notes.append(f"not used in {key}: {', '.join(unused)}{why}")


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json that every version of transformers reads as RoPE of ``config``."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    given = scaling.model_dump(exclude_defaults=True)
    del given["type"]
    inside = {"rope_type": scaling.type, **given}
    return {"rope_theta": theta, "rope_scaling": inside, "rope_parameters": {"rope_theta": theta, **inside}}
