"""The settings of an upcycling, and the plan that follows from them for one dense model. Needs no torch.

Legend: I width of the dense feed-forward, E experts, F width of an expert, K experts of a token, G = I / F experts that one
copy of the feed-forward gives if F divides I, S width of the shared expert.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from launchers.counted import counted
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.config.families import FAMILIES
from qwen_moe.errors import UserError

Method = Literal["fine_grained", "copies", "same_function"]
What = Literal["indices", "elements"]
Std = Literal["replaced", "initializer"]
Router = Literal["random", "groups", "even"]
Scale = Literal["match", "none"]


@dataclass(frozen=True, kw_only=True)
class UpcycleSettings:
    """How a dense model becomes a mixture of experts. docs/upcycling.md explains every choice.

    ``method``: "fine_grained" cuts experts from shuffled copies of the feed-forward (arXiv 2407.10671, section 2.2.2);
    "copies" makes each expert a whole copy (arXiv 2212.05055); "same_function" gives a model that computes what the
    dense one does.
    ``expert_size``: F, by default I. ``shared_expert``: S, or 0 for none.
    ``reinitialize``: the share of each expert that is drawn anew, by default 0.5 for "fine_grained" and 0 otherwise;
    ``reinitialize_what``: "indices" of the intermediate dim, the same in gate, up and down, or single "elements" of each
    matrix; ``reinitialize_std``: normal with the mean and standard deviation of the weights that are "replaced", or
    with mean 0 and the model's "initializer" range. ``reinitialize_shared``: the shared expert too.
    ``router``: "random" rows, the same row for the "groups" of experts from one copy (arXiv 2410.07524), or "even": zeros.
    ``scale``: "match" multiplies down projections so that routed and shared experts add up to the feed-forward's size.
    ``shared_share``: how much of the feed-forward the shared expert then gives; the rest is the routed experts'.
    """

    num_experts: int
    top_k: int
    expert_size: int | None = None
    shared_expert: int = 0
    method: Method = "fine_grained"
    reinitialize: float | None = None
    reinitialize_what: What = "indices"
    reinitialize_std: Std = "replaced"
    reinitialize_shared: bool = False
    router: Router | None = None
    scale: Scale = "match"
    shared_share: float = 0.5
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An upcycling that fits. ``copies``: how many copies of the feed-forward the experts are cut from. ``routed_scale``:
    what makes the routed experts' weighted sum as large as the feed-forward where the router is even."""

    settings: UpcycleSettings
    dense: ModelConfig
    moe: ModelConfig
    expert_size: int
    reinitialize: float
    router: Router
    copies: int
    routed_scale: float

    @property
    def shuffles(self) -> bool:
        """Whether copies are shuffled. Whole ones are not: the order of intermediate indices changes nothing there."""
        return self.expert_size < self.dense.intermediate_size

    @property
    def discarded(self) -> int:
        """Intermediate indices of all copies that no expert holds."""
        return self.copies * self.dense.intermediate_size - self.moe.num_experts * self.expert_size

    def reinitialized(self, count: int) -> int:
        """floor(``reinitialize`` * ``count``), with ``reinitialize`` as it was written: 0.29 of 100 is 29."""
        return math.floor(Fraction(str(self.reinitialize)) * count)


def make_plan(dense: ModelConfig, settings: UpcycleSettings, where: str) -> Plan:
    """The plan for the dense model of ``where``. Raises UserError if the settings do not fit it or each other."""
    if dense.is_moe_family:
        raise UserError(
            f"{where} is a mixture of experts already ({dense.family}, {counted(dense.num_experts, 'expert')}): "
            "upcycling starts "
            "from a dense model"
        )
    settings = _checked(settings)
    width = dense.intermediate_size
    size = width if settings.expert_size is None else settings.expert_size
    if not 0 < size <= width:
        raise UserError(
            f"--expert-size {size} does not fit: an expert is cut from a feed-forward of intermediate_size {width}, so "
            f"give 1 to {width}"
        )
    if settings.method == "copies" and size != width:
        raise UserError(
            f"--expert-size {size} with --method copies: each expert is a whole copy, so leave the size out or give "
            f"{width}, or use --method fine_grained"
        )
    moe = _moe_config(dense, settings, size, where)
    router = settings.router or _default_router(settings, width, size)
    if router == "groups":
        _check_groups(settings, width, size)
    weight = 1.0 if settings.norm_topk_prob else settings.top_k / settings.num_experts
    plan = Plan(
        settings=settings,
        dense=dense,
        moe=moe,
        expert_size=size,
        reinitialize=_reinitialize(settings),
        router=router,
        copies=-(-settings.num_experts * size // width),
        routed_scale=(width / size) / weight if settings.scale == "match" else 1.0,
    )
    if settings.method == "same_function":
        _check_same_function(plan)
    return plan


def _checked(settings: UpcycleSettings) -> UpcycleSettings:
    for name, choices in (
        ("method", Method),
        ("reinitialize_what", What),
        ("reinitialize_std", Std),
        ("scale", Scale),
        ("router", Router),
    ):
        value = getattr(settings, name)
        if value not in get_args(choices) and not (name == "router" and value is None):
            raise UserError(f"{name} is {value!r}, expected one of {', '.join(get_args(choices))}")
    for name in ("reinitialize", "shared_share"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected a share from 0 to 1")
    return replace(settings, dense_layers=tuple(sorted(set(settings.dense_layers))))


def _moe_config(dense: ModelConfig, settings: UpcycleSettings, size: int, where: str) -> ModelConfig:
    """The MoE family with the dense one's features, with all its other settings."""
    wanted = (True, dense.qk_norm, dense.features.o_bias)
    family = next(name for name, row in FAMILIES.items() if (row.moe, row.qk_norm, row.o_bias) == wanted)
    shared = FAMILIES[family].shared_expert
    if shared and not settings.shared_expert:
        raise UserError(
            f"a {dense.family} model becomes {family}, which always has a shared expert: give its size with "
            f"--shared-expert ({dense.intermediate_size} is the whole feed-forward)"
        )
    if settings.shared_expert and not shared:
        raise UserError(
            f"--shared-expert {settings.shared_expert}: a {dense.family} model becomes {family}, which has no shared "
            "expert; leave it out"
        )
    values = dense.model_dump(mode="json") | {
        "family": family,
        "num_experts": settings.num_experts,
        "num_experts_per_tok": settings.top_k,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": settings.shared_expert,
        "norm_topk_prob": settings.norm_topk_prob,
        "mlp_only_layers": list(settings.dense_layers),
    }
    return parse_model(values, f"the upcycled {where}")


def _reinitialize(settings: UpcycleSettings) -> float:
    if settings.reinitialize is not None:
        return settings.reinitialize
    return 0.5 if settings.method == "fine_grained" else 0.0


def _default_router(settings: UpcycleSettings, width: int, size: int) -> Router:
    if settings.method != "same_function":
        return "random"
    if settings.norm_topk_prob or settings.top_k == settings.num_experts:
        return "random" if size == width else "groups"
    return "even"


def _check_groups(settings: UpcycleSettings, width: int, size: int) -> None:
    if width % size:
        below = max(part for part in range(1, size + 1) if width % part == 0)
        above = min(part for part in range(size, width + 1) if width % part == 0)
        raise UserError(
            f"--expert-size {size} does not divide intermediate_size {width}, so copies do not end at whole experts: give "
            f"{below} or {above}, or --method fine_grained --router random"
        )
    parts = width // size
    if settings.num_experts % parts:
        raise UserError(
            f"--experts {settings.num_experts} is not a multiple of the {counted(parts, 'expert')} that a copy of the "
            "feed-forward "
            f"gives ({width} / {size}): give such a number, or --method fine_grained --router random"
        )


def _check_same_function(plan: Plan) -> None:
    """Raise UserError unless the MoE model's first forward is the dense model's (docs/upcycling.md has the proof)."""
    settings, width, size = plan.settings, plan.dense.intermediate_size, plan.expert_size
    parts, everyone = width // size, settings.top_k == settings.num_experts
    if plan.reinitialize:
        raise UserError(
            f"--method same_function with --reinitialize {plan.reinitialize}: new weights compute another function; leave "
            "it out, or use --method fine_grained"
        )
    if settings.scale == "none":
        raise UserError("--method same_function needs the scaling that --scale none leaves out: leave the option out")
    if settings.shared_share == 1 and settings.shared_expert >= width:
        return  # the shared expert gives everything, and routed experts give 0
    if size < width:
        _check_groups(settings, width, size)
        if plan.router == "random":
            raise UserError(
                "--method same_function with --router random: experts that are parts of one copy need one weight; use "
                "--router groups, or --expert-size " + str(width)
            )
        if not everyone and (settings.top_k % parts or plan.router == "even"):
            tied = (
                "an even router does not choose whole copies" if plan.router == "even" else "a token must visit whole"
            )
            copies = "" if plan.router == "even" else f" copies of {counted(parts, 'expert')}"
            raise UserError(
                f"--method same_function with --top-k {settings.top_k}: {tied}{copies}. {_otherwise(plan, parts)}"
            )
    if not settings.norm_topk_prob and not everyone and plan.router != "even":
        raise UserError(
            f"--method same_function with --no-norm-topk-prob and --router {plan.router}: the weights of the chosen experts "
            f"add up to another number for each token. {_otherwise(plan, parts)}"
        )


def _otherwise(plan: Plan, parts: int) -> str:
    top_k = max(parts, plan.settings.top_k // parts * parts)
    found = f"Give --norm-topk-prob with --router groups and a --top-k that is a multiple of {parts} (such as {top_k})"
    if plan.moe.features.shared_expert:
        found += f", or --shared-share 1 with --shared-expert {plan.dense.intermediate_size} or more"
    return found
