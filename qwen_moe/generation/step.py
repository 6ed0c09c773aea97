"""One new token of every sequence, with the small operations of a layer compiled into few kernels, on a CPU.

A model that draws one token at a time spends most of its time on small operations and on products of one row. Compiled, the
operations around each product are part of its loop, and a product of one row reads its weight once, without the fixed cost
of a library's call. All layers of a kind share the compiled code, because weights are arguments.

Shapes: N sequences, D hidden, H query heads, G key/value heads, C head dim, E experts, K top-k, F expert hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from parallel.gemm import HALF, has_hardware
from qwen_moe.errors import UserError
from qwen_moe.generation.cache import SequenceCache
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.decoder import DecoderLayer, DecoderLM
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.moe.block import MoE, Sent
from qwen_moe.models.moe.router import choose
from qwen_moe.models.ops.compiled import compiled, missing_compiler
from qwen_moe.models.ops.dtypes import accumulation_dtype
from qwen_moe.models.ops.rms_norm import rms_norm
from qwen_moe.models.ops.rotate import rotate

_TILE = 32  # columns of a product
Weights = tuple[Any, ...]  # tensors, None where a model has none


class _Sizes(NamedTuple):
    """Numbers that the compiled code has in it."""

    eps: float
    head_dim: int
    kv_heads: int
    top_k: int
    normalized: bool  # weights of the chosen experts sum to 1


def _times(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [N, A]`` times ``weight [O, A]`` transposed plus ``bias [O]``. One row becomes a sum, whose loop reads the weight
    once and takes in the operations before and after."""
    if x.shape[0] > 1:
        y = (weight @ x.T).T
    else:
        wide = accumulation_dtype(x.dtype)
        y = (weight.to(wide) * x.to(wide)).sum(-1).to(x.dtype).unsqueeze(0)
    return y if bias is None else y + bias


def _heads(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: Weights, sizes: _Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated queries ``[N, H, C]`` and keys ``[N, G, C]``, and values, of a layer's input ``x [N, D]``."""
    norm, joined, bias, q_norm, k_norm = weights
    heads = _times(rms_norm(x, norm, sizes.eps), joined, bias).unflatten(-1, (-1, sizes.head_dim))
    queries, keys, values = heads.split((heads.shape[1] - 2 * sizes.kv_heads, sizes.kv_heads, sizes.kv_heads), 1)
    if q_norm is not None:
        queries, keys = rms_norm(queries, q_norm, sizes.eps), rms_norm(keys, k_norm, sizes.eps)
    return rotate(queries, cos, sin), rotate(keys, cos, sin), values.contiguous()


def _feed_forward(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = _times(x, gate_up).chunk(2, -1)
    return _times(F.silu(gate) * up, down)


def _dense(x: torch.Tensor, y: torch.Tensor, weights: Weights, sizes: _Sizes) -> torch.Tensor:
    """A layer without experts after its attention ``y [N, H C]``: ``[N, D]``."""
    out, out_bias, norm, gate_up, down = weights
    x = x + _times(y, out, out_bias)
    return x + _feed_forward(rms_norm(x, norm, sizes.eps), gate_up, down)


def _route(
    x: torch.Tensor, y: torch.Tensor, weights: Weights, sizes: _Sizes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A layer with experts after its attention ``y``, up to them: the new ``x``, what experts are given ``[N, D]``, their
    weights and indices ``[N, K]``, and the shared expert's output, if there is one. See `Router`."""
    out, out_bias, norm, router, expert_bias, gate_up, down, shared_gate = weights
    x = x + _times(y, out, out_bias)
    normed = rms_norm(x, norm, sizes.eps)
    wide = accumulation_dtype(x.dtype)
    probs = (router.to(wide) * normed.to(wide).unsqueeze(1)).sum(-1).softmax(-1)
    chosen, indices = choose(probs, expert_bias, sizes.top_k, sizes.normalized)
    shared = None
    if shared_gate is not None:
        opened = (shared_gate.to(wide) * normed.to(wide)).sum(-1, keepdim=True).to(x.dtype).sigmoid()
        shared = opened * _feed_forward(normed, gate_up, down)
    return x, normed, chosen.to(x.dtype), indices, shared


def _one_routed(
    x: torch.Tensor, y: torch.Tensor, weights: Weights, experts: Weights, sizes: _Sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer with experts after the attention of one token ``[1, H C]``: ``[1, D]``, and its experts ``[1, K]``. The loops
    read the weights of the chosen experts where they are."""
    gate_up, down = experts
    x, normed, chosen, indices, shared = _route(x, y, weights, sizes)
    wide, of_token = accumulation_dtype(x.dtype), indices[0]
    given = (gate_up[of_token].to(wide) * normed[0].to(wide)).sum(-1).to(x.dtype)  # [K, 2, F]
    hidden = F.silu(given[:, 0]) * given[:, 1]
    outputs = (down[of_token].to(wide) * hidden.to(wide).unsqueeze(1)).sum(-1).to(x.dtype)  # [K, D]
    routed = (outputs.to(wide) * chosen[0].to(wide).unsqueeze(1)).sum(0, keepdim=True).to(x.dtype)
    return x + (routed if shared is None else routed + shared), indices


def _all_routed(
    x: torch.Tensor, y: torch.Tensor, weights: Weights, experts: Weights, sizes: _Sizes
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer with experts after the attention of several tokens ``[N, H C]``: ``[N, D]``, and their experts ``[N, K]``. All
    experts multiply all tokens, in two products; what was not chosen is left out of the sum. Where most experts are chosen
    by some token, their weights are read anyway, and the hardware multiplies 16 columns in the time of one."""
    gate_up, down = experts
    x, normed, chosen, indices, shared = _route(x, y, weights, sizes)
    wide, (count, _, hidden_size, _) = accumulation_dtype(x.dtype), gate_up.shape
    given = (gate_up.flatten(0, 2) @ normed.T).view(count, 2, hidden_size, -1)  # [E, 2, F, N]
    outputs = torch.bmm(down, F.silu(given[:, 0]) * given[:, 1])  # [E, D, N]
    shares = normed.new_zeros(count, len(x)).scatter(0, indices.T, chosen.T).unsqueeze(1)  # [E, 1, N]
    routed = torch.where(shares != 0, outputs.to(wide) * shares, 0).sum(0).T.to(x.dtype)
    return x + (routed if shared is None else routed + shared), indices


class CompiledStep:
    """Reads one new token of every sequence of a `SequenceCache` with ``model``, which is on one CPU.

    The first call compiles, which takes up to a minute where nothing is cached. Weights of ``model`` may be changed in place
    afterwards, but not replaced. Results differ from `DecoderLM.read` in the order of sums alone.
    """

    def __init__(self, model: DecoderLM) -> None:
        self._model = model
        self._norm = compiled(rms_norm)
        self._heads, self._dense = compiled(_heads), compiled(_dense)
        self._route, self._one_routed, self._all_routed = compiled(_route), compiled(_one_routed), compiled(_all_routed)
        self._layers = [_Layer(layer) for layer in model.model.layers]

    def reads(self, cache: SequenceCache, tokens: int) -> bool:
        """Whether the next pass over ``tokens`` tokens is such a step. Where products of several rows need wider operands
        than the CPU multiplies, it is not."""
        multiplies = tokens == 1 or has_hardware(self._model.head_weight.dtype)
        return cache.steps_together and tokens == cache.sequences and multiplies

    def read(self, ids: torch.Tensor, cache: SequenceCache, chosen: list[torch.Tensor] | None = None) -> torch.Tensor:
        """``DecoderLM.read`` of ``ids [N]``: ``[N, D]``."""
        x = self._model.model.embed_tokens(ids)
        rotary = cache.rotary(x)
        cos, sin = (_any_rows(table.transpose(0, 1)) for table in (rotary.cos, rotary.sin))
        for layer in self._layers:
            q, k, v = self._heads(_any_rows(x), cos, sin, layer.heads, layer.sizes)
            y = cache.attend_rotated(layer.index, q, k, v).flatten(1)
            x = self._after(layer, _any_rows(x), _any_rows(y), chosen)
        return self._norm(_any_rows(x), self._model.model.norm.weight, self._model.config.rms_norm_eps)

    def _after(
        self, layer: "_Layer", x: torch.Tensor, y: torch.Tensor, chosen: list[torch.Tensor] | None
    ) -> torch.Tensor:
        moe = layer.moe
        if moe is None:
            return self._dense(x, y, layer.rest, layer.sizes)
        if len(x) == 1 or _most_are_chosen(len(x), moe, x.dtype):
            rest = self._one_routed if len(x) == 1 else self._all_routed
            x, indices = rest(x, y, layer.rest, layer.experts, layer.sizes)
        else:
            x, normed, weights, indices, shared = self._route(x, y, layer.rest, layer.sizes)
            rows, route = moe.dispatcher.send(normed, weights, indices, False)
            (back,) = moe.through_experts([Sent(rows, route, shared)])
            x = x + back.received(x)
        if chosen is not None:
            chosen.append(indices)
        return x


def _most_are_chosen(tokens: int, moe: MoE, dtype: torch.dtype) -> bool:
    """Whether `_all_routed` is the fastest: in half precision, for tokens that fit the hardware's tiles and are expected to
    choose at least half of the experts."""
    untouched = (1 - moe.top_k / moe.num_experts) ** tokens
    return dtype in HALF and tokens <= _TILE and untouched <= 0.5


class _Layer:
    """The weights of a layer as the compiled functions take them. Projections of one input are joined to one product; the
    parameters of ``layer`` become parts of it, so that nothing is held twice."""

    def __init__(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = attention.layer
        self.heads: Weights = (layer.input_layernorm.weight, *_of_heads(attention))
        self.moe = mlp if isinstance(mlp, MoE) else None
        self.experts: Weights = ()
        rest = (attention.o_proj.weight, attention.o_proj.bias, layer.post_attention_layernorm.weight)
        top_k, normalized = 0, False
        if isinstance(mlp, MoE):
            self.experts = (mlp.experts.gate_up_proj, mlp.experts.down_proj)
            top_k, normalized = mlp.top_k, mlp.gate.norm_topk_prob
            shared: Weights = (None,) * 3
            if mlp.has_shared_expert:
                shared = (*_of_feed_forward(mlp.shared_expert), mlp.shared_expert_gate.weight)
            self.rest: Weights = (*rest, mlp.gate.weight, mlp.gate.expert_bias, *shared)
        else:
            self.rest = (*rest, *_of_feed_forward(mlp))
        kv_heads = attention.k_proj.out_features // attention.head_dim
        self.sizes = _Sizes(layer.input_layernorm.eps, attention.head_dim, kv_heads, top_k, normalized)


def _of_heads(attention: Attention) -> Weights:
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [one.bias for one in projections if one.bias is not None]
    norms: Weights = (None, None)
    if attention.qk_norm:
        norms = (attention.q_norm.weight, attention.k_norm.weight)
    return (_joined([one.weight for one in projections]), _joined(biases) if biases else None, *norms)


def _of_feed_forward(mlp: FeedForward) -> Weights:
    return _joined([mlp.gate_proj.weight, mlp.up_proj.weight]), mlp.down_proj.weight


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``parts`` one after another along their first dim. They become parts of the result."""
    joined = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.data = rows
    return joined


def _any_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` for code that is compiled once for any number of rows above one."""
    if len(x) > 1:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def check_compiled_step(device: torch.device) -> None:
    """Raise UserError where steps cannot be compiled."""
    if device.type != "cpu":
        raise UserError(f"--compile is for CPUs, and the model is on {device}: leave it out")
    problem = missing_compiler(device.type)
    if problem is not None:
        raise UserError(f"--compile needs what is missing here: a {problem}; or leave it out")
