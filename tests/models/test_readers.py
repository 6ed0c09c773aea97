"""Readers of cached keys against attention with a mask of all queries and keys."""

import math

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.models.attention.reader import PlainReader, Reader
from qwen_moe.models.rope import make_rope
from tests.small import small_model

HEADS = [(1, 1), (4, 2), (3, 1)]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def tensors(length: int, heads: int, kv_heads: int, dim: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k without rotation and v of one sequence, in float64."""
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(1, length, n, dim, dtype=torch.float64, generator=generator) for n in (heads, kv_heads, kv_heads)
    )  # type: ignore[return-value]


def read(reader: Reader, chunks: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The sequence read in ``chunks``; the rest of the cache holds what must not be seen."""
    cached, begin, outs = torch.full_like(k, float("nan")), 0, []
    for count in chunks:
        end = begin + count
        cached[:, begin:end] = reader.keys(k[:, begin:end], begin)
        outs.append(reader.attend(0, q[:, begin:end], cached, v, begin))
        begin = end
    assert begin == k.shape[1]
    return torch.cat(outs, 1)


def rotated(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Complex rotation of pairs (i, i + C/2) by position x frequency, times the root of the score's factor."""
    rope = make_rope(config)
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * rope.frequencies()
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1) * math.sqrt(rope.score_factor)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal softmax attention over a matrix of scores."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("scaling", [None, YARN])
@pytest.mark.parametrize("heads", HEADS)
def test_plain_reading_in_chunks_is_causal_attention(heads: tuple[int, int], scaling: dict[str, object] | None) -> None:
    config = small_model(head_dim=8, max_position_embeddings=64, rope_scaling=scaling)
    q, k, v = tensors(41, *heads)
    expected = masked(rotated(q, config), rotated(k, config), v)
    for chunks in ([41], [1] * 41, [40, 1], [7, 20, 1, 1, 12]):
        got = read(PlainReader(make_rope(config)), chunks, q, k, v)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_tables_are_kept_for_a_bounded_number_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen_moe.models.attention.reader._KEPT", 12)
    monkeypatch.setattr("qwen_moe.models.attention.reader._LEAST", 4)
    config = small_model(head_dim=8)
    q, k, v = tensors(60, 2, 1)
    reader = PlainReader(make_rope(config))
    got = read(reader, [20, 8, 8] + [1] * 24, q, k, v)
    torch.testing.assert_close(got, masked(rotated(q, config), rotated(k, config), v), rtol=1e-12, atol=1e-13)
    assert [tables.cos.shape[1] for tables in reader._angles._kept.values()] == [1, 1, 1]


def test_bf16_reads_as_float64_within_its_rounding() -> None:
    config = small_model(head_dim=8)
    q, k, v = (x.bfloat16() for x in tensors(33, 4, 2))
    exact = masked(rotated(q.double(), config), rotated(k.double(), config), v.double())
    for chunks in ([33], [16, 16, 1]):
        got = read(PlainReader(make_rope(config)), chunks, q, k, v)
        assert got.dtype == torch.bfloat16
        assert ((got.double() - exact).norm() / exact.norm()).item() < 1e-2
