"""Degrees that do not fit are refused by name; both grids cut the same ranks as documented."""

from typing import Any

import pytest

from parallel.mesh import Layout, LayoutError, layout_for, smallest_world
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("world", "degrees", "message"),
    [
        (6, {"tp": 4}, "6 processes are not a multiple of tp 4 x cp 1 x pp 1 = 4"),
        (8, {"pp": 2, "ep": 3}, r"8 processes / pp 2 = 4 per stage are not a multiple of ep 3 x etp 1 = 3: start 6"),
        (8, {"ep": 4, "etp": 4}, "8 per stage are not a multiple of ep 4 x etp 4 = 16: start 16"),
        (8, {"tp": 0}, "tp is 0"),
    ],
)
def test_what_does_not_fit_is_named(world: int, degrees: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        if 0 in degrees.values():
            Layout(**degrees)
        layout_for(world, **degrees)


def test_sizes() -> None:
    layout = layout_for(32, tp=4, pp=2, ep=8, etp=2)
    assert (layout.dp, layout.stage_size, layout.edp, layout.world_size) == (4, 16, 1, 32)
    assert smallest_world(2, tp=2, pp=2, ep=2) == 4 and smallest_world(1, pp=2, ep=3) == 6


def _members() -> dict[str, Any]:
    import torch.distributed as dist

    from parallel.mesh import Grids

    grids = Grids(Layout(pp=2, dp=2, tp=2, ep=2, etp=2), "cpu", kv_heads=1)
    axes = ["tp", "dp", "pp", "edp", "exchange", "stage", "kv", "kv_replica"]
    found: dict[str, Any] = {
        name: (axis.index, dist.get_process_group_ranks(axis.group))
        for name in axes
        if (axis := getattr(grids, name)).group is not None
    }
    return found | {"ep": grids.ep.index, "etp": grids.etp.index}


def test_groups_are_the_documented_ranks() -> None:
    """Rank = ((pp * dp + dp) * cp + cp) * tp + tp, and the same ranks of a stage as (edp, ep, etp)."""
    for rank, found in enumerate(run_distributed(_members, 8)):
        pp, dp, tp = rank // 4, rank // 2 % 2, rank % 2
        base = 4 * pp
        assert found["tp"] == (tp, [base + 2 * dp, base + 2 * dp + 1])
        assert found["dp"] == (dp, [base + tp, base + 2 + tp])
        assert found["pp"] == (pp, [rank % 4, rank % 4 + 4])
        assert found["stage"] == (rank % 4, [base, base + 1, base + 2, base + 3])
        assert found["exchange"] == (rank % 4, [base, base + 1, base + 2, base + 3])
        assert (found["ep"], found["etp"]) == (rank % 4 // 2, rank % 2)
        assert found["kv"] == (0, [rank]) and found["kv_replica"] == (tp, [base + 2 * dp, base + 2 * dp + 1])
