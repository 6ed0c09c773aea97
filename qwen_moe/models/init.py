"""Initial values: every parameter drawn from a seed made of its name, so that no layout changes the model."""

import hashlib

import torch
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(name: str, shape: torch.Size | tuple[int, ...], seed: int, std: float) -> torch.Tensor:
    """The float32 initial value of parameter ``name``: ones for norms, zeros for biases, normal(0, std) otherwise.

    Stacked experts ``[E, ...]`` are drawn one expert at a time, each from its own seed, so that a rank that holds some
    of them draws only those.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if ".experts." in name:
        experts = [
            torch.empty(tuple(shape)[1:]).normal_(0, std, generator=_generator(seed, f"{name}/{index}"))
            for index in range(shape[0])
        ]
        return torch.stack(experts)
    return torch.empty(shape).normal_(0, std, generator=_generator(seed, name))


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float) -> None:
    """Fill every parameter and buffer of a model whose storage exists, DTensor shards included."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in model.named_parameters():
        value = initial_value(name, parameter.shape, seed, std).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            # src_data_rank=None: every rank has drawn the same value, so nothing is sent.
            shard = distribute_tensor(
                value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
            parameter.to_local().copy_(shard.to_local())
        else:
            parameter.copy_(value)
    for _, buffer in model.named_buffers():
        buffer.zero_()


def build_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DecoderLM:
    """A whole model on one device with its initial values, in ``dtype``."""
    with torch.device("meta"):
        model = DecoderLM(config)
    model = model.to(dtype).to_empty(device=device)
    keep_statistics_dtypes(model)
    initialise(model, seed, config.initializer_range)
    return model


def keep_statistics_dtypes(model: nn.Module) -> None:
    """Undo a module-wide dtype change for the buffers that are statistics: the expert biases stay float32."""
    for module in model.modules():
        if hasattr(module, "expert_bias"):
            module.expert_bias = module.expert_bias.to(torch.float32)
