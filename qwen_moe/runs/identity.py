"""Decides whether two runs are the same, by one table of every setting, for resume, branch, outcome and pipeline."""

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
    ``HORIZON``: the run's length; on resume it may change if the finished steps stay the same. ``DATA``: where the data is;
    on resume the fingerprint of its content is compared instead. ``RESULT``: the result of a whole run, but not the steps
    that follow a given checkpoint. ``STAGES``: what stages change; on resume those that have begun are compared one by one.
    ``FREE``: none of these, only where and how the run computes and what it records."""

    TRAJECTORY = "trajectory"
    RATES = "rates"
    HORIZON = "horizon"
    DATA = "data"
    RESULT = "result"
    STAGES = "stages"
    FREE = "free"


# Names of settings. A section's name covers all its settings; only `model` is one, so that new settings are not overlooked.
TABLE: dict[Rule, tuple[str, ...]] = {
    Rule.TRAJECTORY: (
        "seed",
        "model",
        *("data.sequence_length", "data.split", "data.seed", "data.long_share"),
        *("data.respect_document_boundaries", "data.mask_end_of_document", "data.too_long"),
        *("training.global_batch_size", "objective.kind"),
        *("objective.preference.loss", "objective.preference.beta", "objective.preference.label_smoothing"),
        *("objective.preference.length_normalized", "objective.preference.sft_weight"),
        *("objective.reward.criteria", "objective.reward.weights", "objective.reward.center"),
        *("objective.policy.ratio", "objective.policy.clip_low", "objective.policy.clip_high"),
        *("objective.policy.normalization", "objective.policy.longest"),
        *("objective.policy.divide_by_std", "objective.policy.kl", "objective.policy.kl_coefficient"),
        *("rollout.queries", "rollout.chat", "rollout.queries_per_episode", "rollout.samples"),
        *("rollout.updates_per_episode", "rollout.max_new_tokens", "rollout.variances", "rollout.rewards"),
        *("rollout.reward_weights", "rollout.reward_model", "rollout.reward_model_weight", "rollout.on_reward_failure"),
        *("rollout.flat_groups", "rollout.truncated", "rollout.replay", "rollout.old_log_probs"),
        *("optimizer.beta1", "optimizer.beta2", "optimizer.eps", "optimizer.weight_decay", "optimizer.clip_grad_norm"),
        "optimizer.learning_rate",  # the peak; a trunk and its branches have the same
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
        *("data.prepare.learn", "data.prepare.too_long"),
    ),
    Rule.RESULT: (
        *("checkpoint.load_from", "checkpoint.branch_from"),  # where the run begins
        *("training.validation_interval", "training.validation_sequences", "data.validation_sets"),  # what is measured
        *("training.max_skips", "training.spike_nats"),  # batches that a checkpoint records as skipped stay skipped
        "training.micro_batch_size",  # affects the balancing loss in some scopes, as the layout does
    ),
    Rule.STAGES: ("stages",),
    Rule.FREE: (
        *("run_dir", "sample_prompt"),
        *("training.epochs", "rollout.episodes"),  # they decide training.train_tokens, which is compared
        *("rollout.reward_seconds", "rollout.reward_memory_mib"),
        *("rollout.batch", "rollout.held_out", "rollout.held_out_interval"),
        *("rollout.server.url", "rollout.server.model", "rollout.server.kind", "rollout.server.reload"),
        *("rollout.server.seconds", "rollout.server.tries", "rollout.server.at_once", "rollout.server.key_variable"),
        *("rollout.server.check", "rollout.server.gap"),
        *("training.recompute", "training.loss_chunk_tokens"),
        "optimizer.provider",  # another kernel for the same computation
        *(
            "precision.kernels",
            "precision.compile",
        ),  # another machine may have another provider for the same FP8 recipe
        *("parallel.tp", "parallel.pp", "parallel.cp", "parallel.ep", "parallel.etp", "parallel.schedule"),
        *("parallel.cp_kind", "parallel.cp_ulysses", "parallel.ep_overlap"),
        *("parallel.stages_per_rank", "parallel.pipeline_split", "parallel.sharding"),
        "parallel.gradient_reduction",
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
ON_BRANCH = frozenset({Rule.TRAJECTORY})  # past learning rates are compared step by step instead
OF_RESULTS = frozenset(Rule) - {Rule.FREE}

# Sections that a checkpoint's settings may lack because it records them elsewhere: in model_config.json, or in older
# checkpoints in the fingerprint of the data. Any other setting that is absent is newer than the checkpoint and had its
# default.
_SAID_ELSEWHERE = ("model", "data")


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the section that a field holds (optional or not); None for a setting."""
    kind = field.annotation
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    sections = [choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)]
    return sections[0] if sections else None


def settings_of(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting. The default is Ellipsis for a required setting, and None for the settings of
    a section that is absent by default."""
    for key, field in section.model_fields.items():
        inner, name = _section_of(field), f"{prefix}{key}"
        default = field.get_default(call_default_factory=True, validated_data={})
        if inner is None:
            yield name, ... if default is PydanticUndefined else default
            continue
        for deeper, value in settings_of(inner, f"{name}."):
            yield deeper, None if default is None else value


def rule_of(name: str) -> Rule:
    """The rule of a setting: its own, or that of an enclosing section. Raises KeyError if it has none."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        rule = _RULES.get(".".join(parts[:length]))
        if rule is not None:
            return rule
    raise KeyError(name)


def is_free(name: str) -> bool:
    """Whether ``name`` is a setting that may differ between equal runs."""
    return _RULES.get(name) is Rule.FREE


_LEFT_OUT = object()


def _value(settings: Mapping[str, Any], name: str) -> Any:
    """The value of ``name`` in nested settings: None below a null section, and `_LEFT_OUT` if the name is absent. If a plain
    value is in the place of a section, that value is returned."""
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return value
        if part not in value:
            return _LEFT_OUT
        value = value[part]
    return value


def flat(config: RunConfig, rules: Collection[Rule]) -> dict[str, Any]:
    """The JSON values of settings with these rules, by dotted name."""
    dump = config.model_dump(mode="json")
    found = {name: _value(dump, name) for name, _ in settings_of() if rule_of(name) in rules}
    return found | {"stages": _without_free(found["stages"])} if "stages" in found else found


def _without_free(stages: Any) -> Any:
    """What the stages change, without settings that may differ between equal runs, such as their layouts."""
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return stages
    return [
        {
            section: {
                key: value for key, value in changed.items() if value is not None and not is_free(f"{section}.{key}")
            }
            if isinstance(changed, dict)
            else changed
            for section, changed in stage.items()
            if section != "parallel"
        }
        for stage in stages
    ]


def saved_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that a checkpoint keeps, by section: all that a resume compares, except the model."""
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
    """A setting whose value has changed. Its text is ``section.key was X, is now Y``."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.before!r}, is now {self.now!r}"


def differences(saved: Mapping[str, Any], config: RunConfig, rules: Collection[Rule]) -> list[Difference]:
    """The settings with these rules in which ``config`` differs from ``saved``: the settings of a checkpoint of any version,
    or a whole config as JSON."""
    now, changed = flat(config, rules), []
    for name, default in settings_of():
        if name not in now:
            continue
        before = _value(saved, name)
        if before is _LEFT_OUT:
            section = name.partition(".")[0]
            if section in _SAID_ELSEWHERE and section not in saved:
                continue
            before = list(default) if isinstance(default, tuple) else default
        if name == "stages":
            before = _without_free(before)
        if before != now[name]:
            changed.append(Difference(name, None if before is ... else before, now[name]))
    return changed
