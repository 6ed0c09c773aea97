"""Named lists of stages: the training lengths that Qwen's reports describe.

The reports give lengths, bases of RoPE and mixes of lengths. They do not give the tokens of a stage, its batch or its
learning rate, so a recipe says these.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from launchers.counted import counted
from qwen_moe.errors import UserError


def _stage(length: int, base: float, long_share: float | None = None) -> dict[str, Any]:
    mix = {} if long_share is None else {"long_share": long_share}
    return {
        "name": f"{length // 1024}k",
        "data": {"sequence_length": length} | mix,
        "model": {"rope_theta": base},
    }


STAGE_PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    # arXiv 2412.15115, section 3.3: all models but Turbo; the base is raised by ABF (arXiv 2309.16039).
    "qwen2.5": (_stage(4096, 1e4), _stage(32768, 1e6)),
    # The same section, Turbo: in each stage 40% of the sequences are of the full length and 60% shorter.
    "qwen2.5-turbo": tuple(_stage(length, 1e7, 0.4) for length in (32768, 65536, 131072, 262144)),
    # arXiv 2501.15383, section 3: other lengths, bases and mix for the open models of 1M tokens.
    "qwen2.5-1m": (_stage(65536, 1e6, 0.75), _stage(131072, 5e6, 0.75), _stage(262144, 1e7, 0.75)),
}
_FORM = "stages: {preset: NAME, tokens: TOKENS OF EACH STAGE or a list of them}"


def with_stages(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A copy of a recipe's values in which `stages: {preset: NAME, tokens: ...}` is the list of stages that it names.
    Further keys are names of stages, with what they change besides."""
    values = dict(values)
    if isinstance(values.get("stages"), Mapping):
        values["stages"] = _from_preset(dict(values["stages"]), source)
    return values


def _from_preset(given: dict[str, Any], source: str) -> list[dict[str, Any]]:
    name, tokens = given.pop("preset", None), given.pop("tokens", None)
    if name not in STAGE_PRESETS:
        near = difflib.get_close_matches(str(name)[:100], STAGE_PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(STAGE_PRESETS)}"
        raise UserError(f"{source}: stages.preset is {str(name)[:100]!r}; {hint} (give a list of stages, or {_FORM})")
    stages = STAGE_PRESETS[name]
    if tokens is None:
        raise UserError(
            f"{source}: stages.tokens is missing: the report does not give the tokens of the stages of {name}: {_FORM}"
        )
    counts = tokens if isinstance(tokens, list) else [tokens] * len(stages)
    if len(counts) != len(stages):
        raise UserError(
            f"{source}: stages.tokens has {counted(len(counts), 'number')}, but {name} has "
            f"{counted(len(stages), 'stage')}"
        )
    names = [stage["name"] for stage in stages]
    if unknown := [key for key in given if key not in names]:
        raise UserError(f"{source}: unknown key 'stages.{unknown[0]}'; {name} has the stages {', '.join(names)}")
    return [
        _merged(stage, given.get(stage["name"]) or {}, source) | {"tokens": count}
        for stage, count in zip(stages, counts, strict=True)
    ]


def _merged(stage: dict[str, Any], changes: Any, source: str) -> dict[str, Any]:
    if not isinstance(changes, Mapping):
        raise UserError(f"{source}: stages.{stage['name']} is {changes!r:.100}: give the sections that it changes")
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in stage.items()}
    for section, changed in changes.items():
        before = merged.get(section)
        merged[section] = (
            before | dict(changed) if isinstance(before, dict) and isinstance(changed, Mapping) else changed
        )
    return merged
