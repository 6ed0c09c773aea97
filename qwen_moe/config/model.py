"""The shape of a model."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from qwen_moe.config.dual_chunk import DualChunk
from qwen_moe.config.families import FAMILIES, Family, families_that
from qwen_moe.config.fields import (
    Criteria,
    Layers,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalSize,
    PositiveFloat,
    Section,
    Size,
    whole_number,
)
from qwen_moe.config.rope import RopeScaling


def _known_family(name: str) -> str:
    if name not in FAMILIES:
        raise ValueError(f"{name[:100]!r} is not a model family: give one of {', '.join(FAMILIES)}")
    return name


FamilyName = Annotated[str, AfterValidator(_known_family)]


def _explicit(scaling: Any, longest: Any) -> dict[str, Any] | None:
    """YaRN's settings with the lengths that follow from ``longest``; None for anything else."""
    if isinstance(scaling, RopeScaling):
        scaling = scaling.model_dump()
    longest = whole_number(longest)
    if not isinstance(scaling, dict) or scaling.get("type") != "yarn" or not isinstance(longest, int):
        return None
    scaling = dict(scaling)
    trained = scaling.get("original_max_position_embeddings")
    if trained is None:
        trained = scaling["original_max_position_embeddings"] = longest
    if scaling.get("factor") is None and isinstance(trained, int) and 0 < trained <= longest:
        scaling["factor"] = longest / trained
    return scaling


class ModelConfig(Section):
    """The shape of one model. Field names are Hugging Face's.

    ``family`` names a row of `qwen_moe/config/families.py`, which decides what the other fields do not.
    ``dual_chunk``: how texts longer than its chunk_size are read, up to ``max_position_embeddings``; training is plain.
    ``qkv_bias``: q, k and v have biases, and in families with ``o_bias`` the output projection too.
    ``criteria``: the names of a reward model's scores. Such a model has a head that scores every token by each of them
    (`score.weight [criteria, D]`) in the place of the head over the vocabulary. A recipe says it by its objective.
    A layer is MoE when ``(index + 1) % decoder_sparse_step == 0`` and it is not in ``mlp_only_layers``.
    """

    family: FamilyName
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    max_position_embeddings: Size = 32768
    rope_theta: Annotated[PositiveFloat, Field(le=1e15)] = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    dual_chunk: DualChunk | None = None
    rms_norm_eps: Annotated[NonNegativeFloat, Field(le=1)] = 1e-6
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
    criteria: Criteria = ()

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
        if scaling := _explicit(values.get("rope_scaling"), values.get("max_position_embeddings", 32768)):
            values["rope_scaling"] = scaling
        family = values.get("family")
        if "qkv_bias" not in values and isinstance(family, str) and family in FAMILIES:
            values["qkv_bias"] = FAMILIES[family].qkv_bias
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
        self._check_rope()
        if not self.features.qkv_bias_key and self.qkv_bias != self.features.qkv_bias:
            expected, has = ("true", "always") if self.features.qkv_bias else ("false", "never")
            raise ValueError(
                f"qkv_bias must be {expected} for family {self.family}: Hugging Face's {self.features.architecture} "
                f"{has} has these biases"
            )
        if self.features.moe:
            self._check_experts()
        else:
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is {getattr(self, name)} but family {self.family} is dense: "
                        f"use an MoE family ({families_that(lambda family: family.moe)}) or leave it out"
                    )
        if self.shared_expert_intermediate_size and not self.features.shared_expert:
            others = families_that(lambda family: family.shared_expert)
            raise ValueError(
                f"shared_expert_intermediate_size is {self.shared_expert_intermediate_size} but family {self.family} "
                f"has no shared expert: use a family that has one ({others}) or leave it out"
            )
        return self

    def _check_rope(self) -> None:
        scaling = self.rope_scaling
        if scaling is not None and scaling.type == "dynamic" and self.head_dim == 2:
            raise ValueError("rope_scaling of type dynamic is not defined for head_dim 2: use type yarn or linear")
        if scaling is not None and scaling.type == "dynamic" and self.dual_chunk is not None:
            raise ValueError(
                "dual_chunk needs angles that do not change with the length of a text, and those of rope_scaling of type "
                "dynamic do: leave one of them out"
            )
        if scaling is None or scaling.type != "yarn":
            return
        if scaling.factor is None:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings {self.trained_length} is larger than "
                f"max_position_embeddings {self.max_position_embeddings}: give rope_scaling.factor, or the larger of them "
                "as max_position_embeddings"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta:g}: rope_scaling of type yarn needs a base above 1")

    @property
    def trained_length(self) -> int:
        """The length of text that the model was trained on, before RoPE was stretched."""
        scaling = self.rope_scaling
        return (scaling and scaling.original_max_position_embeddings) or self.max_position_embeddings

    @property
    def rope_factor(self) -> float:
        """How many times longer than `trained_length` texts may be."""
        return (self.rope_scaling and self.rope_scaling.factor) or 1.0

    @property
    def reach(self) -> int:
        """The longest text that the model can read. With type dynamic the length of a text changes all its
        angles, which cached keys cannot follow."""
        if self.rope_scaling is not None and self.rope_scaling.type == "dynamic":
            return self.max_position_embeddings
        return max(self.max_position_embeddings, int(self.rope_factor * self.trained_length))

    @property
    def trainable_length(self) -> int:
        """The longest text that the model can train on, where attention is plain."""
        return self.reach if self.dual_chunk is None else min(self.reach, self.dual_chunk.plain_length)

    def _check_experts(self) -> None:
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing or 0 but family is {self.family}: give a positive number")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is larger than num_experts {self.num_experts}: "
                "a token cannot visit more experts than there are"
            )
        if self.features.shared_expert and not self.shared_expert_intermediate_size:
            others = families_that(lambda family: family.moe and not family.shared_expert)
            raise ValueError(
                f"shared_expert_intermediate_size is 0 but family {self.family} always has a shared expert: "
                f"give its size, or use a family that has none ({others})"
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
                f"{list(self.mlp_only_layers)} leave none of {self.num_hidden_layers}; for a dense model use a dense "
                f"family ({families_that(lambda family: not family.moe)})"
            )

    def keys_per_query(self, sequence_length: int) -> float:
        """How many keys a query attends to, averaged over the positions of a sequence and over layers."""
        return (sequence_length + 1) / 2

    @property
    def features(self) -> Family:
        return FAMILIES[self.family]

    @property
    def tied_head(self) -> bool:
        """Whether the head over the vocabulary is the embedding; a reward model has no such head."""
        return self.tie_word_embeddings and not self.criteria

    @property
    def has_lm_head(self) -> bool:
        """Whether the head over the vocabulary is a weight of its own."""
        return not self.tie_word_embeddings and not self.criteria

    @property
    def is_moe_family(self) -> bool:
        return self.features.moe

    @property
    def qk_norm(self) -> bool:
        return self.features.qk_norm

    @property
    def o_bias(self) -> bool:
        return self.qkv_bias and self.features.o_bias

    def is_moe_layer(self, index: int) -> bool:
        return (
            self.num_experts > 0 and index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe_layer(i))
