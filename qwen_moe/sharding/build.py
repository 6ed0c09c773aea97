"""Builds one rank's model: sharded stage modules wrapped by FSDP, initial values, and the engine that runs micro-batches
through them."""

from typing import Any

import torch

from parallel.data import shard
from parallel.kernels.transformer_engine import KernelsUnavailable
from parallel.mesh import Grids
from parallel.pipeline import Loss, MicroBatchShapes, Pipeline, Sequential
from parallel.sequence import SequenceShard
from parallel.stages import V_SHAPED, splits_backward, stages_of_rank
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.init import keep_statistics_dtypes
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.ops.dtypes import accumulation_dtype
from qwen_moe.sharding.context import ContextAttention
from qwen_moe.sharding.init import initialize
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.layout import RunLayout
from qwen_moe.sharding.model import ParallelModel, build_parts

# In fp8 only the operands of some matmuls are FP8; everything between them is bf16.
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def make_grids(config: RunConfig, layout: RunLayout, device: torch.device) -> Grids:
    """Create the process groups of ``layout``. All ranks must call it together."""
    return Grids(layout.layout, device.type, kv_heads=config.model.num_key_value_heads, cp_heads=layout.context.heads)


def shard_model(config: RunConfig, layout: RunLayout, grids: Grids) -> ParallelModel:
    """This rank's stage modules on the meta device (without storage), cut to its shards and wrapped by FSDP."""
    master, compute = DTYPES[config.precision.master], DTYPES[config.precision.compute]
    pipeline = config.parallel
    stages = (
        [0] if grids.pp.size == 1 else stages_of_rank(pipeline.schedule, grids.pp.size, layout.per_rank, grids.pp.index)
    )
    try:
        model = build_parts(
            config.model,
            grids,
            layout.layers,
            stages,
            recompute=config.training.recompute,
            dtype=master,
            kernels=choose_kernels(config, grids),
            plain_layers=config.precision.fp8.plain_layers(config.model.num_hidden_layers),
        )
    except KernelsUnavailable as error:
        raise UserError(str(error)) from None
    for part in model.parts:
        part.chunk_tokens = config.training.loss_chunk_tokens
        part.ep_overlap = pipeline.ep_overlap
        part.backward_in_halves = grids.pp.size > 1 and pipeline.schedule in V_SHAPED
        for module in part.modules():
            if isinstance(module, MoE):
                module.capacity_factor = config.balance.capacity_factor
            elif isinstance(module, Attention) and grids.cp.size > 1:
                module.attend = ContextAttention(layout.context.kind, grids.cp_outer, grids.cp_heads)
        units: list[tuple[Any, Any]] = []
        for layer in part.model.layers:
            if isinstance(layer.mlp, MoE):
                units.append((layer.mlp.experts, grids.expert_shard))
            units.append((layer, grids.dense_shard))
        shard(
            part,
            units,
            grids.dense_shard,
            compute_dtype=compute,
            reduce_dtype=torch.float64 if compute == torch.float64 else torch.float32,
            reshard_after_forward=pipeline.sharding == "zero3",
        )
    return model


def build_model(config: RunConfig, layout: RunLayout, grids: Grids, device: torch.device) -> ParallelModel:
    """`shard_model` with storage on ``device`` and initial values, which depend on names and the seed, not on the layout."""
    model = shard_model(config, layout, grids)
    for part in model.parts:
        part.to_empty(device=device)
        keep_statistics_dtypes(part)
    model.kernels.materialize(device)
    initialize(model, config.seed, config.model.initializer_range)
    return model


def build_engine(
    config: RunConfig, layout: RunLayout, model: ParallelModel, loss: Loss, device: torch.device
) -> Sequential | Pipeline:
    """The engine that runs micro-batches forward and backward through ``model``. ``loss`` takes the last stage's output."""
    engine = _engine(config, layout, model, loss, device)
    engine.reduce_every = config.parallel.gradient_reduction == "every"
    return engine


def _engine(
    config: RunConfig, layout: RunLayout, model: ParallelModel, loss: Loss, device: torch.device
) -> Sequential | Pipeline:
    if model.grids.pp.size == 1:
        return Sequential(model.parts[0], loss, keep_gathered=config.parallel.sharding != "zero3")
    schedule = config.parallel.schedule
    if schedule in V_SHAPED and not splits_backward():
        raise UserError(
            f"parallel.schedule {schedule} needs torch 2.13 or newer, and this is {torch.__version__}: use 1f1b or "
            "interleaved_1f1b, or a newer torch"
        )
    return Pipeline(
        dict(zip(model.stages, model.parts, strict=True)),
        model.num_stages,
        model.grids.pp,
        schedule,
        micro_batches=layout.micro_batches,
        shapes=_shapes(config, model),
        loss=loss,
        device=device,
    )


def _shapes(config: RunConfig, model: ParallelModel) -> MicroBatchShapes:
    sequence = SequenceShard.of(model.grids)
    rows, whole = config.training.micro_batch_size, config.data.sequence_length
    compute, tokens = DTYPES[config.precision.compute], (rows, sequence.length(whole))
    outputs: dict[str, tuple[int, ...]] = {
        "cross_entropy": (1,),
        "log_probs": tokens,
        "scores": (*tokens, len(config.model.criteria)),
    }
    with torch.device("meta"):
        return MicroBatchShapes(
            first=torch.empty(rows, whole // sequence.cp.size, dtype=torch.int64),
            hidden=torch.empty(*tokens, config.model.hidden_size, dtype=compute),
            output=torch.empty(outputs[model.parts[0].head], dtype=accumulation_dtype(compute)),
        )
