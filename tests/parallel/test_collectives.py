"""Reduce-scatter, in both ways, against a plain sum of what all ranks have."""

import pytest
import torch

from parallel import collectives
from parallel.mesh import Axis
from tests.distributed import run_distributed

N = 3


def _given(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers below 128: sums of three are exact in bfloat16, too."""
    return torch.randint(-40, 40, (2, 4 * N, 5), generator=torch.Generator().manual_seed(rank)).to(dtype)


def _scattered(own_part: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's result for the first dim, and for the second as a sequence."""
    collectives._adds_own_part = lambda x: own_part  # the process ends with the test
    rank = torch.distributed.get_rank()
    axis = Axis(name="test", size=N, index=rank, group=torch.distributed.group.WORLD)
    x = _given(rank, dtype)
    rows = x.flatten(0, 1)[: 2 * N].contiguous()
    return collectives.reduce_scatter(rows, axis), collectives.start_reduce_scatter_sequence(x, axis).wait()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("own_part", [True, False])
def test_reduce_scatter_is_the_sum_of_all_ranks(own_part: bool, dtype: torch.dtype) -> None:
    total = sum(_given(rank, torch.float64) for rank in range(N))
    assert isinstance(total, torch.Tensor)
    for rank, (rows, sequence) in enumerate(run_distributed(_scattered, N, own_part, dtype)):
        assert rows.dtype == sequence.dtype == dtype
        assert torch.equal(rows.double(), total.flatten(0, 1)[2 * rank : 2 * rank + 2])
        assert torch.equal(sequence.double(), total[:, 4 * rank : 4 * rank + 4])
