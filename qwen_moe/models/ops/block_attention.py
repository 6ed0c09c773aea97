"""Causal attention in blocks of queries, for CPUs; blocks above the diagonal are never computed.

As in FlashAttention (arXiv 2205.14135), the scores of a block exist only while they are used, and backward recomputes them
from each row's logsumexp. Blocks are large enough for fast GEMMs; torch's own CPU kernel reaches a fraction of their rate
(`benchmarks/README.md`). Scores are float32.

Shapes: B batch, S sequence, H query heads, G key/value heads, R = H / G, C head dim, N = B * G. The queries that share a
key/value head are rows of one GEMM: row s * R + r is query s of head g * R + r.
"""

from collections.abc import Iterator

import torch

from parallel.gemm import exact_bmm, has_tiles, widen, widens
from qwen_moe.models.ops.compiled import compiling, fused

SCORE_BYTES = 16 << 20  # limit for one block's scores over all heads computed together
# Torch's kernel, which keeps scores in its caches, is as fast for sequences of more tokens.
LONGEST = {torch.bfloat16: 1024, torch.float32: 512}
LONGEST_WITH_TILES = {torch.bfloat16: 512}


@fused
def _exponentials(
    products: torch.Tensor, scale: float, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(s - max) in ``like``'s dtype, the row maxima and the row sums, of scores s = scale * ``products``."""
    scores = products * scale
    top = scores.amax(-1, keepdim=True)
    p = (scores - top).exp()
    return p.to(like.dtype), top, p.sum(-1, keepdim=True)


@fused
def _score_gradients(
    products: torch.Tensor, scale: float, lse: torch.Tensor, dp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """p = exp(s - lse) and ds = p * (dp - sum over keys of p * dp), in dp's dtype, of scores s = scale * ``products``. The
    sum uses the rounded dp, not the sum of dy * y over C, so that a row of ds sums to zero."""
    p = (products * scale - lse).exp()
    wide = dp.to(p.dtype)
    return p.to(dp.dtype), (p * (wide - (p * wide).sum(-1, keepdim=True))).to(dp.dtype)


@fused
def _normalized(y: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``y [B, G, S, R, C] / total [B, G, S, R, 1]`` as ``[B, S, G, R, C]``."""
    return (y / total).to(y.dtype).transpose(1, 2).contiguous()


class _BlockAttention(torch.autograd.Function):
    """y = softmax(scale * q k^T) v below the diagonal, of ``q [B, S, H, C]`` and ``k, v [B, S, G, C]``.

    With p = exp(s - lse) and dp = dy v^T: ds = p * (dp - sum of p * dp), dv = p^T dy, dq = scale * ds k,
    dk = scale * ds^T q. Saves q, k, v and lse.
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        y, lse = (_forward_by_torch if _on_tiles(q) else _forward_in_blocks)(q, k, v, scale)
        ctx.save_for_backward(q, k, v, lse)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        q, k, v, lse = ctx.saved_tensors
        groups, scale = k.shape[2], ctx.scale
        rows_q, rows_k, rows_v, dy = (_rows(x, groups) for x in (q, k, v, grad_outputs[0]))
        dq = torch.empty_like(rows_q)
        dk = torch.zeros(rows_k.shape, dtype=torch.float32)
        dv = torch.zeros_like(dk)
        for heads, rows, end, products in _products(q, rows_q, rows_k):
            dp = torch.bmm(dy[heads, rows], rows_v[heads, :end].transpose(1, 2))
            p, ds = _score_gradients(products, scale, lse[heads, rows], dp)
            dq[heads, rows] = torch.bmm(ds, rows_k[heads, :end])
            dv[heads, :end] += torch.bmm(p.transpose(1, 2), dy[heads, rows])
            dk[heads, :end] += torch.bmm(ds.transpose(1, 2), rows_q[heads, rows])
        return _heads(dq.mul_(scale), q), _heads(dk.mul_(scale), k), _heads(dv, v), None


def _forward_in_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention ``[B, S, H, C]`` and each row's logsumexp ``[N, S * R, 1]``."""
    seq, groups = q.shape[1], k.shape[2]
    rows_q, rows_k, rows_v = (_rows(x, groups) for x in (q, k, v))
    y = torch.empty_like(rows_q)
    top = torch.empty(*rows_q.shape[:2], 1, dtype=torch.float32)
    total = torch.empty_like(top)
    for heads, rows, end, products in _products(q, rows_q, rows_k):
        p, top[heads, rows], total[heads, rows] = _exponentials(products, scale, q)
        y[heads, rows] = torch.bmm(p, rows_v[heads, :end])
    shape = (q.shape[0], groups, seq, q.shape[2] // groups)
    return _normalized(y.view(*shape, -1), total.view(*shape, 1)).flatten(2, 3), top.add_(total.log())


def _forward_by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_forward_in_blocks` by torch's kernel, which multiplies with AMX tiles, sums in float32 and gives the logsumexp."""
    repeats = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(repeats, 1) for x in (k, v))
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), keys, values, 0.0, True, attn_mask=None, scale=scale
    )
    return y.transpose(1, 2).contiguous(), _rows(lse.transpose(1, 2).unsqueeze(-1), k.shape[2])


def _on_tiles(q: torch.Tensor) -> bool:
    """Whether torch's kernel, forward, is several times faster than blocks. Its backward is not: it uses no tiles."""
    return q.dtype == torch.bfloat16 and has_tiles()


def _queries(q: torch.Tensor) -> int:
    """Of one block. Tiles multiply larger matrices faster."""
    return min(q.shape[1], 128 if _on_tiles(q) else 64)


def _rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, S, G * R, C] -> [N, S * R, C]``."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(x.shape[0] * groups, -1, x.shape[-1])


def _heads(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `_rows`, in the shape and dtype of ``like [B, S, H, C]``."""
    batch, seq, heads, dim = like.shape
    groups = rows.shape[0] // batch
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    out.view(batch, seq, groups, heads // groups, dim).copy_(rows.view(batch, groups, seq, -1, dim).transpose(1, 2))
    return out


def _products(
    q: torch.Tensor, rows_q: torch.Tensor, rows_k: torch.Tensor
) -> Iterator[tuple[slice, slice, int, torch.Tensor]]:
    """(heads, rows of queries, last query + 1, q k^T in float32 with -inf above the diagonal) of every block."""
    seq = q.shape[1]
    size, repeats = _queries(q), rows_q.shape[1] // seq
    wide_q, wide_k = rows_q.float(), rows_k.float().transpose(1, 2)
    mask = _mask(size, repeats)
    for heads, begin, end, rows in _blocks(rows_q.shape[0], seq, repeats, size):
        products = exact_bmm(wide_q[heads, rows], wide_k[heads, :, :end], q.dtype)
        products[:, :, begin:].add_(mask[: (end - begin) * repeats, : end - begin])
        yield heads, rows, end, products


def _blocks(n: int, seq: int, repeats: int, size: int) -> list[tuple[slice, int, int, slice]]:
    """(heads, first query, last query + 1, rows of these queries) of every block of ``size`` queries."""
    blocks = []
    for begin in range(0, seq, size):
        end = min(seq, begin + size)
        rows = slice(begin * repeats, end * repeats)
        most = max(1, SCORE_BYTES // (4 * (end - begin) * repeats * end))
        at_a_time = max(size for size in range(1, min(n, most) + 1) if n % size == 0)
        for first in range(0, n, at_a_time):
            blocks.append((slice(first, first + at_a_time), begin, end, rows))
    return blocks


def _mask(size: int, repeats: int) -> torch.Tensor:
    """``[size * R, size]``, added to the scores of ``size`` queries on the diagonal: 0 where attention is allowed, -inf
    elsewhere. For fewer queries, slice the top-left corner."""
    return torch.full((size, size), float("-inf")).triu_(1).repeat_interleave(repeats, 0)


def blocks_pay(q: torch.Tensor) -> bool:
    """Whether `block_attention` is faster than torch's kernel for ``q [B, S, H, C]`` (measured: `benchmarks/README.md`)."""
    dtype = torch.float32 if widens(q) else q.dtype
    longest = LONGEST_WITH_TILES if has_tiles() else LONGEST
    return q.device.type == "cpu" and compiling() and 1 < q.shape[1] <= longest.get(dtype, 0)


def block_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of ``q [B, S, H, C]`` to ``k, v [B, S, G, C]``: ``[B, S, H, C]``. Query head h uses key/value head
    h // (H / G), and scores are multiplied by ``scale``."""
    return _BlockAttention.apply(widen(q), widen(k), widen(v), scale).to(q.dtype)
