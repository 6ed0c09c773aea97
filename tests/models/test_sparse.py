"""Sparse prefill against attention with a mask made from the definition: which keys are seen, and what share they are."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.config import DualChunk
from qwen_moe.models.attention import sparse
from qwen_moe.models.attention.dual_chunk import DualChunkReader
from qwen_moe.models.attention.reader import PlainReader
from qwen_moe.models.attention.sparse import SMALLEST, SparsePrefill, SparseSettings
from qwen_moe.models.attention.turned import Turned, Zone
from qwen_moe.models.attention.vertical_slash import Budget, Lines, choose, line_scores, row_scores
from qwen_moe.models.rope import make_rope
from tests.models.test_dual_chunk import distance, explicit_scores, model
from tests.models.test_readers import masked, read, tensors

CHUNKS = DualChunk(chunk_size=60, local_size=16, original_max_position_embeddings=60)
PLAIN = DualChunk(chunk_size=4096, local_size=1)
ALL = Budget(10**6, 10**6)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_GATHERED", 0.0)


def prefill(**changes: Any) -> SparsePrefill:
    return SparsePrefill(SparseSettings(**({"threshold": 1, "choosing": 8, "rows": 32} | changes)))


def reader(chunks: DualChunk, of: SparsePrefill | None) -> Any:
    rope = make_rope(model())
    return PlainReader(rope, of) if chunks is PLAIN else DualChunkReader(rope, chunks, of)


def budgets(*of_heads: tuple[int, int]) -> tuple[tuple[Budget, ...], ...]:
    return (tuple(Budget(*of) for of in of_heads),)


@dataclass
class Seen:
    """What a prefill chose and measured, chunk after chunk and head after head."""

    lines: list[Lines | None]
    rows: list[list[int]]
    chosen: list[Any]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    held = Seen([], [], [])
    choose_, measure = SparsePrefill._choose, SparsePrefill._measure

    def chosen(*args: Any) -> Any:
        found = choose_(*args)
        held.lines.append(found.lines)
        held.chosen.append(found)
        return found

    def measured(*args: Any) -> Any:
        found = measure(*args)
        held.rows.append(found.rows)
        return found

    monkeypatch.setattr(SparsePrefill, "_choose", chosen)
    monkeypatch.setattr(SparsePrefill, "_measure", measured)
    return held


def blocks_of(begin: int, end: int, stride: int, rows: int) -> list[tuple[int, int]]:
    """Chunks of dual chunk attention, each cut into the fewest blocks of at most ``rows`` queries, as even as can be."""
    found = []
    while begin < end:
        stop = min(end, (begin // stride + 1) * stride)
        count = -(-(stop - begin) // rows)
        cuts = [begin + (stop - begin) * number // count for number in range(count + 1)]
        found += list(pairwise(cuts))
        begin = stop
    return found


def mask_of(lines: Lines, begin: int, end: int, stride: int, rows: int) -> torch.Tensor:
    """``[S, T]``: a query sees keys up to its own that are in its block or, before it, on a line of one of its queries."""
    columns, diagonals = set(lines.columns.tolist()), lines.diagonals.tolist()
    visible = torch.zeros(end - begin, end, dtype=torch.bool)
    for first, last in blocks_of(begin, end, stride, rows):
        before = {i - d for i in range(first, last) for d in diagonals} | columns
        index = torch.tensor(sorted(j for j in before if 0 <= j < first), dtype=torch.long)
        visible[first - begin : last - begin, index] = True
        visible[first - begin : last - begin, first:last] = torch.ones(last - first, last - first).tril().bool()
    return visible


@pytest.mark.parametrize("chunks", [PLAIN, CHUNKS])
@pytest.mark.parametrize("rows", [1, 7, 32, 1000])
def test_with_everything_selected_it_is_dense(never_dense: None, chunks: DualChunk, rows: int) -> None:
    q, k, v = tensors(190, 4, 2)
    dense = read(reader(chunks, None), [190], q, k, v)
    held = prefill(kept_share=None, budgets=budgets(*[ALL] * 4), rows=rows)
    for parts in ([190], [50, 90, 50], [100, 1, 89]):
        got = read(reader(chunks, held), parts, q, k, v)
        torch.testing.assert_close(got, dense, rtol=1e-12, atol=1e-12)
    layer = held.record.layer(0)
    assert layer.pairs == layer.dense_pairs and layer.mean == pytest.approx(1, abs=1e-12) and layer.dense_heads == 0


@pytest.mark.parametrize("chunks", [PLAIN, CHUNKS])
@pytest.mark.parametrize("rows", [5, 32, 64])
def test_it_attends_to_the_lines_and_says_which_share_they_are(
    never_dense: None, seen: Seen, chunks: DualChunk, rows: int
) -> None:
    """Output, counted pairs, and the mean and the worst share, by a mask of all queries and keys."""
    length, parts = 420, [220, 200]
    q, k, v = (3 * tensors(length, 4, 2)[0], *tensors(length, 4, 2)[1:])
    given_budgets = budgets((33, 101), (60, 104), (31, 130), (100, 110))
    held = prefill(kept_share=None, budgets=given_budgets, rows=rows, choosing=16)
    got = read(reader(chunks, held), parts, q, k, v)
    scores = explicit_scores(q, k, model(), chunks)
    values = v.repeat_interleave(2, 2)
    pairs, shares, begin = 0, [], 0
    for number, count in enumerate(parts):
        end = begin + count
        for head in range(4):
            lines = seen.lines[4 * number + head]
            assert lines is not None and (len(lines.columns), len(lines.diagonals)) == given_budgets[0][head]
            visible = mask_of(lines, begin, end, chunks.stride, rows)
            pairs += int(visible.sum())
            visible[-1] = True
            of = scores[head, begin:end, :end]
            p = of.masked_fill(~visible, float("-inf")).softmax(-1)
            torch.testing.assert_close(got[0, begin:end, head], p @ values[0, :end, head], rtol=1e-11, atol=1e-12)
            drawn = torch.tensor(seen.rows[4 * number + head])
            assert len(set(drawn.tolist())) == 16 and begin <= min(drawn) and max(drawn) < end - 16
            kept = (of.softmax(-1) * visible).sum(-1)[drawn - begin]
            torch.testing.assert_close(seen.chosen[4 * number + head].shares, kept, rtol=1e-11, atol=1e-12)
            shares.append(count * kept.mean().item())
        begin = end
    layer = held.record.layer(0)
    assert layer.pairs == pairs < 0.99 * layer.dense_pairs and layer.dense_pairs == 4 * length * (length + 1) // 2
    assert layer.mean == pytest.approx(sum(shares) / (4 * length), rel=1e-12)
    assert layer.worst == pytest.approx(min(chosen.shares.min().item() for chosen in seen.chosen), rel=1e-12)
    assert layer.choosing_pairs == 4 * (2 * 16 + 1) * (220 + 420) and (layer.sparse_heads, layer.dense_heads) == (8, 0)
    assert held.record.work == (pairs + layer.choosing_pairs) / layer.dense_pairs


@given(
    st.sets(st.integers(0, 59), min_size=1), st.sets(st.integers(0, 59), min_size=1), st.integers(0, 59),
    st.integers(1, 60),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_keys_of_a_block_are_those_on_its_lines_once(
    columns: set[int], diagonals: set[int], begin: int, rows: int
) -> None:
    lines = Lines(*(torch.tensor(sorted(of)) for of in (columns, diagonals)))
    end = begin + rows
    expected = {j for j in columns | {i - d for i in range(begin, end) for d in diagonals} if 0 <= j < begin}
    assert sorted(lines.keys_before(begin, end).tolist()) == sorted(expected)


@pytest.mark.parametrize("chunks", [PLAIN, CHUNKS])
def test_no_later_key_is_seen(never_dense: None, chunks: DualChunk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With given lines. (Which lines the last queries choose depends on the whole chunk.)"""
    lines = Lines(torch.arange(0, 300, 17), torch.arange(0, 300, 13))
    monkeypatch.setattr(sparse, "choose", lambda vertical, slash, budget: lines)
    q, k, v = tensors(300, 2, 1)
    held = reader(chunks, prefill(kept_share=None))
    before = read(held, [150, 150], q, k, v)
    for position in (40, 151, 200, 299):
        other_k, other_v = k.clone(), v.clone()
        other_k[:, position:] += 1
        other_v[:, position:] -= 1
        after = read(held, [150, 150], q, other_k, other_v)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def planted(
    length: int, columns: list[int], diagonals: list[int], dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k ``[T, C]`` whose scores (scale 1) are high at these columns and diagonals, and v."""
    generator = torch.Generator().manual_seed(1)
    code = torch.randn(length, dim, dtype=torch.float64, generator=generator)
    code /= code.norm(dim=-1, keepdim=True)
    sink = torch.zeros(dim, dtype=torch.float64)
    sink[0] = 1
    code[:, 0] = 0
    q = 20 * sink.repeat(length, 1)
    for offset in diagonals:
        q[offset:] += 20 * code[: length - offset]
    k = code.clone()
    k[columns] += sink
    return q, k, torch.randn(length, dim, dtype=torch.float64, generator=generator)


def one_head(x: torch.Tensor) -> torch.Tensor:
    return x[None, :, None]


def attend(
    of: SparsePrefill, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, begin: int = 0, layer: int = 0
) -> torch.Tensor:
    """Queries from ``begin`` on, of one head at no angle and scale 1."""
    end, count = len(q), of.settings.choosing
    turned = [Turned(begin, end, (Zone(one_head(q[begin:]), 0, end),))]
    last = [Turned(end - count, end, (Zone(one_head(q[end - count :]), 0, end),))]
    return of.attend(layer, turned, last, one_head(k), one_head(v), 1.0)[0, :, 0]


COLUMNS, DIAGONALS = [35, 200, 611, 900, 1203], [0, 105, 333, 334, 700]


def test_planted_lines_are_found(seen: Seen, never_dense: None) -> None:
    q, k, v = planted(1500, COLUMNS, DIAGONALS)
    attend(prefill(kept_share=None, budgets=budgets((30 + 5, 100 + 4)), choosing=64), q, k, v)
    lines = seen.lines[0]
    assert lines is not None
    assert set(lines.columns.tolist()) == set(range(30)) | set(COLUMNS)
    assert set(lines.diagonals.tolist()) == set(range(100)) | set(DIAGONALS)


def test_budgets_are_raised_until_the_share_is_kept(seen: Seen) -> None:
    columns = list(range(40, 2900, 13))
    q, k, v = planted(3000, columns, [])
    held = prefill(kept_share=0.95, choosing=32, rows=64)
    got = attend(held, q, k, v, begin=2000)
    layer, lines = held.record.layer(0), seen.lines[0]
    assert lines is not None and len(lines.columns) > len(columns) * 0.9 > SMALLEST.vertical
    assert len(lines.columns) < 30 + 256  # of the last doubling, a part is given back
    assert len(lines.diagonals) < 1.5 * SMALLEST.slash  # of no use here
    assert layer.mean >= 0.95 and held.record.work < 0.4
    smallest = prefill(kept_share=None, budgets=budgets(SMALLEST), choosing=32)
    attend(smallest, q, k, v, begin=2000)
    assert smallest.record.layer(0).mean < 0.6
    dense = masked(one_head(q), one_head(k) * q.shape[-1] ** 0.5, one_head(v))[0, 2000:, 0]
    assert ((got - dense).norm() / dense.norm()).item() < 0.3


@pytest.mark.parametrize(("share", "dense"), [(0.95, True), (0.3, False)])
def test_a_head_that_attends_to_everything_raises_its_budget_or_is_dense(share: float, dense: bool, seen: Seen) -> None:
    _, k, v = planted(2000, [], [])
    q = torch.zeros_like(k)
    held = prefill(kept_share=share)
    got = attend(held, q, k, v, begin=1000)
    layer, lines = held.record.layer(0), seen.lines[0]
    assert (layer.dense_heads, layer.sparse_heads) == ((1, 0) if dense else (0, 1))
    if dense:
        mean = v.cumsum(0)[1000:] / torch.arange(1001, 2001)[:, None]
        torch.testing.assert_close(got, mean, rtol=1e-12, atol=1e-12)
        assert layer.pairs == layer.dense_pairs and layer.mean == 1
    else:
        assert lines is not None and layer.mean >= share
        assert len(lines.columns) + len(lines.diagonals) > sum(SMALLEST)


@pytest.mark.parametrize("change", [{"threshold": 301}, {"choosing": 25}])
def test_short_texts_and_short_chunks_are_dense(change: dict[str, int]) -> None:
    q, k, v = tensors(300, 4, 2)
    held = prefill(**change)
    got = read(reader(PLAIN, held), [200, 100], q, k, v)
    torch.testing.assert_close(got[:, 200:], read(reader(PLAIN, None), [300], q, k, v)[:, 200:], rtol=1e-12, atol=1e-12)
    layer = held.record.layer(0)
    if "threshold" in change:
        assert layer.pairs == layer.dense_pairs == 4 * 300 * 301 // 2 and held.record.work == 1
        assert layer.mean == 1 and not layer.sparse_heads


def test_single_tokens_are_dense_and_not_counted() -> None:
    q, k, v = tensors(300, 2, 1)
    held = prefill(kept_share=None)
    got = read(reader(CHUNKS, held), [1] * 300, q, k, v)
    torch.testing.assert_close(got, read(reader(CHUNKS, None), [300], q, k, v), rtol=1e-12, atol=1e-12)
    assert not held.record.layers and held.record.work == 1


def continuous(i: int, j: int, chunk_size: int, local_size: int, clamp: str) -> int:
    s = chunk_size - local_size
    return i % s + {0: 0, 1: s}.get(i // s - j // s, chunk_size) - j % s


def test_lines_are_chosen_at_continuous_positions_and_measured_at_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(200, 2, 1)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(turned: Any, rows: torch.Tensor, *args: Any) -> torch.Tensor:
        scores = row_scores(turned, rows, *args)
        found.append((rows, scores.clone()))
        return scores

    monkeypatch.setattr(sparse, "row_scores", spy)
    read(reader(CHUNKS, prefill(choosing=20)), [200], q, k, v)
    for number, (rows, scores) in enumerate(found):
        chooses = number % 2 == 0
        expected = explicit_scores(q, k, model(), CHUNKS, continuous if chooses else distance)[number // 2]
        torch.testing.assert_close(scores, expected[rows], rtol=1e-11, atol=1e-11)
        assert not chooses or rows.tolist() == list(range(180, 200))  # 176 begins a chunk
    assert len(found) == 4


def test_scores_of_lines_are_sums_of_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 12, dtype=torch.float64, generator=generator)
    scores.masked_fill_(torch.arange(12) > torch.arange(7, 12)[:, None], float("-inf"))
    p = scores.softmax(-1)
    vertical, slash = line_scores(scores)
    torch.testing.assert_close(vertical, p.sum(0))
    by_diagonal = [sum(p[n, n + 7 - d].item() for n in range(5) if n + 7 >= d) for d in range(12)]
    torch.testing.assert_close(slash, torch.tensor(by_diagonal, dtype=torch.float64))
    lines = choose(vertical, slash, Budget(1, 1))
    assert lines.columns.tolist() == lines.diagonals.tolist() == list(range(12))  # the first 30 and the last 100


def test_heads_of_another_rank_choose_and_measure_as_in_the_whole_model(never_dense: None) -> None:
    q, k, v = tensors(300, 4, 2)
    of = budgets((33, 101), (60, 104), (31, 130), (100, 110))
    whole = prefill(kept_share=None, budgets=of)
    expected = read(reader(PLAIN, whole), [300], q, k, v)
    second = prefill(kept_share=None, budgets=of, first_head=2)
    got = read(reader(PLAIN, second), [300], q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])
    torch.testing.assert_close(got, expected[:, :, 2:], rtol=1e-12, atol=1e-13)
    first = prefill(kept_share=None, budgets=of)
    read(reader(PLAIN, first), [300], q[:, :, :2], k[:, :, :1], v[:, :, :1])
    layers = [held.record.layer(0) for held in (whole, first, second)]
    assert layers[0].kept == pytest.approx(layers[1].kept + layers[2].kept, rel=1e-12)


def test_published_budgets_where_none_are_given() -> None:
    assert SparseSettings(kept_share=None).budget(3, 5) == Budget(1000, 6096)
    assert SparseSettings().budget(3, 5) == SMALLEST


# A bug of a public project.
def test_lines_of_an_earlier_chunk_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """MInference #186: lines are chosen by the last queries of the prompt, which are not there when it is read in chunks.
    Each chunk has to choose its own: what matters changes with the text."""
    length, half = 2000, 1000
    q, k, v = planted(length, [], [])
    for number, columns in enumerate(
        (range(40, 90), range(110, 160))
    ):  # of the first chunk's queries, and of the second's
        q[half * number : half * (number + 1), 1] = 0
        q[half * number : half * (number + 1), 2] = 0
        q[half * number : half * (number + 1), 1 + number] = 20
        k[list(columns), 1 + number] += 1

    def share(begin: int, end: int) -> float:
        held = prefill(kept_share=None, budgets=budgets((80, 104)), choosing=32)
        attend(held, q[:end], k[:end], v[:end], begin=begin)
        return held.record.layer(0).mean

    assert share(0, half) > 0.9 and share(half, length) > 0.9
    chosen: list[Lines] = []

    def of_the_first(*args: Any) -> Lines:
        chosen.append(choose(*args))
        return chosen[0]

    monkeypatch.setattr(sparse, "choose", of_the_first)
    assert share(0, half) > 0.9 and share(half, length) < 0.5
