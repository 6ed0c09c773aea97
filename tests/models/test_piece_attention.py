"""Attention in pieces against attention with a mask of all queries and keys, and mistakes that only low precision shows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.models.attention.mask import Piece, Span, Visibility, pieces
from qwen_moe.models.ops import piece_attention as ops
from qwen_moe.models.ops.piece_attention import Partial, piece_attention

Documents = list[list[tuple[int, int]]]


def _intervals(cuts: set[int], length: int) -> list[tuple[int, int]]:
    return list(pairwise([0, *sorted(cut for cut in cuts if 0 < cut < length), length]))


@st.composite
def _problems(draw: Any, every_key: bool, longest: int = 24) -> tuple[Documents, tuple[Span, ...], tuple[Span, ...]]:
    """Documents of a few sequences, and which of their tokens two tensors hold, in any order. A span of keys is one or
    more of the spans that sequences are cut into for queries."""
    length = draw(st.integers(1, longest))
    cuts = st.sets(st.integers(1, longest), max_size=6)
    documents = [_intervals(draw(cuts), length) for _ in range(draw(st.integers(1, 3)))]
    coarse = draw(cuts)

    def spans(of: set[int], all_of_them: bool) -> tuple[Span, ...]:
        parts = draw(st.permutations(_intervals(of, length)))
        held, at = [], 0
        for begin, end in parts if all_of_them else parts[: draw(st.integers(1, len(parts)))]:
            held.append(Span(begin, end, at))
            at += end - begin
        return tuple(held)

    return documents, spans(coarse | draw(cuts), False), spans(coarse, every_key)


def _numbers(spans: Sequence[Span]) -> torch.Tensor:
    """The number in the sequence of each token of a tensor."""
    return torch.cat([torch.arange(span.begin, span.end) for span in sorted(spans, key=lambda span: span.at)])


def _starts(documents: Documents) -> torch.Tensor:
    return torch.stack([torch.cat([torch.full((b - a,), a) for a, b in row]) for row in documents])


def _sees(documents: Documents, queries: Sequence[Span], keys: Sequence[Span]) -> torch.Tensor:
    """``[rows, queries, keys]``: what a query sees, by the definition."""
    query, key = _numbers(queries), _numbers(keys)
    return (key <= query[:, None]) & (key >= _starts(documents)[:, query][:, :, None])


@given(_problems(every_key=False))
@settings(max_examples=300, deadline=None)
def test_pieces_are_every_visible_pair_once(problem: tuple[Documents, tuple[Span, ...], tuple[Span, ...]]) -> None:
    documents, queries, keys = problem
    sees = _sees(documents, queries, keys)
    times = torch.zeros(sees.shape, dtype=torch.int64)
    for rows, of_queries, of_keys, causal in pieces(documents, queries, keys):
        part = times[rows, of_queries, of_keys]
        assert part.numel() and (not causal or part.shape[1] == part.shape[2])
        part += torch.ones_like(part).tril() if causal else 1
    assert torch.equal(times, sees.long())


def test_documents_are_those_of_the_batch() -> None:
    documents = [[(0, 3), (3, 4), (4, 8)], [(0, 8)]]
    assert Visibility(starts=_starts(documents))._documents == documents


def _tensors(rows: int, spans: Any, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    lengths = [sum(span.end - span.begin for span in part) for part in spans]
    shapes = [(lengths[0], heads), (lengths[1], kv_heads), (lengths[1], kv_heads)]
    return [torch.randn(rows, *shape, dim, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scale: float) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * scale
    p = scores.masked_fill(~sees[:, None], torch.finfo(scores.dtype).min).softmax(-1) * sees[:, None]
    return torch.einsum("bhqk,bkhc->bqhc", p, v)


def _gradients(y: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((y.double() * weights).sum(), inputs)


@given(_problems(every_key=True), st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]), st.sampled_from([1, 4, 7]))
@settings(max_examples=60, deadline=None)
def test_they_attend_as_with_a_mask(problem: Any, heads: tuple[int, int], dim: int) -> None:
    documents, queries, keys = problem
    inputs = _tensors(len(documents), (queries, keys), *heads, dim)
    got = piece_attention(*inputs, pieces(documents, queries, keys), 0.3)
    expected = _masked(*inputs, _sees(documents, queries, keys), 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    for a, b in zip(_gradients(got, inputs), _gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_function() -> None:
    documents, spans = [[(0, 1), (1, 5)], [(0, 5)]], (Span(0, 5, 0),)
    inputs = _tensors(2, (spans, spans), 4, 2, 3)
    of = pieces(documents, spans, spans)
    assert torch.autograd.gradcheck(lambda q, k, v: piece_attention(q, k, v, of, 0.5), inputs)


LENGTH = 96
WHOLE = (Span(0, LENGTH, 0),)
PACKED: Documents = [[(0, 1), (1, 40), (40, LENGTH)]]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (1, 1)])
def test_without_a_kernel_the_result_is_the_same(causal: bool, heads: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(ops, "_ROWS", 20)  # rows at a time, the last of them fewer
    q, k, v = (x.detach() for x in _tensors(2, (WHOLE, WHOLE), *heads, 8))
    out, lse = ops._forward(q, k, v, causal, 0.3)
    for got, expected in zip(ops._plain_forward(q, k, v, causal, 0.3), (out, lse), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    dy = torch.randn_like(out)
    tensors = (q, k, v, out, lse)
    plain = ops._plain_backward(dy, tensors, causal, 0.3)
    for got, expected in zip(plain, ops._backward(dy, tensors, causal, 0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def _error(dtype: torch.dtype, of: Sequence[Piece], size: float = 1.0) -> list[float]:
    """The largest error of output, dq, dk and dv, against float64 with the same inputs; relative to the largest value."""
    q, k, v = (x.detach() for x in _tensors(1, (WHOLE, WHOLE), 4, 2, 16))
    inputs = [x.to(dtype).requires_grad_() for x in (q * size, k * size, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = piece_attention(*inputs, tuple(of), 0.25)
    expected = _masked(*exact, _sees(PACKED, WHOLE, WHOLE), 0.25)
    found = (got, *_gradients(got, inputs))
    wanted = (expected, *_gradients(expected, exact))
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True)]


def _in_parts(count: int) -> list[Piece]:
    """What `PACKED` sees, with the keys in ``count`` parts as a ring brings them."""
    size = LENGTH // count
    spans = [Span(part * size, (part + 1) * size, part * size) for part in range(count)]
    return [piece for key in reversed(spans) for piece in pieces(PACKED, spans, (key,))]


@pytest.mark.parametrize("parts", [1, 4, 32])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 1.2e-2)])
def test_low_precision_is_close_to_float64(dtype: torch.dtype, limit: float, parts: int) -> None:
    assert max(_error(dtype, _in_parts(parts))) < limit


@pytest.mark.parametrize("parts", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_of_ten_thousand_do_not_overflow(dtype: torch.dtype, parts: int) -> None:
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in _tensors(1, (WHOLE, WHOLE), 2, 1, 4))
    q, k = (torch.sign(x.detach()).mul(50).requires_grad_() for x in (q, k))  # scores are 0, or 5,000 or 10,000 apart
    y = piece_attention(q, k, v, tuple(_in_parts(parts)), 1.0)
    expected = _masked(q, k, v, _sees(PACKED, WHOLE, WHOLE), 1.0)
    # A logsumexp of 10,000 is rounded to 10,000 * eps, and a probability by that relative error.
    limit = 10_000 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=limit, atol=limit)
    dq, dk, dv = _gradients(y, (q, k, v))
    for got, wanted, size in zip((dq, dk, dv), _gradients(expected, (q, k, v)), (50, 50, 1), strict=True):
        torch.testing.assert_close(got, wanted, rtol=10 * limit, atol=10 * size * limit)


def test_keys_may_come_in_any_order() -> None:
    q, k, v = (x.detach() for x in _tensors(1, (WHOLE, WHOLE), 4, 2, 8))
    forth, back = (Partial(q).add(q, k, v, of, 0.3) for of in (_in_parts(8), _in_parts(8)[::-1]))
    torch.testing.assert_close(forth.out, back.out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(forth.lse, back.lse, rtol=1e-12, atol=1e-13)


# Bugs of public projects that float64 does not show.
def _rounding(parts: int) -> float:
    """The relative error of the output in bf16, over all elements."""
    q, k, v = (x.detach().bfloat16() for x in _tensors(1, (WHOLE, WHOLE), 4, 2, 16))
    y = piece_attention(q, k, v, tuple(_in_parts(parts)), 0.25)
    exact = _masked(q.double(), k.double(), v.double(), _sees(PACKED, WHOLE, WHOLE), 0.25)
    return float((y.double() - exact).norm() / exact.norm())


def test_partial_results_in_bf16_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """ring-flash-attention #42: partial results rounded to bf16, so that the error grows with the ring."""
    limit = 1.5 * _rounding(1)
    assert _rounding(96) < limit
    original = Partial.add

    def add(partial: Partial, *args: Any) -> Partial:
        for piece in args[3]:
            original(partial, *args[:3], [piece], args[4])
            partial.out = partial.out.bfloat16().float()
        return partial

    monkeypatch.setattr(Partial, "add", add)
    assert _rounding(96) > limit


def test_a_sum_of_exponentials_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """EasyContext #14: partial results merged by exp(lse), which overflows."""

    def logaddexp(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() + b.exp()).log()

    monkeypatch.setattr(torch, "logaddexp", logaddexp)
    with pytest.raises(AssertionError):
        test_scores_of_ten_thousand_do_not_overflow(torch.float32, 32)
