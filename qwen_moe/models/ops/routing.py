"""A router's probabilities and what the layer takes from them, with one backward for all of it.

Shapes: B sequences of S tokens, T = B * S, D hidden, E experts, K top-k. All sums are in the accumulation dtype.
"""

import torch
import torch.nn.functional as F

from parallel.gemm import exact_mm, wanted
from qwen_moe.models.ops.compiled import fused
from qwen_moe.models.ops.dtypes import accumulation_dtype


@fused
def _normalized(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.softmax(-1), logits.logsumexp(-1)


@fused
def _logit_gradient(
    probs: torch.Tensor,
    log_total: torch.Tensor,
    counted: torch.Tensor | None,
    picked: torch.Tensor,
    dprob_sum: torch.Tensor,
    dz_sum: torch.Tensor,
) -> torch.Tensor:
    """The gradient of the logits ``[B, S, E]``, but for p_e dp_e of the picked experts, whose sum is ``picked [B, S]``."""
    by_expert, by_token = dprob_sum.unsqueeze(1), 2 * log_total * dz_sum.unsqueeze(1)
    if counted is not None:
        by_expert, by_token = by_expert * counted.unsqueeze(2), by_token * counted
    mean = torch.linalg.vecdot(probs, by_expert) + picked
    return probs * (by_expert + (by_token - mean).unsqueeze(2))


def logits_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [..., D]`` times ``weight [E, D]`` transposed, in the accumulation dtype: ``[T, E]``."""
    rows, wide = x.flatten(0, -2), accumulation_dtype(x.dtype)
    if type(x) is torch.Tensor and x.is_cpu and x.dtype == weight.dtype:
        return exact_mm(rows.to(wide), weight.to(wide).T, x.dtype)
    return F.linear(rows.to(wide), weight.to(wide))


class _Picked(torch.autograd.Function):
    """Of p = softmax(z) and L = logsumexp(z), with z = x W^T: p of the chosen experts, and the sums over a sequence's tokens
    of p and of L^2. Keeps x, W, p and L: no copy of x in float32, and no logits.

    With dp = the sum of the gradients of all that is made of p, dz = p * (dp - <p, dp>) + 2 L dL2 * p.
    """

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        weight: torch.Tensor,
        probs: torch.Tensor,
        log_total: torch.Tensor,
        indices: torch.Tensor,
        counted: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        picked = probs.gather(1, indices)
        ctx.save_for_backward(x, weight, probs, log_total, indices, picked, counted)
        of_tokens, squares = probs.unflatten(0, x.shape[:2]), log_total.square().view(x.shape[:2])
        if counted is not None:
            of_tokens, squares = of_tokens * counted.unsqueeze(2), squares * counted
        return picked, of_tokens.sum(1), squares.sum(1)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, probs, log_total, indices, picked, counted = ctx.saved_tensors
        dpicked, dprob_sum, dz_sum = grad_outputs
        sequences = x.shape[:2]
        parts = picked * dpicked
        dlogits = _logit_gradient(
            probs.unflatten(0, sequences),
            log_total.view(sequences),
            counted,
            parts.sum(1).view(sequences),
            dprob_sum,
            dz_sum,
        ).flatten(0, 1)
        dlogits.scatter_add_(1, indices, parts)
        dx = dweight = None
        need = wanted(ctx)
        if need[0]:
            dx = (dlogits @ weight.to(dlogits.dtype)).to(x.dtype).view_as(x)
        if need[1]:
            dweight = (dlogits.T @ x.flatten(0, 1).to(dlogits.dtype)).to(weight.dtype)
        return dx, dweight, None, None, None, None


def probabilities(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Outside autograd, for tokens ``x [..., D]`` and ``weight [E, D]``: the probabilities ``[T, E]`` and the log of the sum
    that each token's are divided by ``[T]``."""
    with torch.no_grad():
        return _normalized(logits_of(x, weight))


def picked_and_sums(
    x: torch.Tensor,
    weight: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor,
    counted: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of tokens ``x [B, S, D]`` and what `probabilities` ``found`` for them: the probabilities at ``indices [T, K]``, their
    sums over each sequence ``[B, E]``, and the sums of squared logsumexps ``[B]``. Sums are over the tokens ``counted [B,
    S]``, or all. ``x`` and ``weight`` get gradients."""
    return _Picked.apply(x, weight, *found, indices, counted)
