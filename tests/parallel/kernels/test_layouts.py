"""Tensor, data, expert and expert-tensor parallel FP8 layers against one process that has everything.

In float32 between the FP8 matmuls, so that nothing but order of summation differs. Sizes are whole blocks on every rank,
so that all recipes but ``current`` (whose scales are of the part at hand) scale the same values alike in any layout.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from parallel.kernels.interface import ExpertPart
from parallel.kernels.quantizer import Recipe
from parallel.kernels.torch_fp8 import TorchFp8
from parallel.mesh import Axis, Grids, Layout
from qwen_moe.models.ops.grouped_matmul import grouped_mm
from tests.distributed import run_distributed
from tests.parallel.kernels.providers import HYBRID, ONE

B, S, A, F, E, STEPS = 2, 128, 256, 256, 4, 3
COUNTS = [130, 0, 128, 70]
Tensors = dict[str, torch.Tensor]


def problem(step: int, stage: int) -> Tensors:
    """Everything of one step. Parts differ in size, and differently for every tensor, so that a missing one shows."""
    generator = torch.Generator().manual_seed(100 * stage + step)

    def draw(*shape: int) -> torch.Tensor:
        scale = torch.logspace(-1, 1, shape[-1]) * 3.0**stage * (1 + step)
        rows = torch.linspace(0.1, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
        return torch.randn(shape, generator=generator) * scale * rows

    rows = sum(COUNTS)
    return {
        "x": draw(B, S, A),
        "dz": draw(B, S, A) * 1e-5,
        "up": draw(F, A) * 0.1,
        "down": draw(A, F) * 0.1,
        "rows": draw(rows, A),
        "experts": draw(E, F, A) * 0.1,
        "drows": draw(rows, F) * 1e-5,
    }


def run(recipe: str, tp: Axis, group: Axis, pick: Callable[[Tensors], Tensors], part: ExpertPart, stage: int) -> Any:
    """Steps of up -> relu -> down and of grouped experts on what ``pick`` takes of each; the last step's tensors."""
    kernels = TorchFp8(tp, group, Recipe(name=recipe, hybrid=HYBRID[recipe]), keep_weights=True, grouped_mm=grouped_mm)  # type: ignore[arg-type]
    parent = nn.Module()
    parent.up = nn.Linear(A, F, bias=False, device="meta")
    parent.down = nn.Linear(F, A, bias=False, device="meta")
    project = kernels.column("block", parent, ["up"])
    kernels.row("block", parent, "down")
    matmul = kernels.grouped("experts", part)
    assert project is not None and matmul is not None
    kernels.materialize(torch.device("cpu"))
    counts = torch.tensor(COUNTS[part.first : part.first + part.count])
    for step in range(STEPS):
        own = pick(problem(step, stage))
        kernels.begin_step()
        leaves = {name: own[name].clone().requires_grad_() for name in ("x", "up", "down", "rows", "experts")}
        parent.up.weight, parent.down.weight = nn.Parameter(leaves["up"]), nn.Parameter(leaves["down"])
        (h,) = project(leaves["x"], parent.up)
        z = parent.down(torch.relu(h))
        y = matmul(leaves["rows"], leaves["experts"], counts)
        weights = [parent.up.weight, parent.down.weight]
        grads = torch.autograd.grad(
            [z, y], [leaves["x"], *weights, leaves["rows"], leaves["experts"]], [own["dz"], own["drows"]]
        )
        kernels.end_step()
    names = ("dx", "dup", "ddown", "drows", "dexperts")
    return {"z": z.detach(), "y": y.detach(), **dict(zip(names, grads, strict=True))}, kernels.state()


def rows_of(tensor: torch.Tensor, part: ExpertPart) -> torch.Tensor:
    start = sum(COUNTS[: part.first])
    return tensor[start : start + sum(COUNTS[part.first : part.first + part.count])]


def on_rank(recipe: str, layout: Layout, group: str) -> Any:
    grids = Grids(layout, "cpu")
    tp, dp, ep, etp = grids.tp, grids.dp, grids.ep, grids.etp
    part = ExpertPart(total=E, first=ep.index * E // ep.size, count=E // ep.size)

    def cut(tensor: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
        return tensor.chunk(axis.size, dim)[axis.index]

    def pick(whole: Tensors) -> Tensors:
        return {
            "x": cut(cut(whole["x"], 0, dp), 1, tp),
            "dz": cut(cut(whole["dz"], 0, dp), 1, tp),
            "up": cut(whole["up"], 0, tp),
            "down": cut(whole["down"], 1, tp),
            "rows": rows_of(whole["rows"], part),
            "experts": cut(whole["experts"][part.first : part.first + part.count], 1, etp),
            "drows": cut(rows_of(whole["drows"], part), 1, etp),
        }

    found, state = run(recipe, tp, getattr(grids, group), pick, part, grids.pp.index)
    for name in ("dup", "ddown"):
        dist.all_reduce(found[name], group=dp.group)
    places = {"pp": grids.pp, "dp": dp, "tp": tp, "ep": ep, "etp": etp}
    return {name: (axis.index, axis.size) for name, axis in places.items()}, found, state


def mistakes(recipe: str, layout: Layout, group: str = "stage") -> list[str]:
    """Tensors of any rank that are not the part of one process's that they should be."""
    reports = run_distributed(on_rank, layout.world_size, recipe, layout, group)
    whole = [
        run(recipe, ONE, ONE, lambda own: own, ExpertPart(total=E, first=0, count=E), stage)
        for stage in range(layout.pp)
    ]
    wrong = []
    for place, found, state in reports:
        expected, known = whole[place["pp"][0]]

        def cut(tensor: torch.Tensor, dim: int, axis: str, place: Any = place) -> torch.Tensor:
            index, size = place[axis]
            return tensor.chunk(size, dim)[index]

        ep, size = place["ep"]
        part = ExpertPart(total=E, first=ep * E // size, count=E // size)
        parts = {
            "z": cut(cut(expected["z"], 0, "dp"), 1, "tp"),
            "dx": cut(cut(expected["dx"], 0, "dp"), 1, "tp"),
            "dup": cut(expected["dup"], 0, "tp"),
            "ddown": cut(expected["ddown"], 1, "tp"),
            "y": cut(rows_of(expected["y"], part), 1, "etp"),
            "dexperts": cut(expected["dexperts"][part.first : part.first + part.count], 1, "etp"),
        }
        for name, value in parts.items():
            if float((found[name] - value).norm() / value.norm()) > 1e-5:
                wrong.append(name)
        wrong += [name for name, value in known.items() if not torch.allclose(state[name], value, rtol=1e-5, atol=0)]
        wrong += [name for name in known if name.endswith(("input.scale", "weight.scale")) and "down" not in name
                  and not torch.equal(state[name], known[name])]  # fmt: skip
    return sorted(set(wrong))


BOTH = Layout(tp=2, dp=2, ep=2, etp=2)
STAGES = Layout(pp=2, tp=2, ep=2)


@pytest.mark.parametrize("recipe", ["delayed", "blockwise", "mxfp8"])
def test_every_layout_is_one_process(recipe: str) -> None:
    assert mistakes(recipe, BOTH) == []


@pytest.mark.slow
def test_stages_share_nothing() -> None:
    assert mistakes("delayed", STAGES) == []


WRONG_RANKS = [
    (BOTH, "tp"),
    pytest.param(BOTH, "dp", marks=pytest.mark.slow),
    pytest.param(BOTH, "edp", marks=pytest.mark.slow),
    pytest.param(STAGES, "world", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "group"), WRONG_RANKS)
def test_largest_values_of_the_wrong_ranks_are_seen(layout: Layout, group: str) -> None:
    wrong = mistakes("delayed", layout, group)
    assert any(name.endswith(".scale") for name in wrong) and set(wrong) & {"z", "y", "dup", "dexperts"}, wrong
