"""Fills a sharded model with the weights of a Hugging Face directory, without converting it first."""

from pathlib import Path

import torch

from parallel.data import local
from qwen_moe.checkpoint.distributed import SCORE, WITHOUT_WEIGHTS, check_fields, has_own_head
from qwen_moe.checkpoint.finite import check_cast, check_finite
from qwen_moe.checkpoint.huggingface.convert import open_weights
from qwen_moe.config import ModelConfig
from qwen_moe.sharding.model import ParallelModel


@torch.no_grad()
def load_huggingface(directory: Path, model: ParallelModel, config: ModelConfig) -> ModelConfig:
    """Copy the weights of ``directory`` into this rank's shards of ``model``, one tensor at a time; biases of routers become
    0. Returns the config of ``directory``. Raises UserError if it is of another model; RoPE and the longest text may
    differ. A reward model may start from a language model, as in `load_weights`."""
    weights = open_weights(directory)
    own_head = has_own_head(weights.config, config)
    may_differ = WITHOUT_WEIGHTS if own_head else (*WITHOUT_WEIGHTS, "criteria")
    check_fields(weights.config.model_dump(mode="json"), config, str(directory), may_differ)
    for name, parameter in model.named_parameters():
        if name == SCORE and not own_head:
            continue
        stored = check_finite(name, weights.source.read(name), str(directory))
        for dim, (offset, size) in enumerate(zip(*model.range_of(name, parameter), strict=True)):
            stored = stored.narrow(dim, offset, size)
        check_cast(name, stored, local(parameter).copy_(stored))
    for _, buffer in model.named_buffers():
        buffer.zero_()
    return weights.config
