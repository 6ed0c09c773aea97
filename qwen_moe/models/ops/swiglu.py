"""The elementwise part of SwiGLU (arXiv 2002.05202), forward and backward."""

import torch
import torch.nn.functional as F

from qwen_moe.models.ops.compiled import fused


@fused
def values(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` outside autograd."""
    return F.silu(g).mul_(u)


@fused
def weighted_values(g: torch.Tensor, u: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` of rows ``[N, F]``, each times its weight ``[N]``, outside autograd."""
    return F.silu(g).mul_(u).mul_(weights.unsqueeze(1))


def gradients(g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of ``g`` and ``u`` from that of ``silu(g) * u``.

    With s = sigmoid(g): d silu(g)/dg = s * (1 + g * (1 - s)), so dg = dy * u * that and du = dy * silu(g).
    """
    return torch.ops.aten.silu_backward(dy * u, g), F.silu(g).mul_(dy)


_backward = fused(gradients)


def _all_gradients(
    g: torch.Tensor, u: torch.Tensor, weights: torch.Tensor, dhidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = F.silu(g).mul_(u)
    dg, du = gradients(g, u, dhidden * weights.unsqueeze(1))
    return dg, du, torch.linalg.vecdot(dhidden, hidden), hidden * weights.unsqueeze(1)


@fused
def weighted_gradients(
    g: torch.Tensor, u: torch.Tensor, weights: torch.Tensor, dhidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of `weighted_values`, those of gate and up, joined ``[N, 2 F]``, and of ``weights [N]``; and the
    values ``[N, F]`` again."""
    dg, du, dweights, hidden = _all_gradients(g, u, weights, dhidden)
    return torch.cat((dg, du), -1), dweights, hidden


weighted_gradients_apart = fused(_all_gradients)


@fused
def gradients_and_values(
    g: torch.Tensor, u: torch.Tensor, dhidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of ``silu(g) * u``, those of ``g`` and ``u``; and the values again."""
    return *gradients(g, u, dhidden), F.silu(g).mul_(u)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u. Saves g and u only. Leading dims are flattened, so that only one number of dims is compiled."""

    @staticmethod
    def forward(ctx, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(g, u)
        return values(_rows(g), _rows(u)).view(g.shape)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = ctx.saved_tensors
        dg, du = _backward(_rows(g), _rows(u), _rows(grad_outputs[0]))
        return dg.view(g.shape), du.view(u.shape)


class _WeightedSwiGLU(torch.autograd.Function):
    """weights * silu(g) * u, of joined g and u. Saves g, u and weights."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weights)
        g, u = gate_up.chunk(2, dim=-1)
        return weighted_values(g, u, weights)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, weights = ctx.saved_tensors
        g, u = gate_up.chunk(2, dim=-1)
        dgate_up, dweights, _ = weighted_gradients(g, u, weights, grad_outputs[0])
        return dgate_up, dweights


def swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` elementwise, for gate and up projections of one shape."""
    return _SwiGLU.apply(g, u)


def weighted_swiglu(gate_up: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """``[N, 2 F] -> [N, F]``: `swiglu` of the first half (gate) and the second (up) of the last dim, each row times its
    weight of ``weights [N]``."""
    return _WeightedSwiGLU.apply(gate_up, weights)
