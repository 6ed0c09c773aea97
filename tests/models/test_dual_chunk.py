"""Dual chunk attention against a matrix of relative positions, made from the definition, in float64."""

import math
from typing import Any

import pytest
import torch

from qwen_moe.config import DualChunk, ModelConfig
from qwen_moe.models.attention import dual_chunk
from qwen_moe.models.attention.dual_chunk import DualChunkReader
from qwen_moe.models.attention.reader import PlainReader
from qwen_moe.models.ops import piece_attention
from qwen_moe.models.rope import make_rope
from tests.models.test_readers import HEADS, YARN, read, tensors
from tests.small import small_model

# chunk_size, local_size: the report's figure; s = 1; local_size above s (by a little and by a lot); equal to s.
SHAPES = [(8, 3), (8, 7), (8, 5), (12, 10), (8, 4), (13, 2)]


def distance(i: int, j: int, chunk_size: int, local_size: int, clamp: str = "trained") -> int:
    """The relative position of query i and key j, as the paper defines it."""
    s = chunk_size - local_size
    largest = chunk_size - 1 if clamp == "trained" else chunk_size
    chunks = i // s - j // s
    query = {0: i % s, 1: min(i % s + s, largest)}.get(chunks, min(2 * s - 1, largest))
    return query - j % s


def explicit_scores(
    q: torch.Tensor, k: torch.Tensor, config: ModelConfig, of: DualChunk, relative: Any = distance
) -> torch.Tensor:
    """A matrix ``[H, S, S]`` of scores Re(q conj(k) e^(i w d)) of pairs (c, c + C/2) at distance d; -inf for later keys."""
    length, half = q.shape[1], q.shape[-1] // 2
    distances = torch.tensor(
        [[relative(i, j, of.chunk_size, of.local_size, of.clamp) for j in range(length)] for i in range(length)]
    )
    rope = make_rope(config)
    frequencies = rope.frequencies()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    query, key = (torch.complex(x[0, ..., :half], x[0, ..., half:]) for x in (q, k))
    scores = torch.zeros(q.shape[2], length, length, dtype=torch.float64)
    for pair in range(half):
        phases = torch.polar(torch.ones(1, dtype=torch.float64), distances * frequencies[pair])
        scores += torch.einsum("ih,jh,ij->hij", query[..., pair], key[..., pair].conj(), phases).real
    scores *= rope.score_factor / math.sqrt(q.shape[-1])
    if of.original_max_position_embeddings is not None:
        for i in range(length):
            scores[:, i] *= max(1.0, 0.1 * math.log((i + 1) / of.original_max_position_embeddings) + 1) ** 2
    return scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: ModelConfig, of: DualChunk) -> torch.Tensor:
    scores = explicit_scores(q, k, config, of)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("hij,jhc->ihc", scores.softmax(-1), v[0])[None]


def model(dim: int = 8, **changes: Any) -> ModelConfig:
    return small_model(head_dim=dim, max_position_embeddings=64, rope_theta=100.0, **changes)


def reader(of: DualChunk, **changes: Any) -> DualChunkReader:
    return DualChunkReader(make_rope(model(**changes)), of)


def test_the_definition_gives_the_figure_of_the_report() -> None:
    """Figure 2 of arXiv 2501.15383, chunk_size 8 and local_size 3."""
    assert [distance(8, j, 8, 3) for j in range(9)] == [7, 6, 5, 4, 3, 3, 2, 1, 0]
    assert [distance(8, j, 8, 3, "code") for j in range(9)] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert [distance(11, j, 8, 3) for j in range(12)] == [7, 6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("clamp", ["trained", "code"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("heads", HEADS)
def test_it_is_attention_at_these_distances(heads: tuple[int, int], shape: tuple[int, int], clamp: Any) -> None:
    of = DualChunk(chunk_size=shape[0], local_size=shape[1], clamp=clamp, original_max_position_embeddings=9)
    s = of.stride
    for length in sorted({1, 2, s - 1, s, s + 1, 2 * s - 1, 2 * s, 2 * s + 1, 3 * s, 3 * s + 1, 31} - {0}):
        q, k, v = tensors(length, *heads)
        got = read(reader(of), [length], q, k, v)
        torch.testing.assert_close(got, explicit(q, k, v, model(), of), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_of_a_prompt_and_single_tokens_read_as_the_whole(shape: tuple[int, int]) -> None:
    of = DualChunk(chunk_size=shape[0], local_size=shape[1], original_max_position_embeddings=5)
    q, k, v = tensors(37, 4, 2)
    whole = read(reader(of), [37], q, k, v)
    for chunks in ([1] * 37, [36, 1], [5, 1, 9, 20, 2], [3] * 12 + [1]):
        torch.testing.assert_close(read(reader(of), chunks, q, k, v), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_text_of_one_chunk_is_read_plainly(shape: tuple[int, int]) -> None:
    of = DualChunk(chunk_size=shape[0], local_size=shape[1])
    rope = make_rope(model())
    for length, same in ((of.plain_length, True), (of.plain_length + 1, False)):
        q, k, v = tensors(length, 4, 2)
        plain = read(PlainReader(rope), [length], q, k, v)
        equal = torch.allclose(read(reader(of), [length], q, k, v), plain, rtol=1e-12, atol=1e-12)
        assert equal == same, length
    assert of.plain_length == (of.chunk_size if of.local_size <= of.stride else 2 * of.stride)


def test_scaled_scores_begin_after_the_original_length() -> None:
    of = DualChunk(chunk_size=20, local_size=4, original_max_position_embeddings=11)
    q, k, v = tensors(12, 1, 1)
    plain = read(PlainReader(make_rope(model())), [12], q, k, v)
    got = read(reader(of), [12], q, k, v)
    torch.testing.assert_close(got[:, :11], plain[:, :11], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(got[:, 11], plain[:, 11], rtol=1e-6) and of.plain_length == 11


def test_it_reads_over_a_stretched_rope() -> None:
    of = DualChunk(chunk_size=8, local_size=3, original_max_position_embeddings=8)
    q, k, v = tensors(29, 4, 2)
    got = read(reader(of, rope_scaling=YARN), [17, 11, 1], q, k, v)
    expected = explicit(q, k, v, model(rope_scaling=YARN), of)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(expected, explicit(q, k, v, model(), of), rtol=1e-6)


def test_continuous_positions_grow_by_one_from_query_to_query() -> None:
    """Of a query and of a key s tokens earlier or more, both one later: the score is the same."""
    of = DualChunk(chunk_size=8, local_size=3)
    q, k, _ = (x[:, :1].expand(-1, 25, -1, -1) for x in tensors(25, 1, 1))
    held = reader(of)
    keys = held.keys(k, 0)
    scores = torch.full((25, 25), float("nan"), dtype=torch.float64)
    for part in held.turned(q, 0, continuous=True):
        for zone in part.zones:
            scores[part.begin : part.end, zone.begin : zone.end] = zone.q[0, :, 0] @ keys[0, zone.begin : zone.end, 0].T
    assert not scores[15:20].isnan()[:, :15].any()
    for offset in (5, 9, 14):  # the chunk before, and earlier ones
        line = torch.stack(
            [scores[i, i - offset] for i in range(15, 20) if i // 5 - (i - offset) // 5 == (offset + 4) // 5]
        )
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-12, atol=1e-12)


def test_no_key_is_widened_that_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without bf16 instructions widens keys: all of a cache for every few queries would cost more than attention."""
    given: list[int] = []
    monkeypatch.setattr(piece_attention, "widen", lambda x: (given.append(x.shape[1]), x)[1])
    of = DualChunk(chunk_size=8, local_size=3)
    q, k, v = tensors(40, 2, 1)
    reader(of).attend(0, q[:, 23:24], k, v, 23)
    assert sum(given) == 3 + 2 * 24  # one query for each kind of key; 24 keys and 24 values
    given.clear()
    reader(of).attend(0, q[:, 18:23], k, v, 18)
    # Queries 18 and 19 for four ranges of keys, 20 to 22 for three: none of theirs is before them in their chunk.
    assert sum(given) == 2 * 4 + 3 * 3 + 2 * (20 + 23)


# Bugs of public projects.
def test_a_clamp_one_too_large_is_seen() -> None:
    """ChunkLlama and vLLM #11844 clamp at chunk_size, a distance that was never trained, the paper at chunk_size - 1."""
    trained, code = (DualChunk(chunk_size=8, local_size=3, clamp=clamp) for clamp in ("trained", "code"))
    q, k, v = tensors(25, 2, 1)
    found = [read(reader(of), [25], q, k, v) for of in (trained, code)]
    torch.testing.assert_close(found[0], explicit(q, k, v, model(), trained), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(*found, rtol=1e-3)
    farthest = [
        max(distance(i, j, 8, 3, clamp) for i in range(25) for j in range(i + 1)) for clamp in ("trained", "code")
    ]
    assert farthest == [7, 8]


def test_keys_scaled_when_they_are_cached_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM #11844 multiplies keys by the f of the length at which they were cached, and queries by today's: decoding then
    differs from reading again."""
    of = DualChunk(chunk_size=8, local_size=3, original_max_position_embeddings=4)
    q, k, v = tensors(33, 2, 1)

    def differs() -> bool:
        chunks, again = (read(reader(of), chunks, q, k, v)[:, -1] for chunks in ([20] + [1] * 13, [33]))
        return not torch.allclose(chunks, again, rtol=1e-12, atol=1e-12)

    assert not differs()
    original_keys, f = DualChunkReader.keys, lambda length: max(1.0, 0.1 * math.log(length / 4) + 1)

    def keys(held: DualChunkReader, k: torch.Tensor, begin: int) -> torch.Tensor:
        return original_keys(held, k, begin) * f(begin + k.shape[1])

    def scaled(held: DualChunkReader, q: torch.Tensor, begin: int) -> torch.Tensor:
        return q * f(begin + q.shape[1])

    monkeypatch.setattr(dual_chunk.DualChunkReader, "keys", keys)
    monkeypatch.setattr(dual_chunk.DualChunkReader, "_scaled", scaled)
    assert differs()
