"""Delayed scaling against a plain loop over steps; what is kept within a step; recomputation."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.kernels.formats import E4M3, E5M2
from parallel.kernels.scaling import DelayedScaling
from parallel.kernels.torch_fp8 import TorchFp8
from tests.parallel.kernels.providers import ONE, RECIPES, provider


@pytest.mark.parametrize("most_recent", [False, True])
@pytest.mark.parametrize("margin", [0, 2])
def test_scales_follow_a_plain_loop_over_steps(most_recent: bool, margin: int) -> None:
    length = 3
    scaling = DelayedScaling(ONE, length, most_recent, margin)
    scaling.add("a", E4M3)
    scaling.add("b", E5M2, 2)
    scaling.materialize(torch.device("cpu"))
    # Each step's largest values of micro-batches; a zero and an infinity keep the scale, a peak leaves the window.
    steps = [
        [2.0, 3.0],
        [0.0, 0.0],
        [float("inf"), 1.0],
        [0.5, 0.25],
        [1e-30, 1e-20],
        [7.0, 100.0],
        [1.0],
        [1.0],
        [1.0],
        [4.0],
    ]
    seen: list[float] = []
    expected = 1.0
    for values in steps:
        scaling.begin_step()
        for value in values:
            assert scaling.scales("a").item() == expected, "the scale stays within a step"
            scaling.note("a", torch.tensor(value))
            scaling.note("a", torch.tensor(value))  # a recomputed forward notes it again
            scaling.note("b", torch.tensor([value * 2]), first=1)
        scaling.end_step()
        seen.append(max(values))
        amax = seen[-1] if most_recent else max(seen[-length:])
        if 0 < amax < float("inf"):
            expected = float((torch.tensor(448.0) / torch.tensor(amax)) / 2.0**margin)
        assert scaling.scales("a").item() == expected
    assert scaling.scales("b").tolist()[0] == 1.0, "an expert without rows keeps its scale"
    assert scaling.state()["b.amax_history"].tolist() == [[0, 0, 0], [8, 2, 2]]


def _block(kernels: TorchFp8) -> nn.Module:
    torch.manual_seed(0)
    parent = nn.Module()
    parent.up, parent.down = nn.Linear(64, 96), nn.Linear(96, 64)
    project = kernels.column("block", parent, ["up"])
    kernels.row("block", parent, "down")
    kernels.materialize(torch.device("cpu"))
    assert project is not None
    parent.run = lambda x: parent.down(torch.relu(project(x, parent.up)[0]))  # type: ignore[assignment]
    return parent.bfloat16()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("keep", [True, False])
def test_weights_are_rounded_once_a_step_and_anew_after_it(recipe: str, keep: bool) -> None:
    kernels = provider(recipe, keep_weights=keep)
    block, x = _block(kernels), torch.randn(8, 64).bfloat16()
    with torch.no_grad():
        kernels.begin_step()
        first = block.run(x)
        assert torch.equal(block.run(x), first)
        for weight in (block.up.weight, block.down.weight):
            weight.mul_(-1)
        assert torch.equal(block.run(x), first) == keep, "kept, or rounded again"
        kernels.end_step()
        outside = block.run(x)
        assert not torch.equal(outside, first), "nothing is kept for an evaluation"
        for weight in (block.up.weight, block.down.weight):
            weight.mul_(-2)  # loaded, or updated
        assert not torch.equal(block.run(x), outside)
        kernels.begin_step()
        block.run(x)
        assert bool(kernels.quantizer.kept) == keep


@pytest.mark.parametrize("recipe", RECIPES)
def test_recomputation_and_rounding_again_change_no_bit(recipe: str) -> None:
    """Plain, recomputed in backward, and with weights rounded at every use: outputs, gradients and state, over steps of two
    micro-batches whose values grow, so that a scale that moved within a step would show."""
    results = []
    for recomputed, keep in ((False, True), (True, True), (True, False)):
        kernels = provider(recipe, keep_weights=keep)
        block, found = _block(kernels), []
        for step in range(3):
            kernels.begin_step()
            for micro_batch in range(2):
                generator = torch.Generator().manual_seed(10 * step + micro_batch)
                x = (torch.randn(8, 64, generator=generator) * 4.0 ** (step + micro_batch)).bfloat16().requires_grad_()
                y = checkpoint(block.run, x, use_reentrant=False) if recomputed else block.run(x)
                y.square().sum().backward()
                found += [y.detach(), x.grad]
            kernels.end_step()
            found += [parameter.grad.clone() for parameter in block.parameters()]
            block.zero_grad()
        results.append(found + [value.clone() for value in kernels.state().values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
