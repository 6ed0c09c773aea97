"""Sums over ranks, the global norm and clipping, on real processes."""

import math
from typing import Any

import pytest
import torch

from parallel.data import _OneRank, clip_by_norm, global_norm
from parallel.mesh import Axis
from tests.distributed import run_distributed


def _sum_twice() -> tuple[list[int], list[int]]:
    import torch.distributed as dist

    from parallel.collectives import all_reduce_sum
    from parallel.mesh import Grids, Layout

    mine = torch.tensor([dist.get_rank() + 1, 10])
    total = all_reduce_sum(mine, Grids(Layout(dp=3), "cpu").dp)
    return mine.tolist(), total.tolist()


def test_a_sum_leaves_its_argument_alone() -> None:
    """An in-place all-reduce of a local count that is used again counts it twice."""
    for rank, (mine, total) in enumerate(run_distributed(_sum_twice, 3)):
        assert mine == [rank + 1, 10] and total == [6, 30]


def _norm_and_clip(dtype: torch.dtype) -> dict[str, Any]:
    """Shards of uneven size (5 rows on 2 ranks, 1 row on 2 ranks), gradients 1, 2, 3, ..."""
    import torch.distributed as dist

    from parallel.data import clip_by_norm, global_norm, local, shard
    from parallel.mesh import Grids, Layout

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(5, 3, dtype=dtype))
            self.b = torch.nn.Parameter(torch.zeros(1, 4, dtype=dtype))

        def forward(self) -> torch.Tensor:
            weights = torch.arange(1, 20, dtype=dtype)
            return (self.a.flatten() * weights[:15]).sum() + (self.b.flatten() * weights[15:]).sum()

    model = Two()
    device = torch.device("cpu")
    grids = Grids(Layout(dp=dist.get_world_size()), "cpu")
    shard(model, [], grids.dense_shard, compute_dtype=dtype, reduce_dtype=dtype, reshard_after_forward=True)
    model().backward()
    parameters = list(model.parameters())
    norm = float(global_norm(parameters, grids.world, device))
    clip_by_norm(parameters, norm, norm / 2)
    first = float(local(parameters[0].grad).flatten()[0])
    return {"norm": norm, "clipped": float(global_norm(parameters, grids.world, device)), "first": first}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_norm_counts_each_shard_once(world_size: int, dtype: torch.dtype) -> None:
    """Every rank does the same, so the summed gradient is world_size times 1, 2, ..., 19."""
    expected = world_size * math.sqrt(sum(n * n for n in range(1, 20)))
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    results = run_distributed(_norm_and_clip, world_size, dtype)
    for result in results:
        assert result["norm"] == pytest.approx(expected, rel=tolerance)
        assert result["clipped"] == pytest.approx(expected / 2, rel=tolerance)
    assert results[0]["first"] == pytest.approx(world_size / 2, rel=tolerance)


def test_a_rank_without_any_element_has_a_norm_of_zero() -> None:
    """FSDP leaves the last ranks nothing of a model whose parameters have fewer rows than there are ranks."""
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    alone = Axis("world", 1, 0, None)
    for parameters in ([], [empty]):
        assert float(global_norm(parameters, alone, torch.device("cpu"))) == 0
        clip_by_norm(parameters, 2.0, 1.0)


class _Product(torch.nn.Module):
    """Two parameters whose gradients are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(5, 3))
        self.b = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a.flatten() * x[:15]).sum() + (self.b * x[15:]).sum()


def _one_ranks_gradients() -> dict[str, Any]:
    """The gradients of one micro-batch and of two."""
    from parallel.data import local, shard
    from parallel.mesh import Grids, Layout

    model = _Product()
    shard(
        model,
        [],
        Grids(Layout(), "cpu").dense_shard,
        compute_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        reshard_after_forward=False,
    )
    x = torch.arange(1.0, 20, dtype=torch.bfloat16)

    def gradients() -> list[float]:
        found = torch.cat([local(p.grad).flatten() for p in model.parameters()])
        assert found.dtype == torch.float32
        return found.tolist()

    results: dict[str, Any] = {}
    model(x).backward()
    results["one"] = gradients()
    model(300 * x).backward()
    results["two"] = gradients()
    return results


def test_one_ranks_gradients_are_widened_and_added_in_float32() -> None:
    (found,) = run_distributed(_one_ranks_gradients, 1)
    values = torch.arange(1.0, 20)
    assert found["one"] == values.tolist()
    assert found["two"] == (values + (300 * values.bfloat16()).float()).tolist()


def test_one_ranks_buffer_is_the_sums_and_an_abandoned_one_is_forgotten() -> None:
    buffers = _OneRank()

    def ask() -> torch.Tensor:
        return buffers.allocate((4,), dtype=torch.float32, device=torch.device("cpu"))

    gradients = ask()
    assert ask() is gradients
    later = ask()
    assert later is not gradients
    del later  # the copy of the gradients to it failed
    gradients = ask()
    assert ask() is gradients
