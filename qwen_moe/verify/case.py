"""Cases to verify: a recipe shrunk to a small model with the same features, or a random small run; and their batches."""

import math
import random
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch

from launchers.counted import counted
from parallel.mesh import Layout, LayoutError
from parallel.stages import V_SHAPED, splits_backward, stages_per_rank
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.config.families import FAMILIES
from qwen_moe.config.objective import KL, Normalization, Ratio
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.errors import UserError
from qwen_moe.models.init import named_generator
from qwen_moe.sharding.layout import context_plan
from qwen_moe.verify.examples import LEAST_LENGTH, empty_rows, packed_batch
from qwen_moe.verify.probe import weights

STEPS = 3


def layout_overrides(layout: Layout, schedule: str = "1f1b", stages: int = 0) -> dict[str, Any]:
    """The ``parallel`` section for ``layout``; dp follows from the number of processes."""
    section: dict[str, Any] = {axis: getattr(layout, axis) for axis in ("tp", "pp", "cp", "ep", "etp")}
    return section | {"schedule": schedule, "stages_per_rank": stages}


def kept_split(config: RunConfig, layout: Layout) -> tuple[int, ...]:
    """The recipe's own ``parallel.pipeline_split`` (layers of each stage) if ``layout`` has as many stages, else empty. With
    it the shrunk model keeps all layers, so that the split itself is verified."""
    split = config.parallel.pipeline_split
    return split if layout.pp > 1 and len(split) == _stages(config, layout) else ()


def dropped_split(config: RunConfig, layout: Layout) -> str:
    """Why the recipe's ``parallel.pipeline_split`` is not verified with ``layout``; empty if it is, or if there is none."""
    split = config.parallel.pipeline_split
    if not split or kept_split(config, layout):
        return ""
    stages = _stages(config, layout)
    return (
        f"parallel.pipeline_split {list(split)} has {counted(len(split), 'stage')} and this layout has {stages}: a "
        "split chosen by "
        "cost is verified instead of the recipe's own"
    )


def splits_experts(layout: Layout) -> bool:
    """Whether tokens travel to experts, so that ``parallel.ep_overlap`` may be set."""
    return layout.ep * layout.etp > 1


def dropped_overlap(config: RunConfig, layout: Layout) -> str:
    """Why the recipe's ``parallel.ep_overlap`` is not verified with ``layout``; empty if it is, or if it is off."""
    if not config.parallel.ep_overlap or splits_experts(layout):
        return ""
    return "parallel.ep_overlap is not verified, because no tokens travel to experts on other ranks"


def _stages(config: RunConfig, layout: Layout) -> int:
    parallel = config.parallel
    return layout.pp * stages_per_rank(parallel.schedule, parallel.stages_per_rank) if layout.pp > 1 else 1


def _exchanged(kind: str, ulysses: int, cp: int) -> int:
    """How many cp ranks exchange tokens for heads, where the kind is not left to the run."""
    return cp if kind == "ulysses" else ulysses


def _context(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """``cp_kind`` and ``cp_ulysses`` as the recipe itself runs: for a smaller model, ``auto`` may choose another kind."""
    try:
        return context_plan(config, layout).settings(layout.cp)
    except LayoutError:
        return {"cp_kind": config.parallel.cp_kind, "cp_ulysses": config.parallel.cp_ulysses}


def _smaller(
    config: RunConfig, layout: Layout, context: dict[str, Any], stages: int, every_layer: bool
) -> dict[str, Any]:
    """A model with the features of the recipe's and small sizes that ``layout`` divides; ``every_layer`` keeps its depth."""
    model, exchanged = config.model, _exchanged(context["cp_kind"], context["cp_ulysses"], layout.cp)
    tp, layers = layout.tp, max(2, stages, min(model.num_hidden_layers, 4))
    if every_layer:
        layers = model.num_hidden_layers
    if model.num_key_value_heads >= tp:
        kv_heads = tp if model.num_key_value_heads == tp else 2 * tp
    else:  # fewer KV heads than tp stay fewer
        kv_heads = max(k for k in range(1, tp + 1) if tp % k == 0 and k <= model.num_key_value_heads)
    grouped = model.num_attention_heads > model.num_key_value_heads
    if exchanged > 1 and kv_heads > tp and exchanged % 2:
        kv_heads = tp  # an odd number of ranks can share one head, not two
    heads = math.lcm(tp * exchanged, kv_heads * (2 if grouped else 1))
    values: dict[str, Any] = model.model_dump() | {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 6 * tp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 4,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
    }
    if model.is_moe_family:
        ep, etp = layout.ep, layout.etp
        experts = ep * max(2, -(-min(model.num_experts, 8) // ep))
        dense = [layer for layer in range(layers) if layer in model.mlp_only_layers]
        sparse_step = min(model.decoder_sparse_step, layers)
        if not [i for i in range(layers) if (i + 1) % sparse_step == 0 and i not in dense]:
            dense = []
        values |= {
            "num_experts": experts,
            "num_experts_per_tok": min(model.num_experts_per_tok, experts, 4),
            "moe_intermediate_size": 4 * etp,
            "shared_expert_intermediate_size": 6 * tp if model.shared_expert_intermediate_size else 0,
            "decoder_sparse_step": sparse_step,
            "mlp_only_layers": dense,
        }
    return values


def _settings(
    model: dict[str, Any], layout: Layout, micro_batches: int, micro_batch_size: int, sequence: int
) -> dict[str, Any]:
    batch = micro_batches * micro_batch_size * layout.dp
    return {
        "run_dir": "unused",
        "model": model,
        "data": {"train": [{"prefix": "unused"}], "sequence_length": sequence},
        "training": {
            "train_tokens": STEPS * batch * sequence,
            "micro_batch_size": micro_batch_size,
            "global_batch_size": batch,
            "loss_chunk_tokens": 7,
        },
        # Where a gradient is near 0, AdamW's first update multiplies its rounding error by learning_rate / eps. At the
        # default eps that factor is 1e6: it would turn 1e-16 into 1e-10, whatever the layout.
        "optimizer": {"learning_rate": 1e-2, "clip_grad_norm": 0.5, "eps": 1e-5},
        "precision": {"compute": "fp64", "master": "fp64"},
        "checkpoint": {"export_hf": False},
    }


def shrink(config: RunConfig, layout: Layout) -> RunConfig:
    """A small float64 run for ``layout`` on a laptop, with the model features and training settings of ``config``.

    The recipe's own ``pipeline_split`` is kept if it has as many stages as ``layout`` (`kept_split`). Raises UserError if
    its layers then do not add up to the model's.
    """
    parallel = config.parallel
    split = kept_split(config, layout)
    if split and sum(split) != config.model.num_hidden_layers:
        raise UserError(
            f"parallel.pipeline_split {list(split)} has {counted(sum(split), 'layer')} but model.num_hidden_layers is "
            f"{config.model.num_hidden_layers}: give numbers with that sum, or leave it out"
        )
    micro_batches, context = max(2, 2 * layout.pp), _context(config, layout)
    model = _smaller(config, layout, context, _stages(config, layout), bool(split))
    sequence = 4 * layout.tp * layout.cp
    if config.objective.kind != "likelihood":
        sequence *= math.ceil(LEAST_LENGTH / sequence)
    values = _settings(model, layout, micro_batches, 2, sequence)
    values["seed"] = config.seed
    values["training"]["recompute"] = config.training.recompute
    values["optimizer"] |= {key: getattr(config.optimizer, key) for key in ("beta1", "beta2", "weight_decay")}
    values["balance"] = config.balance.model_dump()
    values["objective"] = config.objective.model_dump()
    # Large coefficients: at 0.001 an error in this gradient would stay below the tolerance.
    for key in ("coefficient", "z_loss_coefficient"):
        if values["balance"][key]:
            values["balance"][key] = 0.1
    values["data"]["respect_document_boundaries"] = config.data.respect_document_boundaries
    values["parallel"] = layout_overrides(layout, parallel.schedule, parallel.stages_per_rank) | {
        **context,
        "sharding": parallel.sharding,
        "gradient_reduction": parallel.gradient_reduction,
        "pipeline_split": list(split),
        "ep_overlap": parallel.ep_overlap and splits_experts(layout),
    }
    return parse_config(values, "the shrunk recipe")


class Case(NamedTuple):
    """A case to verify: a small run, its layout, and whether it minimizes the probe."""

    config: RunConfig
    layout: Layout
    probe: bool = False


def draw(seed: int, index: int, max_ranks: int, objective: str = "likelihood") -> Case:
    """Case ``index`` of a fuzz run: a legal layout of 2 to ``max_ranks`` processes and a model with random features. Of an
    objective of post-training, its settings are drawn too. Of ``likelihood``, some cases minimize the probe instead."""
    rng = random.Random(f"{seed}/{index}")
    layout, family = _draw_layout(rng, max_ranks)
    schedule, per_rank = _draw_schedule(rng, layout.pp)
    stages = layout.pp * per_rank if layout.pp > 1 else 1
    layers = rng.randint(max(1, stages), max(1, stages) + 2)
    kind, ulysses = _draw_context(rng, layout.cp)
    model, balance = _draw_model(rng, layout, family, layers, _exchanged(kind, ulysses, layout.cp))
    micro_batches = {"dualpipev": 2 * layout.pp}.get(schedule, layout.pp) * rng.choice([1, 2])
    micro_batches += rng.choice([0, 1]) if schedule != "interleaved_1f1b" else 0
    few = random.Random(f"{seed}/{index}/few")
    if layout.pp > 1 and schedule in ("interleaved_1f1b", "zbv") and few.random() < 0.3:
        micro_batches = few.randint(1, 2 * layout.pp - 1)
    rows, length = rng.choice([1, 2]), _draw_length(rng, layout)
    more = random.Random(f"{seed}/{index}/{objective}")
    if objective != "likelihood":
        unit = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        length = unit * math.ceil(more.randint(LEAST_LENGTH, 2 * LEAST_LENGTH) / unit)
    values = _settings(model, layout, micro_batches, rows, length)
    values["objective"] = _draw_objective(more, objective)
    values["seed"] = rng.randint(0, 10**6)
    values["balance"] = balance
    values["optimizer"]["clip_grad_norm"] = rng.choice([0.0, 0.5])
    values["training"]["recompute"] = rng.choice(["none", "selective", "full"])
    documents = rng.random() < 0.3  # conversations and pairs are always documents of their own
    values["data"]["respect_document_boundaries"] = documents and objective == "likelihood"
    values["parallel"] = layout_overrides(layout, schedule, per_rank if schedule == "interleaved_1f1b" else 0)
    values["parallel"] |= {"cp_kind": kind, "cp_ulysses": ulysses}
    shardings = ["zero2"] if schedule in V_SHAPED else ["zero2", "zero3"]  # see ParallelConfig
    values["parallel"]["sharding"] = rng.choice(shardings)
    values["parallel"]["gradient_reduction"] = random.Random(f"{seed}/{index}/reduction").choice(["last", "every"])
    if stages > 1 and rng.random() < 0.3:
        cuts = sorted(rng.sample(range(1, layers), stages - 1))
        values["parallel"]["pipeline_split"] = [b - a for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]
    if splits_experts(layout) and rows % 2 == 0:
        values["parallel"]["ep_overlap"] = random.Random(f"{seed}/{index}/ep_overlap").random() < 0.5
    probe = rng.random() < 0.3 and objective == "likelihood"
    return Case(parse_config(values, f"case {index} of seed {seed}"), layout, probe)


def _draw_objective(rng: random.Random, kind: str) -> dict[str, Any]:
    """The ``objective`` section, with random settings of its kind."""
    loss = rng.choice(["sigmoid", "sigmoid", "ipo"])
    preference = {
        "loss": loss,
        "beta": rng.choice([0.1, 1.0]),
        "label_smoothing": rng.choice([0.0, 0.1]) if loss == "sigmoid" else 0.0,
        "length_normalized": rng.random() < 0.3,
        "sft_weight": rng.choice([0.0, 0.5]),
    }
    kl, normalization = rng.choice(get_args(KL)), rng.choice(get_args(Normalization))
    policy = {
        "ratio": rng.choice(get_args(Ratio)),
        "clip_high": rng.choice([0.2, 0.4]),
        "kl": kl,
        "kl_coefficient": 0.0 if kl == "none" else 0.1,
        "normalization": normalization,
        "longest": 40 if normalization == "dr_grpo" else 0,
    }
    if kind == "reward_model":
        names = ("helpful", "concise", "truthful")[: rng.randint(1, 3)]
        weights = tuple(rng.choice([0.5, 1.0, 2.0]) for _ in names)
        return {
            "kind": kind,
            "reward": {"criteria": names, "weights": weights, "center": rng.choice([0.0, 0.1])},
        }
    return {"kind": kind} | {"dpo": {"preference": preference}, "grpo": {"policy": policy}}.get(kind, {})


def _draw_layout(rng: random.Random, max_ranks: int) -> tuple[Layout, str]:
    """A layout and a model family that it can split."""
    while True:
        tp, pp, dp, cp = (
            rng.choice([1, 1, 2, 2, 3, 4]),
            rng.choice([1, 1, 2, 2, 3, 4]),
            rng.choice([1, 1, 2, 2, 3, 4, 6, 8]),
            rng.choice([1, 1, 2, 2, 3, 4, 6, 8]),
        )
        if 2 <= tp * pp * dp * cp <= max_ranks:
            break
    stage = tp * dp * cp
    by_kind = {moe: [name for name, row in FAMILIES.items() if row.moe == moe] for moe in (True, False)}
    family = rng.choice([name for name in by_kind[True] for _ in range(2)] + by_kind[False])  # MoE twice as often
    if not FAMILIES[family].moe:
        return Layout(pp=pp, dp=dp, cp=cp, tp=tp), family
    ep = rng.choice([d for d in range(1, stage + 1) if stage % d == 0])
    etp = rng.choice([d for d in range(1, stage // ep + 1) if (stage // ep) % d == 0])
    return Layout(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, etp=etp), family


def _draw_schedule(rng: random.Random, pp: int) -> tuple[str, int]:
    """A schedule and its stages per rank."""
    schedules = ["1f1b", "interleaved_1f1b", *(V_SHAPED if splits_backward() else ())]
    schedule = rng.choice(schedules) if pp > 1 else "1f1b"
    return schedule, {"1f1b": 1, "interleaved_1f1b": rng.choice([2, 3])}.get(schedule, 2)


def _draw_context(rng: random.Random, cp: int) -> tuple[str, int]:
    """``parallel.cp_kind`` and ``cp_ulysses``."""
    kind = rng.choice(["ring", "all_gather", "ulysses", "auto"])
    within = [degree for degree in range(2, cp) if cp % degree == 0]
    return kind, rng.choice(within) if within and kind in ("ring", "all_gather") and rng.random() < 0.6 else 1


def _draw_length(rng: random.Random, layout: Layout) -> int:
    """A sequence length that ``layout`` divides."""
    if layout.cp > 1:
        return 2 * layout.cp * layout.tp * rng.randint(1, 3)
    return layout.tp * rng.randint(2, 5)


def _draw_model(
    rng: random.Random, layout: Layout, family: str, layers: int, exchanged: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a model that ``layout`` divides, and the settings of its load balancing. ``exchanged``: ranks that
    exchange tokens for heads."""
    tp, features = layout.tp, FAMILIES[family]
    if tp > 1 and rng.random() < 0.5:
        kv_heads = rng.choice([d for d in range(1, tp + 1) if tp % d == 0])
        heads = tp * rng.choice([1, 2])
    else:
        kv_heads = tp * rng.choice([1, 2])
        heads = kv_heads * rng.choice([1, 2])
    if exchanged > 1:
        if kv_heads > tp and exchanged % 2:
            kv_heads = tp
        heads = math.lcm(heads, kv_heads, tp * exchanged)
    model: dict[str, Any] = {
        "family": family,
        "vocab_size": rng.randint(max(8, tp), 70),
        "hidden_size": rng.choice([8, 12, 16]),
        "intermediate_size": tp * rng.randint(2, 6),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([2, 4, 6]),
        "rope_theta": rng.choice([1e4, 1e6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "initializer_range": 0.2,
    }
    if rng.random() < 0.2:
        model["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    if features.qkv_bias_key and not features.qkv_bias:
        model["qkv_bias"] = rng.random() < 0.5
    if not features.moe:
        return model, {}
    experts = layout.ep * rng.randint(1, 4)
    dense = [layer for layer in range(layers) if rng.random() < 0.3]
    model |= {
        "num_experts": experts,
        "num_experts_per_tok": rng.randint(1, min(4, experts)),
        "moe_intermediate_size": layout.etp * rng.randint(1, 4),
        "shared_expert_intermediate_size": tp * rng.randint(1, 4) if features.shared_expert else 0,
        "norm_topk_prob": rng.random() < 0.5,
        "mlp_only_layers": dense if len(dense) < layers else dense[1:],
    }
    scopes = ["none", "micro_batch", "sequence", "global_batch", "global_batch"] + ["huggingface"] * (layout.pp == 1)
    balance = {
        "scope": rng.choice(scopes),
        "coefficient": 0.1,
        "z_loss_coefficient": rng.choice([0.0, 0.01]),
        "bias_update_rate": rng.choice([0.0, 0.05]),
        "capacity_factor": rng.choice([0.0, 0.0, 0.75, 1.25]),
    }
    return model, balance


def drawn_value(name: str, shape: Sequence[int], seed: int) -> torch.Tensor | None:
    """A random value of a norm, bias or expert bias, which begin as ones and zeros: a rank that leaves one out or takes
    another's would not show. None for other tensors, which are drawn anyway."""
    centers = {"norm.weight": (1.0, 0.2), ".bias": (0.0, 0.2), "expert_bias": (0.0, 0.02)}
    for ending, (center, std) in centers.items():
        if name.endswith(ending):
            return center + std * torch.randn(tuple(shape), generator=named_generator(seed, name))
    return None


def global_batch(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    """The batch of one step, ``[global_batch_size, S]``: random tokens with uneven numbers of ignored labels, so that means
    and sums differ. Only the probe uses ``weights``. For an objective of post-training it is a `packed_batch`."""
    if config.objective.kind != "likelihood":
        return packed_batch(config, step)
    generator = torch.Generator().manual_seed(1000 * config.seed + step)
    rows, sequence = config.training.global_batch_size, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (rows, sequence + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(rows):
        labels[row, : row % min(5, sequence)] = IGNORE
    labels[list(empty_rows(config, step))] = IGNORE
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "weights": weights(labels, config.seed + step)}
    if config.data.respect_document_boundaries:
        ends = torch.rand(rows, sequence, generator=generator) < 0.3
        batch |= documents_of(ends)
    return batch
