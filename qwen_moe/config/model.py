"""The shape of a model."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from qwen_moe.config.fields import Layers, NonNegativeInt, OptionalSize, PositiveFloat, Section, Size, whole_number

Family = Literal["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"]


class ModelConfig(Section):
    """The shape of one Qwen model. Field names are Hugging Face's.

    ``family`` fixes what the others leave open: qwen2 and qwen2_moe have biases on q, k and v; qwen3 and qwen3_moe
    normalise each head of q and k instead (``qkv_bias`` there is Hugging Face's ``attention_bias``: q, k, v and o).
    A layer is MoE when ``(index + 1) % decoder_sparse_step == 0`` and it is not in ``mlp_only_layers``.
    """

    family: Family
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size = 32768
    rope_theta: Annotated[PositiveFloat, Field(le=1e15)] = 1_000_000.0
    rms_norm_eps: Annotated[PositiveFloat, Field(le=1)] = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Annotated[PositiveFloat, Field(le=100)] = 0.02
    qkv_bias: bool = False
    num_experts: OptionalSize = 0
    num_experts_per_tok: OptionalSize = 0
    moe_intermediate_size: OptionalSize = 0
    shared_expert_intermediate_size: OptionalSize = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        hidden, heads = whole_number(values.get("hidden_size")), whole_number(values.get("num_attention_heads"))
        if "num_key_value_heads" not in values and heads is not None:
            values["num_key_value_heads"] = heads
        if "head_dim" not in values and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            if hidden % heads:
                raise ValueError(
                    f"hidden_size {hidden} is not divisible by num_attention_heads {heads}: "
                    "change one of them, or give head_dim"
                )
            values["head_dim"] = hidden // heads
        if "qkv_bias" not in values and values.get("family") in ("qwen2", "qwen2_moe"):
            values["qkv_bias"] = True
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads {self.num_key_value_heads}: every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of dimensions, give an even one")
        if self.family == "qwen2" and not self.qkv_bias:
            raise ValueError("qkv_bias must be true for family qwen2: Hugging Face's Qwen2 always has these biases")
        if self.is_moe_family:
            self._check_experts()
        else:
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but family {self.family} is dense: "
                        f"use family {self.family}_moe or leave it out"
                    )
        if self.shared_expert_intermediate_size and self.family != "qwen2_moe":
            raise ValueError(
                f"shared_expert_intermediate_size is {self.shared_expert_intermediate_size} but family {self.family} "
                "has no shared expert: use family qwen2_moe or leave it out"
            )
        return self

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing or 0 but family is {self.family}: give a positive number")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is larger than num_experts {self.num_experts}: "
                "a token cannot visit more experts than there are"
            )
        if self.family == "qwen2_moe" and not self.shared_expert_intermediate_size:
            raise ValueError(
                "shared_expert_intermediate_size is 0 but family qwen2_moe always has a shared expert: "
                "give its size, or use family qwen3_moe, which has none"
            )
        for layer in self.mlp_only_layers:
            if layer >= self.num_hidden_layers:
                raise ValueError(
                    f"mlp_only_layers names layer {layer} but there are {self.num_hidden_layers}: "
                    f"give indices from 0 to {self.num_hidden_layers - 1}"
                )
        if not self.moe_layers:
            raise ValueError(
                f"no layer is MoE: decoder_sparse_step {self.decoder_sparse_step} and mlp_only_layers "
                f"{list(self.mlp_only_layers)} leave none of {self.num_hidden_layers}; use family "
                f"{self.family.removesuffix('_moe')} for a dense model"
            )

    @property
    def is_moe_family(self) -> bool:
        return self.family.endswith("_moe")

    @property
    def qk_norm(self) -> bool:
        return self.family.startswith("qwen3")

    @property
    def o_bias(self) -> bool:
        return self.qkv_bias and self.family.startswith("qwen3")

    def is_moe_layer(self, index: int) -> bool:
        return (
            self.num_experts > 0 and index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))
