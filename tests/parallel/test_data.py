"""Sums over ranks, the global norm and clipping, on real processes."""

import math
from typing import Any

import pytest
import torch

from parallel.data import clip_by_norm, global_norm
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
