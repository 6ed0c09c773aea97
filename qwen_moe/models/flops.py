"""Total and activated parameters, FLOPs per token, and bytes. No other file counts them."""

from dataclasses import asdict, dataclass

from qwen_moe.config import ModelConfig, RunConfig, stage_runs


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """``activated``: parameters that one token uses, including embedding and head (the convention of Qwen's published
    figures). ``non_vocabulary*``: without embedding and head (the N of scaling laws)."""

    total: int
    activated: int
    non_vocabulary_total: int
    non_vocabulary_activated: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameter counts from the config alone; `tests/models/test_flops.py` compares them with built modules."""
    d, c = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = d * c * (2 * heads + 2 * kv_heads)
    attention += (heads + 2 * kv_heads) * c if config.qkv_bias else 0
    attention += d if config.o_bias else 0
    attention += 2 * c if config.qk_norm else 0
    layer = attention + 2 * d
    expert = 3 * d * config.moe_intermediate_size
    shared = 3 * d * config.shared_expert_intermediate_size + (d if config.shared_expert_intermediate_size else 0)
    router = config.num_experts * d
    moe, dense = len(config.moe_layers), config.num_hidden_layers - len(config.moe_layers)
    always = config.num_hidden_layers * layer + dense * 3 * d * config.intermediate_size + moe * (router + shared) + d
    total = always + moe * config.num_experts * expert
    activated = always + moe * config.num_experts_per_tok * expert
    vocabulary = config.vocab_size * d * (2 if config.has_lm_head else 1) + len(config.criteria) * d
    return ParameterCounts(
        total=total + vocabulary,
        activated=activated + vocabulary,
        non_vocabulary_total=total,
        non_vocabulary_activated=activated,
    )


@dataclass(frozen=True, kw_only=True)
class FlopsPerToken:
    """Forward FLOPs per token by component; a multiply-add counts as 2. Training takes 3 times ``forward``, because backward
    takes twice forward. Attention is causal: a query sees (S + 1) / 2 keys on average. The head is counted; the embedding
    lookup and elementwise work are not."""

    attention_projections: float
    attention_scores: float
    dense_feed_forward: float
    routed_experts: float
    shared_expert: float
    router: float
    head: float

    @property
    def forward(self) -> float:
        return sum(asdict(self).values())

    @property
    def training(self) -> float:
        return 3 * self.forward


def flops_per_token(config: ModelConfig, sequence_length: int) -> FlopsPerToken:
    """FLOPs of one token in a sequence of ``sequence_length``, averaged over its positions."""
    d, c = config.hidden_size, config.head_dim
    heads, kv_heads, layers = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    moe = len(config.moe_layers)
    return FlopsPerToken(
        attention_projections=2.0 * layers * d * c * (2 * heads + 2 * kv_heads),
        attention_scores=4.0 * layers * heads * c * config.keys_per_query(sequence_length),
        dense_feed_forward=2.0 * (layers - moe) * 3 * d * config.intermediate_size,
        routed_experts=2.0 * moe * config.num_experts_per_tok * 3 * d * config.moe_intermediate_size,
        shared_expert=2.0 * moe * (3 * d * config.shared_expert_intermediate_size + d)
        if config.shared_expert_intermediate_size
        else 0.0,
        router=2.0 * moe * config.num_experts * d,
        head=2.0 * d * (len(config.criteria) or config.vocab_size),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """Bytes held by one process that trains the whole model, activations not counted."""

    weights: int
    master_weights: int
    gradients: int
    optimizer: int


# fp8: the gathered bf16 weights and their FP8 copy, which is kept between micro-batches.
DTYPE_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 3}


def training_bytes(config: ModelConfig, compute: str = "bf16", master: str = "fp32") -> TrainingBytes:
    """AdamW keeps two moments in the master dtype, and gradients are in the master dtype. If the compute dtype differs, the
    weights also have a copy in it."""
    total = count_parameters(config).total
    return TrainingBytes(
        weights=total * DTYPE_BYTES[compute],
        master_weights=0 if master == compute else total * DTYPE_BYTES[master],
        gradients=total * DTYPE_BYTES[master],
        optimizer=2 * total * DTYPE_BYTES[master],
    )


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Forward cost per token of each layer, of the embedding and of the head with its loss, in FLOPs."""

    layers: tuple[float, ...]
    embedding: float
    head: float


# The embedding multiplies nothing: it copies a row in forward and adds one in backward. On machines that do about 150 FLOPs
# in the time of moving a byte, this takes about as long as this many FLOPs per element.
_EMBEDDING_FLOPS_PER_ELEMENT = 1000.0


def layer_costs(config: ModelConfig, sequence_length: int) -> LayerCosts:
    """The costs that a split of layers into pipeline stages should balance (see `flops_per_token`)."""
    flops = flops_per_token(config, sequence_length)
    moe = set(config.moe_layers)
    attention = (flops.attention_projections + flops.attention_scores) / config.num_hidden_layers
    experts = (flops.routed_experts + flops.shared_expert + flops.router) / max(1, len(moe))
    dense = flops.dense_feed_forward / max(1, config.num_hidden_layers - len(moe))
    return LayerCosts(
        layers=tuple(attention + (experts if index in moe else dense) for index in range(config.num_hidden_layers)),
        embedding=_EMBEDDING_FLOPS_PER_ELEMENT * config.hidden_size,
        head=flops.head,
    )


def training_flops(config: RunConfig, done: int = 0) -> float:
    """FLOPs of the steps of a run after its first ``done``, in all stages."""
    return sum(
        flops_per_token(run.model, run.data.sequence_length).training
        * run.tokens_per_step
        * max(0, run.end_step - max(done, run.place.first_step))
        for run in stage_runs(config)
    )
