"""The recipe of a walk through post-training: one section for each step, read strictly, all mistakes in one message."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config import RunConfig
from qwen_moe.config.fields import (
    Finite,
    GivenPath,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalSize,
    PositiveFloat,
    Section,
    Seed,
    Size,
)
from qwen_moe.config.load import load_as

STEPS = ("sft", "rollout", "pairs", "dpo", "reward_model", "grpo")
TRAINED = ("sft", "dpo", "reward_model", "grpo")
MEASURED = ("sft", "dpo", "grpo")  # they answer queries; a reward model does not
NUMBERS = {name: number for number, name in enumerate(STEPS, start=1)}
OF_WALK = "step"  # in place of a path: what the walk itself makes

_SHARED = tuple(
    name for name in RunConfig.model_fields if name not in ("run_dir", "model", "objective", "rollout", "stages")
)


class Rewarded(Section):
    """Queries, and how answers to them are rewarded, as in `qwen-moe rollout`."""

    queries: Annotated[str, Field(min_length=1)]
    chat: bool = True
    rewards: tuple[str, ...] = Field(min_length=1)
    reward_weights: tuple[Finite, ...] = ()
    on_reward_failure: Literal["error", "zero"] = "error"
    reward_seconds: PositiveFloat = 10.0
    max_new_tokens: Size
    batch_size: Annotated[Size, Field(le=100_000)] = 64


class RolloutSection(Rewarded):
    """The answers that pairs are made of: ``samples`` to each query."""

    samples: Annotated[Size, Field(le=100_000)] = 8
    temperature: NonNegativeFloat = 1.0
    seed: Seed = 0


class PairsSection(Section):
    """Which answers make pairs, as in `qwen-moe data pairs`. ``length``: the most tokens of both answers; 0: any."""

    rule: Literal["best-worst", "pass-fail", "all"] = "pass-fail"
    per_query: NonNegativeInt = 1
    passing: Finite = 1.0
    truncated: Literal["drop", "rejected"] = "drop"
    length: OptionalSize = 0
    seed: Seed = 0


class MeasureSection(Rewarded):
    """Held-out queries, which every model answers greedily. ``shown``: how many of them the page shows with answers."""

    shown: NonNegativeInt = 8


class WalkConfig(Section):
    """A walk. Everything that it writes goes to ``run_dir``. A step whose section is absent is left out.

    ``start``: the model to begin from, a checkpoint, a run or a Hugging Face directory; without it, fine-tuning begins from
    initial values. ``common``: sections of a training recipe that all training steps have. `sft`, `dpo`, `reward_model` and
    `grpo`: what the recipe of that step has beside and instead of them.
    """

    run_dir: GivenPath
    model: dict[str, Any]
    start: GivenPath | None = None
    common: dict[str, Any] = Field(default_factory=dict)
    sft: dict[str, Any] | None = None
    rollout: RolloutSection | None = None
    pairs: PairsSection | None = None
    dpo: dict[str, Any] | None = None
    reward_model: dict[str, Any] | None = None
    grpo: dict[str, Any] | None = None
    measure: MeasureSection | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.steps:
            raise ValueError(f"there is no step: give at least one of the sections {', '.join(STEPS)}")
        if self.sft is None and self.start is None:
            raise ValueError(f"{self.steps[0]} has no model to begin from: give the section sft, or start")
        if self.pairs is not None and self.rollout is None:
            raise ValueError("pairs are made of sampled answers: give the section rollout, or leave pairs out")
        if other := [name for name in self.common if name not in _SHARED]:
            raise ValueError(f"common.{other[0]} is not a section that steps share; valid keys: {', '.join(_SHARED)}")
        for step in TRAINED:
            section = getattr(self, step) or {}
            if given := [name for name in ("run_dir", "model") if name in section]:
                raise ValueError(f"{step}.{given[0]} is that of the whole walk: leave it out")
        return self

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of this walk, in order."""
        return tuple(name for name in STEPS if getattr(self, name) is not None)

    @property
    def measured(self) -> tuple[str, ...]:
        """The models that are measured, in order: ``start`` and steps."""
        if self.measure is None:
            return ()
        return (("start",) if self.start is not None else ()) + tuple(s for s in self.steps if s in MEASURED)


def load_walk(path: Path, overrides: Sequence[str] = ()) -> WalkConfig:
    """Read a walk's recipe, from a file or from the package, with `section.key=value` overrides. Raises UserError."""
    return load_as(WalkConfig, path, overrides)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the values of ``above``, section by section; a list is replaced as a whole."""
    found = dict(below)
    for key, value in above.items():
        before = found.get(key)
        found[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found
