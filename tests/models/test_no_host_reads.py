"""No layer waits for the device at ep = 1: forward and backward run on the meta device, where no value can be read.

There `.tolist()`, `.item()`, `int(tensor)`, `.cpu()`, boolean indexing and everything else whose result's size depends on
values raise, which on a GPU would be a silent wait of the host for all work in flight.
"""

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.block import MoE
from tests.small import small_model


def config(family: str) -> ModelConfig:
    return small_model(family, hidden_size=64, moe_intermediate_size=32)


def moe_step(dtype: torch.dtype, capacity_factor: float = 0.0) -> None:
    with torch.device("meta"):
        moe = MoE(config("qwen2_moe")).to(dtype)
        x = torch.empty(2, 16, 64, dtype=dtype, requires_grad=True)
    moe.capacity_factor = capacity_factor
    y, statistics = moe(x)
    (y.sum() + statistics.prob_sum.sum() + statistics.z_sum.sum()).backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


def test_an_moe_layer_reads_nothing() -> None:
    moe_step(torch.bfloat16)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_and_its_loss_read_nothing(family: str, recompute: bool) -> None:
    with torch.device("meta"):
        model = DecoderLM(config(family), recompute=recompute).to(torch.bfloat16)
        tokens = torch.zeros(2, 32, dtype=torch.int64)
    sums = model.loss_sums(tokens, tokens)
    sums.cross_entropy.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reads_are_found() -> None:
    """What is known to read: dropping by capacity counts what is kept, and float64 has no grouped product."""
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        moe_step(torch.bfloat16, capacity_factor=1.0)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        moe_step(torch.float64)
