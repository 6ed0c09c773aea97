"""The decoder of every family: embedding, pre-norm layers, final norm, head.

Shapes: B batch, S sequence, D hidden, V vocabulary, C criteria of a reward model, L MoE layers, E experts, K top-k.
Parameter names are Hugging Face's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from parallel.gemm import linear
from qwen_moe.config import ModelConfig, Recompute
from qwen_moe.models.attention.cache import Cache
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.head.cross_entropy import linear_cross_entropy
from qwen_moe.models.head.log_probs import linear_log_probs
from qwen_moe.models.head.scores import linear_scores
from qwen_moe.models.linear import Linear
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.parts import Given, Moving, Part, join, join_statistics, landed, split
from qwen_moe.models.recompute import Recomputed, in_every_call, once
from qwen_moe.models.rope import RotaryTables, make_rope
from qwen_moe.models.sequence import SequencePart, WholeSequence

# (hidden [B, S, D], head weight [V, D], labels [B, S], rows of logits per chunk) -> [] or [B, S]
CrossEntropy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
LogProbs = CrossEntropy


class LossSums(NamedTuple):
    """One micro-batch's losses as sums over its tokens. ``router`` fields have a leading layer dim [L]."""

    cross_entropy: torch.Tensor  # [], sum over valid tokens, in nats
    tokens: torch.Tensor  # [] int64, number of valid tokens (label not -100)
    router: RouterStatistics | None  # prob_sum, counts [L, B, E], z_sum, dropped [L, B]; None for dense models


class DecoderLayer(nn.Module):
    """x = x + attention(norm(x)), then x + feed-forward or MoE of norm(x).

    The parts of a micro-batch go through it in turn: while the rows of one travel, the next computes. All go through one
    call, so that FSDP gathers weights and reduces gradients once. With ``recompute``, backward computes everything again
    except attention itself, whose cost grows with the square of the sequence: its inputs and output are kept.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, index)
        self.is_moe = config.is_moe_layer(index)
        self.mlp = MoE(config) if self.is_moe else FeedForward(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, parts: Sequence[Part], given: Sequence[Given], recompute: Recomputed | None = None, land: bool = True
    ) -> tuple[list[Part], list[RouterStatistics]]:
        """The parts after the layer, and the router's statistics of each, if there is one. Without ``land``, rows of two
        parts or more may still be on their way back, for the next layer to wait for."""
        if recompute is None:
            return self._feed_forward(map(self._attended, parts, given), given, land)
        xs, ys = [landed(part) for part in parts], []
        for x, one in zip(xs, given, strict=True):
            q, k, v = recompute(self._heads, x, one.rotary)
            ys.append(self.self_attn.attend(q, k, v, one.visible, one.rotary.softmax_scale))
        return recompute(self._after_attention, xs, ys, given, land)

    def read(
        self,
        x: torch.Tensor,
        cache: Cache,
        wanted: torch.Tensor | None,
        chosen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The layer's output for new tokens ``[1, N, D]`` of cached sequences; of the tokens ``wanted`` alone if given.
        ``chosen`` receives the experts ``[n, K]`` of the n tokens that a MoE layer computes, if there are any."""
        q, k, v = self.self_attn.unrotated_heads(self.input_layernorm(x))
        if wanted is not None:
            x, q = x[:, wanted], q[:, wanted]
        y = cache.attend(self.self_attn.layer, q, k, v, wanted is not None)
        if not x.shape[1]:
            return x
        x = x + self.self_attn.output(y)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp.read(normed, chosen) if isinstance(self.mlp, MoE) else self.mlp(normed))

    def _heads(self, x: torch.Tensor, rotary: RotaryTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.self_attn.heads(self.input_layernorm(x), rotary)

    def _attended(self, part: Part, given: Given) -> torch.Tensor:
        x = landed(part)
        return x + self.self_attn(self.input_layernorm(x), given.rotary, given.visible)

    def _after_attention(
        self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], given: Sequence[Given], land: bool
    ) -> tuple[list[Part], list[RouterStatistics]]:
        attended = (x + self.self_attn.output(y) for x, y in zip(xs, ys, strict=True))
        return self._feed_forward(attended, given, land)

    def _feed_forward(
        self, xs: Iterable[torch.Tensor], given: Sequence[Given], land: bool
    ) -> tuple[list[Part], list[RouterStatistics]]:
        """``xs`` are taken one by one: each is computed while the rows of the one before travel."""
        if not isinstance(self.mlp, MoE):
            return [x + self.mlp(self.post_attention_layernorm(x)) for x in xs], []
        index = self.self_attn.layer
        if len(given) == 1:
            (x,), (one,) = xs, given
            y, of_part = self.mlp(self.post_attention_layernorm(x), one.counted, one.experts.get(index))
            return [x + y], [of_part]
        kept, sent, statistics = [], [], []
        for x, one in zip(xs, given, strict=True):
            rows, of_part = self.mlp.send(self.post_attention_layernorm(x), one.counted, one.experts.get(index))
            kept.append(x)
            sent.append(rows)
            statistics.append(of_part)
        moving = [Moving(x, back) for x, back in zip(kept, self.mlp.through_experts(sent), strict=True)]
        return [landed(part) for part in moving] if land else list(moving), statistics


class Layers(nn.Module):
    """Decoder layers by their index in the whole model; other stages may hold the rest. Iterates in order of depth."""

    def __init__(self, config: ModelConfig, indices: Iterable[int]) -> None:
        super().__init__()
        for index in indices:
            self.add_module(str(index), DecoderLayer(config, index))

    def __iter__(self) -> Iterator[DecoderLayer]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> DecoderLayer:
        return self._modules[str(index)]  # type: ignore[return-value]


class Decoder(nn.Module):
    """Embedding, layers and final norm: Hugging Face's ``model.`` prefix."""

    def __init__(self, config: ModelConfig, layers: Iterable[int], *, embedding: bool, norm: bool) -> None:
        super().__init__()
        if embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Layers(config, layers)
        if norm:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DecoderLM(nn.Module):
    """A causal language model: ``model(input_ids [B, S]) -> logits [B, S, V]``. With ``config.criteria`` it is a reward
    model, which returns scores ``[B, S, C]`` instead.

    ``recompute``: each layer's activations are dropped in forward and computed again in backward; ``selective`` keeps those
    of attention itself. ``ep_overlap``: in training, the two halves of a micro-batch take turns in each layer, so that one
    computes while the rows of the other travel to experts and back. ``backward_in_halves``: backward comes in the parts that
    zero-bubble schedules make of it, so that what is recomputed is kept from one to the next. ``layers`` (default all)
    selects consecutive layers for a pipeline stage: without layer 0 the module takes hidden states instead of token ids, and
    without the last layer it returns hidden states before the final norm.
    """

    def __init__(self, config: ModelConfig, recompute: Recompute = "none", layers: Sequence[int] | None = None) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.config, self.recompute, self.ep_overlap = config, recompute, False
        self.backward_in_halves = False
        self.rope = make_rope(config)
        self.first, self.last = layers[0] == 0, layers[-1] == config.num_hidden_layers - 1
        embedding = self.first or (self.last and config.tied_head)
        self.model = Decoder(config, layers, embedding=embedding, norm=self.last)
        if self.last and config.has_lm_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if self.last and config.criteria:
            self.score = Linear(config.hidden_size, len(config.criteria), bias=False)
        # Replaced where sequences and the vocabulary are split over ranks.
        self.sequence: SequencePart = WholeSequence()
        self.cross_entropy: CrossEntropy = linear_cross_entropy
        self.log_probs: LogProbs = linear_log_probs

    @property
    def head_weight(self) -> torch.Tensor:
        """The head's weight ``[V, D]``: with tied embeddings, the embedding itself."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Scores ``[..., C]`` of final normed states ``x [..., D]``, float32 (float64 for float64)."""
        return linear_scores(x, self.score.weight)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        counted: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterStatistics | None]:
        """Final normed states ``[B, S, D]`` and the routers' statistics, stacked over MoE layers.

        ``document_starts [B, S]`` keep attention inside each document: for each token of the whole sequence (also of parts
        on other devices) the index of its document's first token. ``counted [B, S]``, also of the whole sequence, is false
        for padding, which routers then do not count. ``experts [B, S, L, K]`` replay a routing: for each token and MoE layer
        of the whole model the experts to use, or -1 where the router selects them itself. On a later pipeline stage
        ``input_ids`` are hidden states; before the last stage the result feeds the next stage.
        """
        seq = input_ids.shape[1] if self.first else self.sequence.given_length(input_ids.shape[1])
        if position_ids is None:
            position_ids = self.sequence.positions(seq, input_ids.device).unsqueeze(0)
        x = self.model.embed_tokens(input_ids) if self.first else input_ids
        rotary = self.rope.tables(position_ids, x.dtype)
        visible = Visibility(starts=document_starts)
        of_layers = {} if experts is None else self._by_layer(experts)
        halved = self.ep_overlap and self.training and x.shape[0] % 2 == 0
        parts, given = split(x, Given(rotary, visible, counted, of_layers), 2 if halved else 1)
        collected = []
        again = once if self.backward_in_halves else in_every_call
        for layer in self.model.layers:
            if self.recompute == "full" and self.training:
                parts, statistics = again(layer, parts, given)
            elif self.recompute == "selective" and self.training:
                # What is recomputed ends with rows that are back: those on their way would have to be kept.
                parts, statistics = layer(parts, given, recompute=again, land=True)
            else:
                parts, statistics = layer(parts, given, land=False)
            if statistics:
                collected.append(join_statistics(statistics))
        x = join(parts)
        router = RouterStatistics(*(torch.stack(fields) for fields in zip(*collected))) if collected else None
        return (self.model.norm(x) if self.last else x), router

    def _by_layer(self, experts: torch.Tensor) -> dict[int, torch.Tensor]:
        """The experts ``[B, held, K]`` of the held tokens by layer index, from those of all MoE layers."""
        held = self.sequence.held(experts)
        return {layer: held[:, :, place] for place, layer in enumerate(self.config.moe_layers)}

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x, _ = self.hidden_states(input_ids, position_ids, document_starts)
        return self.scores(x) if self.config.criteria else linear(x, self.head_weight)

    @torch.no_grad()
    def read(
        self,
        x: torch.Tensor,
        cache: Cache,
        wanted: torch.Tensor | None = None,
        chosen: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Read new tokens ``[1, N]`` of cached sequences (on a later pipeline stage their hidden states) and return their
        hidden states, normed after the last layer: ``[1, N, D]``. ``wanted``: indices of the only tokens whose states are
        needed; the last layer then computes no others. ``chosen`` receives the experts ``[n, K]`` of each MoE layer here, of
        the n held tokens that it computed; a layer that computed none is left out."""
        x = self.model.embed_tokens(x) if self.first else x
        for layer in self.model.layers:
            final = layer.self_attn.layer == self.config.num_hidden_layers - 1
            x = layer.read(x, cache, wanted if final else None, chosen)
        return self.model.norm(x) if self.last else x

    def loss_sums(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        chunk_tokens: int = 1024,
    ) -> LossSums:
        """This micro-batch's sums. ``labels [B, S]`` are already shifted to the next token; -100 is ignored."""
        x, router = self.hidden_states(input_ids, position_ids, document_starts)
        loss = self.cross_entropy(x, self.head_weight, labels, chunk_tokens)
        return LossSums(loss, (labels >= 0).sum(), router)
