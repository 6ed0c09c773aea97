"""LM head and cross-entropy in one function over chunks of tokens, so that full logits never exist.

Shapes: T tokens, D hidden, V vocabulary.
"""

import torch

from parallel.gemm import mm_into, wanted, widen
from qwen_moe.models.ops.compiled import fused
from qwen_moe.models.ops.dtypes import accumulation_dtype


def _statistics(wide: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses ``[T, 1]`` of logits ``wide [T, V]`` (0 where the label is negative), their logsumexp and the label's logit."""
    lse = wide.logsumexp(-1, keepdim=True)
    of_label = wide.gather(1, labels.unsqueeze(1).clamp_min(0))
    return (lse - of_label) * (labels >= 0).unsqueeze(1), lse, of_label


@fused
def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed loss of ``logits [T, V]``, in float64."""
    return _statistics(logits.to(accumulation_dtype(logits.dtype)), labels)[0].sum(dtype=torch.float64)


@fused
def _losses_and_gradients(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed loss of ``logits [T, V]`` in float64, softmax(z), and softmax(z) - 1 at the labels ``[T, 1]`` (subtracted
    before rounding). May overwrite ``logits``."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    losses, lse, of_label = _statistics(wide, labels)
    loss, valid = losses.sum(dtype=torch.float64), (labels >= 0).unsqueeze(1)
    # Not in place when compiled: compiled by torch 2.11, the loss would read the overwritten logits.
    shifted = wide - lse if torch.compiler.is_compiling() else wide.sub_(lse)
    dz = shifted.exp_().mul_(valid).to(logits.dtype)
    return loss, dz, (((of_label - lse).exp() - 1) * valid).to(logits.dtype)


def set_at_labels(dz: torch.Tensor, labels: torch.Tensor, of_label: torch.Tensor) -> None:
    """Write ``of_label [T, 1]`` to ``dz [T, V]`` in the columns ``labels [T]`` (column 0 where a label is negative)."""
    # Not scatter_, which copies the whole of dz on a CPU.
    rows = torch.arange(dz.shape[0], device=dz.device)
    dz[rows, labels.clamp_min(0)] = of_label.squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum over valid t of logsumexp(z_t) - z_t[label_t], z = x W^T.

    dz = softmax(z) - onehot(label), dx = dz W, dW = dz^T x. All three are formed while a chunk's logits exist, so
    nothing is computed twice; backward only multiplies by the incoming scalar. dW is summed over chunks in float32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        wide = accumulation_dtype(x.dtype)
        need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float64, device=x.device)  # a sum over many tokens, rounded once at the end
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if need_weight else None
        operand = widen(weight)
        for start in range(0, x.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            x_c, labels_c = widen(x[rows]), labels[rows]
            logits = (x_c @ operand.T).to(x.dtype)
            if not (need_x or need_weight):
                total += _losses(logits, labels_c)
                continue
            losses, dz, of_label = _losses_and_gradients(logits, labels_c)
            total += losses
            set_at_labels(dz, labels_c, of_label)
            dz = widen(dz)
            if dx is not None:
                mm_into(dx[rows], dz, operand)
            if dweight is not None:
                dweight += dz.T @ x_c
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        dx, dweight = ctx.saved_tensors
        need, scale = wanted(ctx), grad_outputs[0]
        dx = dx * scale.to(dx.dtype) if need[0] else None
        dweight = (dweight * scale).to(ctx.weight_dtype) if need[1] else None
        return dx, dweight, None, None


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int = 1024
) -> torch.Tensor:
    """Summed cross-entropy, in nats, of ``softmax(x W^T)`` against ``labels``; a scalar in float32 (float64 for float64).

    ``x [..., D]``, ``weight [V, D]``, ``labels [...]`` int64, negative where a token is ignored. At most ``chunk_tokens``
    rows of logits exist at a time.
    """
    return _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, labels.flatten(), chunk_tokens)
