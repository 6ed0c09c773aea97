"""Attention over cp ranks: each autograd function against one process and against finite differences, and the balance."""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.context import own_chunks
from parallel.mesh import Axis, Grids, Layout
from qwen_moe.data.samples import documents_of
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.sharding.context import ContextAttention, spans
from qwen_moe.verify.reference import plain_attention
from tests.distributed import run_distributed

ALONE = Axis("alone", 1, 0, None)
KINDS = ("ring", "all_gather", "ulysses")


def _core(kind: str, grids: Grids) -> ContextAttention:
    if kind == "ulysses":
        return ContextAttention("all_gather", ALONE, grids.cp)
    return ContextAttention("ring" if kind == "ring" else "all_gather", grids.cp, ALONE)


def _inputs(heads: tuple[int, int, int], length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Whole q, k, v and upstream gradient: heads, KV heads, head dim."""
    generator = torch.Generator().manual_seed(0)
    h, g, dim = heads
    return [torch.randn(2, length, n, dim, generator=generator, dtype=torch.float64).to(dtype) for n in (h, g, g, h)]


def _documents(length: int) -> Visibility:
    ends = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.2
    return Visibility(starts=documents_of(ends)["document_starts"])


def _against_one_process(kinds: tuple[str, ...], heads: tuple[int, int, int], dtype: torch.dtype) -> float:
    """The largest error of output and gradients, relative to the largest value, over all kinds."""
    n = dist.get_world_size()
    grids = Grids(Layout(cp=n), "cpu")
    length, worst = 6 * n, 0.0
    exact = [x.double().requires_grad_() for x in _inputs(heads, length, dtype)[:3]]
    upstream = _inputs(heads, length, dtype)[3]
    for visible in (Visibility(), _documents(length)):
        y = plain_attention(*exact, visible, 0.4)
        expected = [y, *torch.autograd.grad(y, exact, upstream.double())]
        for kind in kinds:
            mine = [own_chunks(x, grids.cp).requires_grad_() for x in _inputs(heads, length, dtype)[:3]]
            got = _core(kind, grids)(*mine, visible, 0.4)
            found = [got, *torch.autograd.grad(got, mine, own_chunks(upstream, grids.cp))]
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == dtype
                error = (a.double() - own_chunks(b.detach(), grids.cp)).abs().max() / b.detach().abs().max()
                worst = max(worst, error.item())
    return worst


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_every_kind_is_attention(ranks: int, dtype: torch.dtype, limit: float) -> None:
    for kinds, heads in ((KINDS, (6, 6, 4)), (KINDS, (6, 1, 3)), (("ring", "all_gather"), (1, 1, 4))):
        assert max(run_distributed(_against_one_process, ranks, kinds, heads, dtype)) < limit


def _finite_differences(kind: str) -> float:
    """The largest error of the analytic gradient: each element of each rank's q, k, v is moved on that rank alone, and the
    sum over ranks changes by what its gradient says."""
    grids = Grids(Layout(cp=2), "cpu")
    visible, core = _documents(8), _core(kind, grids)
    *whole, upstream = _inputs((2, 2, 1), 8)
    mine = [own_chunks(x, grids.cp).contiguous().requires_grad_() for x in whole]
    weights, step, worst = own_chunks(upstream, grids.cp), 1e-6, 0.0

    def value() -> torch.Tensor:
        total = (core(*mine, visible, 0.4) * weights).sum().detach()
        dist.all_reduce(total, group=grids.cp.group)
        return total

    analytic = torch.autograd.grad((core(*mine, visible, 0.4) * weights).sum(), mine)
    for rank in range(2):
        for x, gradient in zip(mine, analytic, strict=True):
            for element, slope in zip(x.detach().view(-1), gradient.reshape(-1), strict=True):
                here = grids.cp.index == rank
                element += step * here
                above = value()
                element -= 2 * step * here
                change = (above - value()) / (2 * step)
                element += step * here
                if here:
                    worst = max(worst, (change - slope).abs().item())
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_function(kind: str) -> None:
    assert max(run_distributed(_finite_differences, 2, kind)) < 1e-8


def _pairs(cp: int, length: int, visible: Visibility) -> list[int]:
    """Visible pairs of queries and keys of each rank, over all turns of the ring."""
    held = length // cp
    return [
        sum(
            sum(_count(piece, len(visible._documents) if piece.rows == slice(None) else 1) for piece in pieces)
            for pieces in (visible.pieces(spans(rank, cp, held), spans(other, cp, held)) for other in range(cp))
        )
        for rank in range(cp)
    ]


def _count(piece: Any, rows: int) -> int:
    queries, keys = (part.stop - part.start for part in (piece.queries, piece.keys))
    return rows * (queries * (queries + 1) // 2 if piece.causal else queries * keys)


@pytest.mark.parametrize("cp", [2, 3, 4, 8, 64])
def test_ranks_have_equal_work(cp: int) -> None:
    length = 48 * cp
    pairs = _pairs(cp, length, Visibility())
    assert len(set(pairs)) == 1 and sum(pairs) == length * (length + 1) // 2


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_documents_that_end_with_chunks_have_equal_work(cp: int) -> None:
    ends = torch.zeros(1, 48 * cp, dtype=torch.bool)
    ends[:, 23::24] = True
    assert len(set(_pairs(cp, 48 * cp, Visibility(starts=documents_of(ends)["document_starts"])))) == 1


@pytest.mark.parametrize("cp", [2, 4])
def test_no_work_is_done_twice_or_left_out(cp: int) -> None:
    rng = random.Random(cp)
    ends = torch.tensor([[rng.random() < 0.02 for _ in range(64 * cp)]])
    starts = documents_of(ends)["document_starts"]
    expected = (torch.arange(64 * cp) - starts + 1).sum().item()
    assert sum(_pairs(cp, 64 * cp, Visibility(starts=starts))) == expected


def _contiguous(index: int, size: int, held: int) -> Any:
    from qwen_moe.models.attention.mask import Span

    half = held // 2
    return Span(index * held, index * held + half, 0), Span(index * held + half, (index + 1) * held, half)


def test_an_unbalanced_cut_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """picotron and others cut a sequence into contiguous parts: the last rank of four does seven times the first's work."""
    import tests.sharding.test_context as here

    monkeypatch.setattr(here, "spans", _contiguous)
    pairs = _pairs(4, 192, Visibility())
    assert pairs[-1] > 6 * pairs[0]
