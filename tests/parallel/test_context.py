"""The zigzag cut of a sequence and what moves its parts between ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.context import (
    chunks_of,
    gather_tokens_split_heads,
    join_chunks,
    own_chunks,
    split_chunks,
    split_tokens_gather_heads,
    start_shift,
)
from parallel.mesh import Axis, Grids, Layout
from parallel.sequence import SequenceShard
from tests.distributed import run_distributed


def _axis(size: int, index: int) -> Axis:
    return Axis("cp", size, index, None)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_the_parts_are_the_sequence(size: int, chunk: int, batch: int) -> None:
    x = torch.arange(batch * 2 * size * chunk).view(batch, -1)
    parts = [own_chunks(x, _axis(size, index)) for index in range(size)]
    assert torch.equal(join_chunks(torch.stack(parts)), x)
    assert torch.equal(split_chunks(x, size), torch.stack(parts))


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([(), (2,), (2, 3)]))
def test_join_and_split_are_inverse(size: int, chunk: int, rest: tuple[int, ...]) -> None:
    x = torch.randn(2, 2 * size * chunk, *rest)
    parts = split_chunks(x, size)
    assert parts.shape == (size, 2, 2 * chunk, *rest)
    assert torch.equal(join_chunks(parts), x)
    assert torch.equal(split_chunks(join_chunks(parts), size), parts)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_rank_has_an_early_and_a_late_chunk(size: int) -> None:
    held = [chunks_of(index, size) for index in range(size)]
    assert sorted(chunk for pair in held for chunk in pair) == list(range(2 * size))
    assert {sum(pair) for pair in held} == {2 * size - 1}


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_neighbours_together_hold_a_part_of_a_smaller_cut(outer: int, heads: int, chunk: int) -> None:
    x = torch.arange(2 * outer * heads * chunk)[None]
    size = outer * heads
    for index in range(outer):
        parts = [own_chunks(x, _axis(size, index * heads + i)) for i in range(heads)]
        expected = x if outer == 1 else own_chunks(x, _axis(outer, index))
        assert torch.equal(join_chunks(torch.stack(parts)), expected)


@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 2), st.data())
def test_segments_are_in_the_order_of_positions(cp: int, tp: int, chunk: int, data: st.DataObject) -> None:
    """`SequenceShard.earlier` counts what lies before a segment; its place is that of its first position."""
    index, column = data.draw(st.integers(0, cp - 1)), data.draw(st.integers(0, tp - 1))
    x = torch.arange(2 * cp * tp * chunk)[None]
    shard = SequenceShard(tp=_axis(tp, column), cp=_axis(cp, index))
    held = shard.held(own_chunks(x, shard.cp))
    for segment, tokens in enumerate(held.unflatten(1, (shard.segments, -1)).unbind(1)):
        assert torch.equal(tokens[0], torch.arange(chunk) + shard._place(index, column, segment) * chunk)


def _on_rank() -> None:
    n = torch.distributed.get_world_size()
    axis = Grids(Layout(cp=n), "cpu").cp
    torch.manual_seed(0)
    x = torch.randn(2, 4 * n, n, 3, 5, dtype=torch.float64)  # [B, S, n, H / n, C]
    mine = own_chunks(x, axis).requires_grad_()
    by_heads = gather_tokens_split_heads(mine, axis)
    assert torch.equal(by_heads, x[:, :, axis.index])
    back = split_tokens_gather_heads(by_heads, axis)
    assert torch.equal(back, mine)
    # The gradient of a sum over all ranks with weights known to all.
    weights = torch.randn_like(x)
    (by_heads * weights[:, :, axis.index]).sum().backward()
    assert mine.grad is not None and torch.equal(mine.grad, own_chunks(weights, axis))
    heads = x[:, :, axis.index].clone().requires_grad_()
    (split_tokens_gather_heads(heads, axis) * own_chunks(weights, axis)).sum().backward()
    assert heads.grad is not None and torch.equal(heads.grad, weights[:, :, axis.index])
    got = torch.full((2, 3), float(axis.index))
    for turn in range(1, n + 1):
        got = start_shift(got, axis).wait()
        assert bool((got == (axis.index - turn) % n).all())


@pytest.mark.parametrize("ranks", [2, 3])
def test_exchanges_between_ranks(ranks: int) -> None:
    run_distributed(_on_rank, ranks)
