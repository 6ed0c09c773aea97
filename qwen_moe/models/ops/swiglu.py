"""The elementwise part of SwiGLU (arXiv 2002.05202), forward and backward."""

import torch
import torch.nn.functional as F

from qwen_moe.models.ops.compiled import fused


@fused
def _forward(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return F.silu(g).mul_(u)


def _gradients(g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(dy * u, g), F.silu(g).mul_(dy)


_backward = fused(_gradients)


@fused
def _backward_joined(g: torch.Tensor, u: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return torch.cat(_gradients(g, u, dy), -1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u. Saves g and u only.

    With s = sigmoid(g): d silu(g)/dg = s * (1 + g * (1 - s)), so dg = dy * u * that and du = dy * silu(g).
    Leading dims are flattened, so that only one number of dims is compiled.
    """

    @staticmethod
    def forward(ctx, g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(g, u)
        return _forward(_rows(g), _rows(u)).view(g.shape)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        g, u = ctx.saved_tensors
        dg, du = _backward(_rows(g), _rows(u), _rows(grad_outputs[0]))
        return dg.view(g.shape), du.view(u.shape)


class _JoinedSwiGLU(torch.autograd.Function):
    """SwiGLU on a fused [gate, up] input. Its gradient is one contiguous tensor."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _forward(*gate_up.chunk(2, dim=-1))

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        g, u = gate_up.chunk(2, dim=-1)
        return _backward_joined(g, u, grad_outputs[0])


def swiglu(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``silu(g) * u`` elementwise, for gate and up projections of one shape."""
    return _SwiGLU.apply(g, u)


def joined_swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """``[..., 2 F] -> [..., F]``: `swiglu` of the first half (gate) and the second (up) of the last dim."""
    return _JoinedSwiGLU.apply(gate_up)
