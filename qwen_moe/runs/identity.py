"""What makes two runs the same: one table with a row for every setting. Resume, branch, outcome and pipeline ask it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qwen_moe.config import RunConfig


class Rule(Enum):
    """What a setting decides. ``TRAJECTORY``: every step. ``RATES``: the learning rates, and through them every step.
    ``HORIZON``: how long the run is; on resume it may change where that leaves the steps that are done as they were.
    ``DATA``: where the data lies; on resume the fingerprint of its content is compared instead. ``RESULT``: nothing that a
    checkpoint is followed by, but what a run from its beginning to its end gives. ``FREE``: neither; where and how it runs,
    what it writes down."""

    TRAJECTORY = "trajectory"
    RATES = "rates"
    HORIZON = "horizon"
    DATA = "data"
    RESULT = "result"
    FREE = "free"


# Names of settings; a name of a section stands for all of it. Only `model` is one, so that no new setting is forgotten.
TABLE: dict[Rule, tuple[str, ...]] = {
    Rule.TRAJECTORY: (
        "seed",
        "model",
        *("data.sequence_length", "data.split", "data.seed"),
        *("data.respect_document_boundaries", "data.mask_end_of_document"),
        *("training.global_batch_size", "objective.kind"),
        *("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_grad_norm"),
        "optimizer.learning_rate",  # the peak: of a branch too, for a trunk is one run with all its branches
        *("balance.scope", "balance.coefficient", "balance.z_loss_coefficient", "balance.bias_update_rate"),
        "balance.capacity_factor",
        *("precision.compute", "precision.master"),
        *("precision.fp8.recipe", "precision.fp8.format", "precision.fp8.amax_history_len"),
        *("precision.fp8.amax_compute_algo", "precision.fp8.margin"),
        *("precision.fp8.first_layers_in_bf16", "precision.fp8.last_layers_in_bf16"),
    ),
    Rule.RATES: (
        *("schedule.kind", "schedule.warmup_tokens", "schedule.decay_tokens", "schedule.decay_shape"),
        "schedule.min_learning_rate",
    ),
    Rule.HORIZON: ("training.train_tokens", "data.order_tokens"),
    Rule.DATA: (
        *("data.train", "data.validation", "data.tokenizer", "data.prepare.input", "data.prepare.output"),
        *("data.prepare.train_tokenizer", "data.prepare.vocab_size", "data.prepare.text_key"),
    ),
    Rule.RESULT: (
        *("checkpoint.load_from", "checkpoint.branch_from"),  # where it begins
        *("training.validation_interval", "training.validation_sequences"),  # what is measured
        *("training.max_skips", "training.spike_nats"),  # what a checkpoint says that was left out stays left out
        "training.micro_batch_size",  # counts in the balancing loss of some scopes, as the layout does
    ),
    Rule.FREE: (
        *("run_dir", "sample_prompt"),
        *("training.recompute", "training.loss_chunk_tokens"),
        "optimizer.provider",  # whose kernel, not what it computes
        *("precision.kernels", "precision.compile"),  # another machine may have another provider of the same recipe
        *("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep", "parallel.etp", "parallel.schedule"),
        *("parallel.stages_per_rank", "parallel.pipeline_split", "parallel.sharding"),
        *("parallel.collective_timeout_minutes", "parallel.check_collectives"),
        *("checkpoint.interval", "checkpoint.keep", "checkpoint.keep_steps", "checkpoint.asynchronous"),
        "checkpoint.export_hf",
        *("logging.tensorboard", "logging.expert_load_interval", "logging.wandb.project", "logging.wandb.entity"),
        *("logging.wandb.name", "logging.wandb.group", "logging.wandb.tags", "logging.wandb.mode"),
        *("launch.nproc", "launch.threads", "launch.max_restarts_without_progress"),
    ),
}
_RULES = {name: rule for rule, names in TABLE.items() for name in names}

ON_RESUME = frozenset({Rule.TRAJECTORY, Rule.RATES, Rule.HORIZON})
ON_BRANCH = frozenset({Rule.TRAJECTORY})  # rates of the past are compared one by one
OF_RESULTS = frozenset(Rule) - {Rule.FREE}

# Sections that a checkpoint may leave out: it says them elsewhere (model_config.json), or did before it had them in its
# settings (in the fingerprint of its data). Any other setting that it leaves out came after it, and had its default.
_SAID_ELSEWHERE = ("model", "data")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, given or left out; None for a setting."""
    kind = field.annotation
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
    return sections[0] if sections else None


def settings_of(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting; the default is Ellipsis where there is none. None for those of a section
    that is left out by default."""
    for key, field in section.model_fields.items():
        inner, name = _section_of(field), f"{prefix}{key}"
        default = field.get_default(call_default_factory=True, validated_data={})
        if inner is None:
            yield name, ... if default is PydanticUndefined else default
            continue
        for deeper, value in settings_of(inner, f"{name}."):
            yield deeper, None if default is None else value


def rule_of(name: str) -> Rule:
    """The row of a setting: its own, or that of a section it lies in. Raises KeyError when it has none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        found = _RULES.get(".".join(parts[:length]))
        if found is not None:
            return found
    raise KeyError(name)


def is_free(name: str) -> bool:
    """Whether ``name`` is a setting that does not tell two runs apart."""
    return _RULES.get(name) is Rule.FREE


_LEFT_OUT = object()


def _value(settings: Mapping[str, Any], name: str) -> Any:
    """The value of ``name`` in nested settings: None below a section that is null, `_LEFT_OUT` where the name is not there.
    Whatever stands in place of a section is no value of its settings, and returned as such."""
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return value
        if part not in value:
            return _LEFT_OUT
        value = value[part]
    return value


def flat(config: RunConfig, rules: Collection[Rule]) -> dict[str, Any]:
    """JSON values of the settings with these rules, by dotted name."""
    dump = config.model_dump(mode="json")
    return {name: _value(dump, name) for name, _ in settings_of() if rule_of(name) in rules}


def saved_settings(config: RunConfig) -> dict[str, Any]:
    """What a checkpoint keeps of the settings, by section: all that a resume compares, but the model."""
    nested: dict[str, Any] = {}
    for name, value in flat(config, ON_RESUME).items():
        *sections, key = name.split(".")
        if sections[:1] == ["model"]:
            continue
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    return nested


@dataclass(frozen=True)
class Difference:
    """A setting whose value was another one; as text ``section.key was X, is now Y``."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r}, is now {self.now!r}"


def differences(saved: Mapping[str, Any], config: RunConfig, rules: Collection[Rule]) -> list[Difference]:
    """In which settings with these rules ``config`` differs from ``saved``: those of a checkpoint, of whatever version, or
    of a whole config as JSON."""
    now, found = flat(config, rules), []
    for name, default in settings_of():
        if name not in now:
            continue
        before = _value(saved, name)
        if before is _LEFT_OUT:
            section = name.partition(".")[0]
            if section in _SAID_ELSEWHERE and section not in saved:
                continue
            before = list(default) if isinstance(default, tuple) else default
        if before != now[name]:
            found.append(Difference(name, None if before is ... else before, now[name]))
    return found
