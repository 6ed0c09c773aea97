"""Mistakes in context parallelism that public projects have shipped, put into this code on purpose.

Each function gets ``patch(object, name, value)`` and breaks what its docstring says; its key in a table below names the
public threads, ``project #number``. What cannot be seen in float64 is in tests/models/test_piece_attention.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from parallel.mesh import Axis, Grids
from parallel.sequence import Batch, SequenceShard
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.models.attention.core import attend
from qwen_moe.models.attention.mask import Span, Visibility
from qwen_moe.models.ops import piece_attention
from qwen_moe.objectives.balance import Balancer
from qwen_moe.sharding import build, context
from qwen_moe.sharding.context import ContextAttention
from qwen_moe.training.step import Trainer
from qwen_moe.verify import ranks

Break = Callable[[Any], None]


def _loss_scaled(power: int) -> Break:
    """The loss, and so every gradient, times or divided by cp."""

    def mutate(patch: Any) -> None:
        original = Trainer._loss
        patch(Trainer, "_loss", lambda t, out, batch: original(t, out, batch) * t.grids.cp.size**power)

    return mutate


def loss_over_own_tokens(patch: Any) -> None:
    """The loss divided by the number of labels of one cp rank's tokens."""
    original = Trainer._count_over_ranks

    def count(trainer: Trainer, micro_batches: Any) -> int:
        return original(trainer, [trainer.sequence.of_batch(batch) for batch in micro_batches])

    patch(Trainer, "_count_over_ranks", count)


def mean_of_each_rank(patch: Any) -> None:
    """Each rank takes the mean over its own labels: 0 / 0 where it has none."""

    def loss(trainer: Trainer, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        whole, _ = trainer.objective.loss(output, batch, trainer.sequence)
        share = trainer.grids.data.size * len(trainer.engine.__dict__.get("_running", [])) or 1
        return whole / (batch["labels"] >= 0).sum() / share

    patch(Trainer, "_loss", loss)


def sequence_of_own_tokens(patch: Any) -> None:
    """The auxiliary loss takes a rank's tokens for the whole sequence's."""
    patch(SequenceShard, "tokens", lambda shard, given: given.numel())


def z_loss_times_cp(patch: Any) -> None:
    original = Balancer.loss

    def loss(b: Balancer, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        balance, z_loss = original(b, *args)
        return balance, z_loss * b.sequence.cp.size

    patch(Balancer, "loss", loss)


def counts_over_tp_only(patch: Any) -> None:
    """Load of experts counted without the other cp ranks' tokens."""
    original = SequenceShard.sum
    patch(SequenceShard, "sum", lambda shard, x: original(SequenceShard(tp=shard.tp), x))


def local_positions(patch: Any) -> None:
    """RoPE with positions from 0 on every rank."""
    patch(SequenceShard, "positions", lambda shard, given, device: torch.arange(given, device=device))


def _of_batch(change: Callable[[Batch, Batch], dict[str, torch.Tensor]]) -> Break:
    """A rank's part of a batch with fields of ``change(whole, part)`` instead."""

    def mutate(patch: Any) -> None:
        original = SequenceShard.of_batch

        def of_batch(shard: SequenceShard, batch: Batch) -> Batch:
            part = original(shard, batch)
            return part | change(batch, part)

        patch(SequenceShard, "of_batch", of_batch)

    return mutate


def positions_of_each_chunk(whole: Batch, part: Batch) -> Batch:
    """RoPE positions begin again with each chunk, as if it were a packed sequence of its own."""
    chunk = part["labels"].shape[1] // 2
    return {"position_ids": part["position_ids"].minimum(torch.arange(2 * chunk) % chunk)}


def labels_rolled_in_the_part(whole: Batch, part: Batch) -> Batch:
    """Labels made from a rank's own tokens: the last of each chunk is the first token of another."""
    return {"labels": part["input_ids"].roll(-1, 1).where(part["labels"] >= 0, IGNORE)}


def last_label_masked(whole: Batch, part: Batch) -> Batch:
    """The last label of each rank's part counts in no loss."""
    labels = part["labels"].clone()
    labels[:, -1] = IGNORE
    return {"labels": labels}


def documents_ignored(whole: Batch, part: Batch) -> Batch:
    """Queries see the documents before their own."""
    return {"document_starts": torch.zeros_like(whole["document_starts"])}


def documents_of_the_part(whole: Batch, part: Batch) -> Batch:
    """The boundaries of documents are found in a rank's part and read as if it were the whole sequence."""
    ends = part["position_ids"].roll(-1, 1) != part["position_ids"] + 1
    return {"document_starts": documents_of(ends)["document_starts"]}


def lengths_rounded_down(patch: Any) -> None:
    """The tokens of a document beyond a multiple of 2 x cp attend to nothing, nor does anything attend to them."""
    original = Visibility._documents.func  # type: ignore[attr-defined]

    def documents(visible: Visibility) -> Any:
        return [[(a, b - (b - a) % 4) for a, b in row if b - a >= 4] for row in original(visible)]

    patch(Visibility, "_documents", property(documents))


def unseen_counts_as_zero(patch: Any) -> None:
    """The logsumexp of no keys is 0, as torch's CPU kernel returns it, instead of minus infinity."""
    original = piece_attention.Partial.__init__

    def init(partial: piece_attention.Partial, q: torch.Tensor) -> None:
        original(partial, q)
        partial.out.zero_()
        partial.lse.zero_()
        partial._seen.is_new = lambda rows, queries: False  # type: ignore[method-assign]

    patch(piece_attention.Partial, "__init__", init)


def blocks_normalized_apart(patch: Any) -> None:
    """Backward of each block of keys with the softmax over that block only."""
    original = piece_attention.Gradients.add

    def add(g: piece_attention.Gradients, dy: Any, tensors: Any, pieces: Any, scale: float) -> Any:
        q, k, v, out, _ = tensors
        own = piece_attention.Partial(q).add(q, k, v, pieces, scale)
        return original(g, dy, (q, k, v, out, own.lse), pieces, scale)

    patch(context, "Gradients", type("Broken", (piece_attention.Gradients,), {"add": add}))


def stale_keys_in_backward(patch: Any) -> None:
    """Backward of the ring uses the rank's own keys in every turn."""
    own = piece_attention.Gradients.add

    def add(g: piece_attention.Gradients, dy: Any, tensors: Any, pieces: Any, scale: float) -> Any:
        q, k, v, *rest = tensors
        first = g.__dict__.setdefault("first", (k, v))
        return own(g, dy, (q, *first, *rest), pieces, scale)

    patch(context, "Gradients", type("Broken", (piece_attention.Gradients,), {"add": add}))


def ring_over_the_world(patch: Any) -> None:
    """Messages of the ring go to the next rank of the world, not of the group."""
    original = context.start_shift

    def shift(x: torch.Tensor, axis: Axis) -> Any:
        import torch.distributed as dist

        return original(x, Axis("world", dist.get_world_size(), dist.get_rank(), None))

    patch(context, "start_shift", shift)


def attention_stays_local(patch: Any) -> None:
    """Tokens are split, but attention was not told: each rank attends to its own."""

    def local(q: Any, k: Any, v: Any, visible: Any, scale: float) -> torch.Tensor:
        return attend(q, k, v, Visibility(), scale)

    patch(build, "ContextAttention", lambda *args: local)


def backward_of_gather_slices(patch: Any) -> None:
    """Backward of the all-gather takes this rank's slice of its own gradients, without the other ranks' share."""

    def own(parts: torch.Tensor, axis: Axis) -> torch.Tensor:
        return parts.chunk(axis.size)[axis.index]

    patch(context, "reduce_scatter", own)


def cut_and_mask_differ(patch: Any) -> None:
    """Tokens are cut in two chunks for balance, while attention takes them for one contiguous part."""

    def spans(index: int, size: int, held: int) -> tuple[Span, Span]:
        half = held // 2
        return Span(index * held, index * held + half, 0), Span(index * held + half, (index + 1) * held, half)

    patch(context, "spans", spans)


def key_heads_repeated_in_turn(patch: Any) -> None:
    """Fewer KV heads than ranks: 0, 1, 0, 1 instead of 0, 0, 1, 1."""
    original = ContextAttention.__call__

    def call(core: ContextAttention, q: Any, k: Any, v: Any, visible: Any, scale: float) -> torch.Tensor:
        times = core.heads.size // k.shape[2]
        return original(core, q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1), visible, scale)

    patch(ContextAttention, "__call__", call)


def _grids(change: Callable[[Grids], None]) -> Break:
    def mutate(patch: Any) -> None:
        original = ranks.make_grids

        def make(*args: Any) -> Grids:
            grids = original(*args)
            change(grids)
            return grids

        patch(ranks, "make_grids", make)

    return mutate


def gradients_over_dp_only(grids: Grids) -> None:
    """Without data parallelism nothing sums the gradients of cp ranks."""
    grids.dense_shard = grids.dense["dp"]


def parameters_over_two_axes(grids: Grids) -> None:
    """FSDP is given the mesh of dp and cp, which it reads as copies over dp and shards over cp."""
    grids.dense_shard = grids.dense["dp", "cp"]


def keys_of_the_tp_group(grids: Grids) -> None:
    """Keys are gathered from the ranks of tensor parallelism, which hold other heads of the same tokens."""
    grids.cp_outer = replace(grids.cp_outer, group=grids.tp.group)


def order_of_ranks(patch: Any) -> None:
    """Capacity is served in the order of ranks, which is not the order of positions."""
    patch(SequenceShard, "_place", lambda shard, cp, tp, segment: (cp * shard.tp.size + tp) * 2 + segment)


def hidden_states_of_whole_sequences(patch: Any) -> None:
    """A pipeline's hidden states in the shape that they have without cp."""
    original = build._shapes

    def shapes(config: Any, model: Any) -> Any:
        found = original(config, model)
        rows, length, size = found.hidden.shape
        return replace(found, hidden=found.hidden.new_empty(rows, length * model.grids.cp.size, size))

    patch(build, "_shapes", shapes)


def evaluation_times_cp(patch: Any) -> None:
    """Right in training; the loss of an evaluation summed over cp, but not divided by it."""
    original = Trainer.evaluate
    patch(Trainer, "evaluate", lambda trainer, batches: original(trainer, batches) * trainer.grids.cp.size)


# The tables: bugs that are shown by the same layout and batches run one after the other in the same processes.
RING: dict[str, Break] = {
    "Megatron-LM #673: loss times cp": _loss_scaled(1),
    "Megatron-LM #906: loss divided by cp": _loss_scaled(-1),
    "verl #6609: loss over one cp rank's tokens": loss_over_own_tokens,
    "slime #73: mean over a rank that has no label": mean_of_each_rank,
    "Megatron-LM #2217: a rank's tokens taken for the sequence's": sequence_of_own_tokens,
    "Megatron-LM #5047: z-loss times cp": z_loss_times_cp,
    "Megatron-LM #3768: load counted over tp only": counts_over_tp_only,
    "Megatron-LM #5243, #4075: positions begin again on a rank": _of_batch(positions_of_each_chunk),
    "mbridge #138, maxtext #4600: labels rolled inside the part": _of_batch(labels_rolled_in_the_part),
    "LlamaFactory #10474: last label of each part masked": _of_batch(last_label_masked),
    "axolotl #3608: documents ignored": _of_batch(documents_ignored),
    "Megatron-Bridge #1292, NeMo Speech #15339: documents of the part": _of_batch(documents_of_the_part),
    "TransformerEngine #3331: lengths rounded down": lengths_rounded_down,
    "TransformerEngine #2186: rows that see nothing": unseen_counts_as_zero,
    "TransformerEngine #1557, Megatron-LM #1464: backward of a block": blocks_normalized_apart,
    "Automodel #3157: backward of the ring with stale keys": stale_keys_in_backward,
    "torchtitan #2808: attention stays local": attention_stays_local,
    "pytorch #152261: cut for balance, masked without": cut_and_mask_differ,
}
WITHOUT_DOCUMENTS: dict[str, Break] = {
    "Megatron-LM #560: positions of the part": local_positions,
    "Automodel #1260: backward of the all-gather only slices": backward_of_gather_slices,
    "torchtitan #2446: tp and cp": _grids(keys_of_the_tp_group),
    "Automodel #2768: parameters over two axes": _grids(parameters_over_two_axes),
    "drops in the order of ranks": order_of_ranks,
}
ALONE: dict[str, Break] = {"torchtitan #685: no sum of gradients without dp": _grids(gradients_over_dp_only)}
OVER_TP: dict[str, Break] = {"Megatron-LM #6746: messages to ranks of the world": ring_over_the_world}
HEADS: dict[str, Break] = {
    "LlamaFactory #10794, vllm-omni #5716: fewer KV heads than ranks": key_heads_repeated_in_turn
}
