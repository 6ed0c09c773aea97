"""Log-probabilities of labels in chunks: full logits never exist, and every token has its own upstream gradient.

`head.cross_entropy` forms the gradient of a sum in forward, so it cannot weight tokens afterwards. This head recomputes a
chunk's logits in backward instead. Shapes: T tokens, D hidden, V vocabulary.
"""

import torch

from parallel.gemm import mm_into, wanted, widen
from qwen_moe.models.head.cross_entropy import set_at_labels
from qwen_moe.models.ops.compiled import fused
from qwen_moe.models.ops.dtypes import accumulation_dtype


@fused
def _log_probs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels' log-probabilities ``[T]`` (0 where a label is negative) and logsumexp ``[T, 1]`` of ``logits [T, V]``."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    lse = wide.logsumexp(-1, keepdim=True)
    of_label = wide.gather(1, labels.unsqueeze(1).clamp_min(0))
    return ((of_label - lse) * (labels >= 0).unsqueeze(1)).squeeze(1), lse


@fused
def _logit_gradients(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-g softmax(z) ``[T, V]`` for upstream gradients g ``[T]``, and g (1 - softmax(z)) at the labels ``[T, 1]`` (subtracted
    before rounding)."""
    wide = logits.to(accumulation_dtype(logits.dtype))
    g = (upstream * (labels >= 0)).unsqueeze(1)
    dz = ((wide - lse).exp() * -g).to(logits.dtype)
    of_label = wide.gather(1, labels.unsqueeze(1).clamp_min(0))
    return dz, (g * (1 - (of_label - lse).exp())).to(logits.dtype)


class _LinearLogProbs(torch.autograd.Function):
    """l_t = z_t[label_t] - logsumexp(z_t), z = x W^T.

    dz_t = g_t (onehot(label_t) - softmax(z_t)), dx = dz W, dW = dz^T x, summed over chunks in float32.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        operand = widen(weight)
        chunks = []
        for start in range(0, x.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunks.append(_log_probs((widen(x[rows]) @ operand.T).to(x.dtype), labels[rows]))
        log_probs, lse = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(x, weight, labels, lse)
        ctx.chunk_tokens = chunk_tokens
        return log_probs

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight, labels, lse = ctx.saved_tensors
        need_x, need_weight, *_ = wanted(ctx)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=x.device) if need_weight else None
        operand = widen(weight)
        for start in range(0, x.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            x_c, labels_c = widen(x[rows]), labels[rows]
            logits = (x_c @ operand.T).to(x.dtype)
            dz, of_label = _logit_gradients(logits, labels_c, lse[rows], grad_outputs[0][rows])
            set_at_labels(dz, labels_c, of_label)
            dz = widen(dz)
            if dx is not None:
                mm_into(dx[rows], dz, operand)
            if dweight is not None:
                dweight += dz.T @ x_c
        return dx, None if dweight is None else dweight.to(weight.dtype), None, None


def linear_log_probs(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_tokens: int = 1024
) -> torch.Tensor:
    """Log-probability, in nats, that ``softmax(x W^T)`` gives each of ``labels``: ``[...]``, float32 (float64 for float64).

    ``x [..., D]``, ``weight [V, D]``, ``labels [...]`` int64; negative labels give 0 and no gradient. At most
    ``chunk_tokens`` rows of logits exist at a time.
    """
    return _LinearLogProbs.apply(x.reshape(-1, x.shape[-1]), weight, labels.flatten(), chunk_tokens).view(labels.shape)
