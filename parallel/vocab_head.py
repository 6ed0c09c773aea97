"""Losses and log-probabilities over a vocabulary that is split over ranks.

Every chunk of rows is gathered from all ranks of the axis, and each rank computes its own columns of their logits. Three
values per row (maximum, sum of exponentials, the label's logit) are reduced over ranks. Results cover this rank's tokens
only, so that they add up over ranks like every other sum. Negative labels are ignored.
Shapes: B batch, S sequence, ``n`` the size of the axis, T tokens of this rank, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from parallel.collectives import all_gather_single, reduce_scatter
from parallel.gemm import wanted, widen
from parallel.mesh import Axis


class _Chunk(NamedTuple):
    """One chunk: R rows of each of the n ranks."""

    full: torch.Tensor  # [n R, D], hidden states, widened for matmuls
    logits: torch.Tensor  # [n R, V / n], this rank's columns, in the accumulation dtype
    valid: torch.Tensor  # [n R], label not negative
    mine: torch.Tensor  # [n R], valid and the label is among this rank's columns
    target: torch.Tensor  # [n R, 1], local column of the label, 0 where not ``mine``


def _gather(x_c: torch.Tensor, axis: Axis) -> torch.Tensor:
    full = x_c.new_empty(axis.size * x_c.shape[0], *x_c.shape[1:])
    all_gather_single(full, x_c.contiguous(), group=axis.group)
    return full


def _chunk(x_c: torch.Tensor, operand: torch.Tensor, labels_c: torch.Tensor, first: int, axis: Axis) -> _Chunk:
    wide = torch.float64 if x_c.dtype == torch.float64 else torch.float32
    full = widen(_gather(x_c, axis))
    logits = (full @ operand.T).to(x_c.dtype).to(wide)
    valid = labels_c >= 0
    local = labels_c - first
    mine = valid & (local >= 0) & (local < operand.shape[0])
    return _Chunk(full, logits, valid, mine, local.masked_fill(~mine, 0).unsqueeze(1))


def _row_statistics(c: _Chunk, axis: Axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row: exp(logits - max) ``[n R, V / n]``, its sum over all columns, the label's shifted logit, and the max."""
    top = c.logits.amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=axis.group)
    exponentials = c.logits.sub(top.unsqueeze(1)).exp_()
    sums = torch.stack([exponentials.sum(-1), c.logits.gather(1, c.target).squeeze(1) * c.mine])
    dist.all_reduce(sums, group=axis.group)
    return exponentials, sums[0], sums[1], top


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Sum over this rank's valid tokens of logsumexp(z) - z[label], z = x W^T with W's rows split over ranks.

    dz = softmax(z) - onehot, dx = reduce-scatter(dz W), dW = dz^T x, computed in forward while the chunk's logits exist.
    They are the gradients of the sum over all ranks' tokens.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, first: int, axis: Axis, chunk_tokens: int
    ) -> torch.Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        n, operand = axis.size, widen(weight)
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if need_weight else None
        step = max(1, chunk_tokens // n)
        for start in range(0, x.shape[0], step):
            rows = slice(start, start + step)
            c = _chunk(x[rows], operand, labels[:, rows].flatten(), first, axis)
            exponentials, sums, of_label, top = _row_statistics(c, axis)
            losses = (sums.log() + top - of_label) * c.valid
            total += losses.view(n, -1)[axis.index].sum(dtype=torch.float64)
            if not (need_x or need_weight):
                continue
            dz = exponentials.div_(sums.unsqueeze(1))
            dz.scatter_add_(1, c.target, -c.mine.to(wide).unsqueeze(1))
            dz = widen(dz.mul_(c.valid.unsqueeze(1)).to(x.dtype))
            if dx is not None:
                dx[rows] = reduce_scatter((dz @ operand).to(x.dtype), axis)
            if dweight is not None:
                dweight += dz.T @ c.full
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total.to(wide)

    @staticmethod
    def backward(
        ctx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        dx, dweight = ctx.saved_tensors
        need, scale = wanted(ctx), grad_outputs[0]
        dx = dx * scale.to(dx.dtype) if need[0] else None
        dweight = (dweight * scale).to(ctx.weight_dtype) if need[1] else None
        return dx, dweight, None, None, None, None


def vocab_parallel_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int, *, first: int, axis: Axis
) -> torch.Tensor:
    """Summed cross-entropy, in nats, of this rank's part of the sequence; a scalar in float32 (float64 for float64).

    ``x [B, S / n, D]``, ``weight [V / n, D]`` (rows ``first`` and following), ``labels [B, S]``, negative where a token is
    ignored. At most ``chunk_tokens`` rows of ``V / n`` logits exist on a rank at a time.
    """
    return _VocabParallelCrossEntropy.apply(x.flatten(0, 1), weight, _by_rank(labels, axis), first, axis, chunk_tokens)


class _VocabParallelLogProbs(torch.autograd.Function):
    """l_t = z_t[label_t] - logsumexp(z_t) of this rank's tokens, z = x W^T with W's rows split over ranks.

    backward gathers the upstream gradients and the hidden states and recomputes each chunk's logits:
    dz_t = g_t (onehot - softmax(z_t)), dx = reduce-scatter(dz W), dW = dz^T x.
    """

    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, first: int, axis: Axis, chunk_tokens: int
    ) -> torch.Tensor:
        n, operand = axis.size, widen(weight)
        step = max(1, chunk_tokens // n)
        log_probs, lse = [], []
        for start in range(0, x.shape[0], step):
            c = _chunk(x[start : start + step], operand, labels[:, start : start + step].flatten(), first, axis)
            _, total, of_label, top = _row_statistics(c, axis)
            lse.append(total.log() + top)
            log_probs.append(((of_label - lse[-1]) * c.valid).view(n, -1)[axis.index])
        ctx.save_for_backward(x, weight, labels, *lse)
        ctx.first, ctx.axis, ctx.step = first, axis, step
        return torch.cat(log_probs)

    @staticmethod
    def backward(
        ctx, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        x, weight, labels, *lse = ctx.saved_tensors
        axis, step, operand = ctx.axis, ctx.step, widen(weight)
        need = wanted(ctx)
        dx = torch.empty_like(x) if need[0] else None
        dweight = torch.zeros(weight.shape, dtype=lse[0].dtype, device=x.device) if need[1] else None
        for start, lse_c in zip(range(0, x.shape[0], step), lse, strict=True):
            rows = slice(start, start + step)
            c = _chunk(x[rows], operand, labels[:, rows].flatten(), ctx.first, axis)
            g = _gather(grad_outputs[0][rows], axis) * c.valid
            dz = c.logits.sub_(lse_c.unsqueeze(1)).exp_().mul_(-g.unsqueeze(1))
            dz.scatter_add_(1, c.target, (g * c.mine).unsqueeze(1))
            dz = widen(dz.to(x.dtype))
            if dx is not None:
                dx[rows] = reduce_scatter((dz @ operand).to(x.dtype), axis)
            if dweight is not None:
                dweight += dz.T @ c.full
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None, None, None


def _by_rank(labels: torch.Tensor, axis: Axis) -> torch.Tensor:
    """``[B, S]`` -> ``[n, B S / n]``: the labels of each rank's part of the sequence."""
    return labels.unflatten(1, (axis.size, -1)).transpose(0, 1).flatten(1, 2)


def vocab_parallel_log_probs(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int, *, first: int, axis: Axis
) -> torch.Tensor:
    """Log-probability, in nats, of each label of this rank's part of the sequence: ``[B, S / n]`` in float32 (float64 for
    float64), 0 where the label is negative. Takes the same arguments as `vocab_parallel_cross_entropy`."""
    return _VocabParallelLogProbs.apply(
        x.flatten(0, 1), weight, _by_rank(labels, axis), first, axis, chunk_tokens
    ).view(x.shape[:2])
