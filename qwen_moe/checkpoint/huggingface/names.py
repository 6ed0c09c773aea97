"""Maps our parameters to the tensors of a Hugging Face directory, declaratively and for every family.

Names are the same on both sides except for routed experts: ours are stacked, while Hugging Face's files hold one matrix per
expert (transformers 5 fuses them in memory, and that layout can be read too). Each row below is one kind of tensor. The
functions expand rows for a config and compare the result with what a directory holds.

Shape legend: V vocabulary, D hidden, Q query heads x head dim, KV key/value heads x head dim, C head dim, I dense
feed-forward width, E experts, F expert width, S shared expert width, R criteria of a reward model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError

Shape = tuple[int, ...]
# FP8 directories store linear layers in FP8. They leave gates unchanged, and name them, and leave the rest unchanged.
Kind = Literal["linear", "gate", "other"]


@dataclass(frozen=True)
class Row:
    """One kind of tensor. ``when`` names the attribute of ModelConfig that must be true for the tensor to exist.

    ``per_expert`` holds Hugging Face's names of one expert's pieces, each with its index in our ``[E, ...]`` tensor after
    the expert index. It is empty if the name and the shape are the same on both sides.
    """

    name: str
    shape: tuple[str | int, ...]
    when: str = ""
    per_expert: tuple[tuple[str, Shape], ...] = ()
    kind: Kind = "other"


_GLOBAL_FIRST = (Row("model.embed_tokens.weight", ("V", "D")),)
_EVERY_LAYER = (
    Row("input_layernorm.weight", ("D",)),
    Row("self_attn.q_proj.weight", ("Q", "D"), kind="linear"),
    Row("self_attn.q_proj.bias", ("Q",), when="qkv_bias"),
    Row("self_attn.k_proj.weight", ("KV", "D"), kind="linear"),
    Row("self_attn.k_proj.bias", ("KV",), when="qkv_bias"),
    Row("self_attn.v_proj.weight", ("KV", "D"), kind="linear"),
    Row("self_attn.v_proj.bias", ("KV",), when="qkv_bias"),
    Row("self_attn.o_proj.weight", ("D", "Q"), kind="linear"),
    Row("self_attn.o_proj.bias", ("D",), when="o_bias"),
    Row("self_attn.q_norm.weight", ("C",), when="qk_norm"),
    Row("self_attn.k_norm.weight", ("C",), when="qk_norm"),
    Row("post_attention_layernorm.weight", ("D",)),
)
_DENSE_LAYER = (
    Row("mlp.gate_proj.weight", ("I", "D"), kind="linear"),
    Row("mlp.up_proj.weight", ("I", "D"), kind="linear"),
    Row("mlp.down_proj.weight", ("D", "I"), kind="linear"),
)
_MOE_LAYER = (
    Row("mlp.gate.weight", ("E", "D"), kind="gate"),
    Row(
        "mlp.experts.gate_up_proj",
        ("E", 2, "F", "D"),
        per_expert=(("mlp.experts.{}.gate_proj.weight", (0,)), ("mlp.experts.{}.up_proj.weight", (1,))),
        kind="linear",
    ),
    Row(
        "mlp.experts.down_proj",
        ("E", "D", "F"),
        per_expert=(("mlp.experts.{}.down_proj.weight", ()),),
        kind="linear",
    ),
    Row("mlp.shared_expert.gate_proj.weight", ("S", "D"), when="shared_expert_intermediate_size", kind="linear"),
    Row("mlp.shared_expert.up_proj.weight", ("S", "D"), when="shared_expert_intermediate_size", kind="linear"),
    Row("mlp.shared_expert.down_proj.weight", ("D", "S"), when="shared_expert_intermediate_size", kind="linear"),
    Row("mlp.shared_expert_gate.weight", (1, "D"), when="shared_expert_intermediate_size", kind="gate"),
)
_GLOBAL_LAST = (
    Row("model.norm.weight", ("D",)),
    Row("lm_head.weight", ("V", "D"), when="has_lm_head"),
    Row("score.weight", ("R", "D"), when="criteria"),
)

# Buffers that old versions of transformers saved and every version computes again.
_RECOMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_TIED_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Piece:
    """A tensor of a Hugging Face file. It holds ``parameter[index]`` of ours, reshaped to ``shape``, or its FP8 values, or
    their scales (qwen_moe/checkpoint/huggingface/fp8.py)."""

    hf_name: str
    parameter: str
    index: Shape
    shape: Shape
    kind: Kind = "other"
    holds: Literal["values", "fp8", "scale"] = "values"

    def dtype(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Its dtype on disk if the parameters' dtypes are ``dtypes``."""
        fixed = {"fp8": torch.float8_e4m3fn, "scale": torch.float32}
        return fixed.get(self.holds) or dtypes[self.parameter]


@dataclass(frozen=True)
class Parameter:
    """One of our parameters, as Hugging Face's files hold it (``pieces``) and as transformers 5 holds it in memory
    (``fused``)."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...]
    fused: Piece | None = None


@dataclass(frozen=True)
class Match:
    """What a directory holds: ``pieces`` of every parameter, and names that are ignored. ``tied_head``: a head is on disk
    although it is tied, so it must equal the embedding."""

    pieces: dict[str, tuple[Piece, ...]]
    ignored: tuple[str, ...]
    tied_head: bool


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "Q": config.num_attention_heads * config.head_dim,
        "KV": config.num_key_value_heads * config.head_dim,
        "C": config.head_dim,
        "I": config.intermediate_size,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "S": config.shared_expert_intermediate_size,
        "R": len(config.criteria),
    }


def _expand(row: Row, prefix: str, sizes: dict[str, int]) -> Parameter:
    name = prefix + row.name
    shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in row.shape)
    if not row.per_expert:
        return Parameter(name, shape, (Piece(name, name, (), shape, row.kind),))
    pieces = tuple(
        Piece(prefix + template.format(expert), name, (expert, *where), shape[1 + len(where) :], row.kind)
        for expert in range(shape[0])
        for template, where in row.per_expert
    )
    flat = (shape[0], shape[1] * shape[2], shape[3]) if len(shape) == 4 else shape
    return Parameter(name, shape, pieces, Piece(name, name, (), flat))


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Every parameter of the model by our name, in the model's order."""
    sizes = _sizes(config)

    def wanted(row: Row) -> bool:
        return not row.when or bool(getattr(config, row.when))

    rows = [(row, "") for row in _GLOBAL_FIRST]
    for layer in range(config.num_hidden_layers):
        kind = _MOE_LAYER if config.is_moe_layer(layer) else _DENSE_LAYER
        rows += [(row, f"model.layers.{layer}.") for row in _EVERY_LAYER + kind]
    rows += [(row, "") for row in _GLOBAL_LAST]
    expanded = (_expand(row, prefix, sizes) for row, prefix in rows if wanted(row))
    return {parameter.name: parameter for parameter in expanded}


def expert_biases(config: ModelConfig) -> dict[str, Shape]:
    """The router's float32 buffers, by our name. Hugging Face's format has no place for them."""
    return {f"model.layers.{layer}.mlp.gate.expert_bias": (config.num_experts,) for layer in config.moe_layers}


def hf_pieces(config: ModelConfig) -> dict[str, Piece]:
    """Every tensor name that a file of this model may hold, with its piece; includes the fused layout and a tied head."""
    found: dict[str, Piece] = {}
    for parameter in parameters(config).values():
        found |= {piece.hf_name: piece for piece in parameter.pieces}
        if parameter.fused is not None:
            found[parameter.fused.hf_name] = parameter.fused
    if config.tied_head:
        found[_TIED_HEAD] = Piece(_TIED_HEAD, _EMBEDDING, (), found[_EMBEDDING].shape)
    return found


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def match(config: ModelConfig, found: Mapping[str, Shape], where: str) -> Match:
    """Match every parameter with the tensors ``found`` (name -> shape) in ``where``.

    Raises UserError, which names tensors that are missing, left over or of another shape.
    """
    left = dict(found)
    chosen: dict[str, tuple[Piece, ...]] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    for parameter in parameters(config).values():
        fused = parameter.fused is not None and parameter.fused.hf_name in left
        chosen[parameter.name] = (parameter.fused,) if fused and parameter.fused else parameter.pieces
        for piece in chosen[parameter.name]:
            shape = left.pop(piece.hf_name, None)
            if shape is None:
                missing.append(piece.hf_name)
            elif tuple(shape) != piece.shape:
                misshapen.append(f"{piece.hf_name} is {list(shape)}, expected {list(piece.shape)}")
    ignored = tuple(name for name in left if _RECOMPUTED.fullmatch(name))
    tied_head = config.tied_head and left.get(_TIED_HEAD) is not None
    if tied_head and tuple(left[_TIED_HEAD]) != (config.vocab_size, config.hidden_size):
        misshapen.append(f"{_TIED_HEAD} is {list(left[_TIED_HEAD])} but the tied embedding is another shape")
    extra = [name for name in left if name not in ignored and not (tied_head and name == _TIED_HEAD)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {_listed(missing)}")
    if extra:
        problems.append(f"{len(extra)} not known to {config.family}: {_listed(extra)}")
    if misshapen:
        problems.append(f"{len(misshapen)} of another shape: {_listed(misshapen)}")
    if problems:
        raise UserError(
            f"the tensors of {where} do not match its config.json ({'; '.join(problems)}): "
            "use a directory whose config.json and weights belong together"
        )
    return Match(chosen, ignored, tied_head)
