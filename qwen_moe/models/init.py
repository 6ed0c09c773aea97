"""Initial values: every parameter is drawn from a seed made of its name, so that the layout does not change the model."""

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator whose numbers depend on ``seed`` and ``name`` only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_value(
    name: str, shape: Sequence[int], seed: int, std: float, experts: tuple[int, int] | None = None
) -> torch.Tensor:
    """The float32 initial value of parameter ``name``: ones for norms, zeros for biases, normal(0, std) otherwise.

    Stacked experts ``[E, ...]`` are drawn one expert at a time, each from its own seed, so a rank draws only the experts
    that it holds: ``experts`` = (first, count), by default all.
    """
    if name.endswith("norm.weight"):
        return torch.ones(tuple(shape))
    if name.endswith(".bias"):
        return torch.zeros(tuple(shape))
    if ".experts." in name:
        first, count = experts if experts is not None else (0, shape[0])
        values = torch.empty(count, *shape[1:])
        for index in range(count):
            values[index].normal_(0, std, generator=named_generator(seed, f"{name}/{first + index}"))
        return values
    return torch.empty(tuple(shape)).normal_(0, std, generator=named_generator(seed, name))


@torch.no_grad()
def initialize_whole(model: nn.Module, seed: int, std: float) -> None:
    """Fill every parameter and buffer of a whole model, whose storage must exist."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, seed, std))
    for _, buffer in model.named_buffers():
        buffer.zero_()


def build_model(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DecoderLM:
    """A whole model on one device with its initial values, in ``dtype``."""
    with torch.device("meta"):
        model = DecoderLM(config)
    model = model.to(dtype).to_empty(device=device)
    keep_statistics_dtypes(model)
    initialize_whole(model, seed, config.initializer_range)
    return model


def keep_statistics_dtypes(model: nn.Module) -> None:
    """Undo a module-wide dtype change for the routers' expert biases, which stay float32."""
    for module in model.modules():
        if hasattr(module, "expert_bias"):
            module.expert_bias = module.expert_bias.to(torch.float32)
