"""Attention in pieces: each piece is a range of queries with a range of keys, all visible or the lower triangle of a square.

Pieces of the same queries are merged by the logsumexp of their scores (arXiv 2112.05682), and backward of a piece from the
merged output and logsumexp gives exactly its share of the gradients (arXiv 2205.14135). So the keys may come in any order,
from other ranks too (arXiv 2310.01889), and what a query may not see costs nothing.

Shapes: B batch, S queries, T keys, H query heads, G key/value heads, C head dim. Outputs, sums and logsumexp are float32
(float64 for float64).
"""

from collections.abc import Iterable
from typing import Any

import torch

from parallel.gemm import widen
from qwen_moe.models.attention.mask import Piece
from qwen_moe.models.ops.dtypes import accumulation_dtype

_aten: Any = torch.ops.aten
_ROWS = 512  # queries whose scores exist at a time where no kernel is used


class _Seen:
    """Ranges of queries that have had a piece. Those of two pieces are the same or disjoint (see `pieces`)."""

    def __init__(self) -> None:
        self._ranges: set[tuple[int | None, int]] = set()

    def is_new(self, rows: slice, queries: slice) -> bool:
        """Whether this range has had none; from now on it has."""
        before = len(self._ranges)
        self._ranges.add((rows.start, queries.start))
        return len(self._ranges) > before


class Partial:
    """Attention to the keys so far: ``out [B, S, H, C]`` and its logsumexp ``lse [B, S, H]``, undefined for queries that
    have not seen a key yet."""

    def __init__(self, q: torch.Tensor) -> None:
        wide = accumulation_dtype(q.dtype)
        self.out = torch.empty(q.shape, dtype=wide, device=q.device)
        self.lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        self._seen = _Seen()

    def add(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Iterable[Piece], scale: float
    ) -> "Partial":
        """Include what ``pieces`` see of ``k, v [B, T, G, C]``."""
        q, k, v = widen(q), widen(k), widen(v)
        for rows, queries, keys, causal in pieces:
            out, lse = _forward(q[rows, queries], k[rows, keys], v[rows, keys], causal, scale)
            held, before = self.out[rows, queries], self.lse[rows, queries]
            if self._seen.is_new(rows, queries):
                held.copy_(out)
                before.copy_(lse)
                continue
            after = torch.logaddexp(before, lse)
            held.mul_((before - after).exp_().unsqueeze(-1))
            held.addcmul_(out.to(held.dtype), (lse - after).exp_().unsqueeze(-1))
            before.copy_(after)
        return self


class Gradients:
    """Sums of the gradients ``dq [B, S, H, C]`` and ``dk, dv [B, T, G, C]``, to which pieces are added. dq is undefined for
    queries without a piece."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        wide = accumulation_dtype(q.dtype)
        self._seen = _Seen()
        self.dq = torch.empty(q.shape, dtype=wide, device=q.device)
        self.dk = torch.zeros(k.shape, dtype=wide, device=k.device)
        self.dv = torch.zeros_like(self.dk)

    def add(
        self,
        dy: torch.Tensor,
        tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        pieces: Iterable[Piece],
        scale: float,
    ) -> "Gradients":
        """Include the share of ``pieces``. ``tensors``: q, k, v, and the merged output and lse."""
        q, k, v, out, dy = (widen(x) for x in (*tensors[:4], dy))
        lse = tensors[4]
        for rows, queries, keys, causal in pieces:
            dq, dk, dv = _backward(
                dy[rows, queries],
                (q[rows, queries], k[rows, keys], v[rows, keys], out[rows, queries], lse[rows, queries]),
                causal,
                scale,
            )
            held = self.dq[rows, queries]
            held.copy_(dq) if self._seen.is_new(rows, queries) else held.add_(dq)
            self.dk[rows, keys] += dk
            self.dv[rows, keys] += dv
        return self


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One piece: its output ``[B, S, H, C]`` and logsumexp ``[B, S, H]``. Every query sees a key."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, causal, scale=scale)
    elif _has_flash(q):
        k, v = _repeated(k, q), _repeated(v, q)
        out, lse = _aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, causal, scale=scale)[:2]
    else:
        return _plain_forward(q, k, v, causal, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _backward(
    dy: torch.Tensor, tensors: tuple[torch.Tensor, ...], causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one piece from the merged output and logsumexp. ``tensors``: q, k, v, out, lse."""
    q, k, v, out, lse = tensors
    if q.device.type == "cpu":
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(dy, q, k, v, out, lse), 0.0, causal, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in gradients)
    if _has_flash(q):
        heads = k.shape[2]
        k, v = _repeated(k, q), _repeated(v, q)
        unused = torch.zeros(2, dtype=torch.int64, device=q.device)  # the state of a dropout that is not there
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            *_heads_first(dy, q, k, v, out),
            lse.transpose(1, 2).contiguous(),
            *(None, None, q.shape[1], k.shape[1], 0.0, causal, unused, unused),
            scale=scale,
        )
        dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    return _plain_backward(dy, tensors, causal, scale)


def _heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _has_flash(q: torch.Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] in range(8, 257, 8)


def _repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A key/value head for each query head of ``q``."""
    return x.repeat_interleave(q.shape[2] // x.shape[2], 2)


def _scores(
    q: torch.Tensor, k: torch.Tensor, begin: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and their logsumexp of some queries, ``[B, H, S, T]`` and ``[B, H, S, 1]``; the first is number ``begin``."""
    wide = accumulation_dtype(q.dtype)
    scores = q.transpose(1, 2).to(wide) @ k.permute(0, 2, 3, 1).to(wide) * scale
    if causal:
        rows, columns = (
            torch.arange(begin, begin + q.shape[1], device=q.device),
            torch.arange(k.shape[1], device=q.device),
        )
        scores = scores.masked_fill(columns > rows[:, None], float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    return scores, lse


def _plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = _repeated(k, q), _repeated(v, q).transpose(1, 2).to(accumulation_dtype(q.dtype))
    outs, sums = [], []
    for begin in range(0, q.shape[1], _ROWS):
        scores, lse = _scores(q[:, begin : begin + _ROWS], keys, begin, causal, scale)
        outs.append((scores - lse).exp() @ values)
        sums.append(lse.squeeze(-1))
    return torch.cat(outs, 2).transpose(1, 2), torch.cat(sums, 2).transpose(1, 2)


def _plain_backward(
    dy: torch.Tensor, tensors: tuple[torch.Tensor, ...], causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, out, lse = tensors
    wide = accumulation_dtype(q.dtype)
    keys, values = _repeated(k, q), _repeated(v, q).transpose(1, 2).to(wide)
    dy, out = dy.transpose(1, 2).to(wide), out.transpose(1, 2).to(wide)
    dk = torch.zeros_like(values)
    dv = torch.zeros_like(values)
    dqs = []
    for begin in range(0, q.shape[1], _ROWS):
        rows = slice(begin, begin + _ROWS)
        scores, _ = _scores(q[:, rows], keys, begin, causal, scale)
        p = (scores - lse[:, rows].transpose(1, 2).unsqueeze(-1)).exp()
        delta = (dy[:, :, rows] * out[:, :, rows]).sum(-1, keepdim=True)
        ds = p * (dy[:, :, rows] @ values.transpose(2, 3) - delta) * scale
        dv += p.transpose(2, 3) @ dy[:, :, rows]
        dk += ds.transpose(2, 3) @ q[:, rows].transpose(1, 2).to(wide)
        dqs.append(ds @ keys.transpose(1, 2).to(wide))
    dk, dv = (x.unflatten(1, (k.shape[2], -1)).sum(2).transpose(1, 2) for x in (dk, dv))
    return torch.cat(dqs, 2).transpose(1, 2), dk, dv


class _PieceAttention(torch.autograd.Function):
    """Attention to keys that are all on this device. Saves q, k, v, the output and lse."""

    @staticmethod
    def forward(
        ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], scale: float
    ) -> torch.Tensor:
        found = Partial(q).add(q, k, v, pieces, scale)
        y = found.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, found.lse)
        ctx.pieces, ctx.scale = pieces, scale
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        q, k, v, y, lse = ctx.saved_tensors
        found = Gradients(q, k).add(grad_outputs[0], (q, k, v, y, lse), ctx.pieces, ctx.scale)
        return found.dq.to(q.dtype), found.dk.to(k.dtype), found.dv.to(v.dtype), None, None


def piece_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], scale: float
) -> torch.Tensor:
    """Attention of ``q [B, S, H, C]`` to what ``pieces`` see of ``k, v [B, T, G, C]``: ``[B, S, H, C]``. Every query
    must see a key. Query head h uses key/value head h // (H / G), and scores are multiplied by ``scale``."""
    return _PieceAttention.apply(q, k, v, pieces, scale)
