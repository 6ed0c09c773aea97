"""The documents of packed rows, each computed by itself: no packing, no padding, no mask between documents."""

import torch

from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.verify.examples import spans
from qwen_moe.verify.plain import Answer
from qwen_moe.verify.plain_moe import replaying

Batch = dict[str, torch.Tensor]
Documents = tuple[
    list[torch.Tensor], RouterStatistics | None
]  # hidden states [n, D] of each, and statistics of the rows


def alone(model: DecoderLM, batch: Batch) -> Documents:
    """Every document in a row of its own, from position 0 on. A row of padding has no document, and counts nothing."""
    states: list[torch.Tensor] = []
    by_row: dict[int, RouterStatistics] = {}
    experts = batch.get("experts")
    for row, begin, end in spans(batch):
        replaying(model, None if experts is None else experts[row : row + 1, begin:end])
        hidden, router = model.hidden_states(batch["input_ids"][row : row + 1, begin:end])
        states.append(hidden[0])
        if router is not None:
            sums = [a + b for a, b in zip(by_row[row], router, strict=True)] if row in by_row else router
            by_row[row] = RouterStatistics(*sums)
    if not by_row:
        return states, None
    nothing = RouterStatistics(*(torch.zeros_like(sums) for sums in next(iter(by_row.values()))))
    rows = [by_row.get(row, nothing) for row in range(len(batch["labels"]))]
    return states, RouterStatistics(*(torch.cat(sums, 1) for sums in zip(*rows, strict=True)))


def together(model: DecoderLM, batch: Batch) -> Documents:
    """Rows as they are: documents of a row share the capacity of experts."""
    replaying(model, batch.get("experts"))
    names = ("input_ids", "position_ids", "document_starts", "counted")
    hidden, router = model.hidden_states(*(batch[name] for name in names))
    return [hidden[row, begin:end] for row, begin, end in spans(batch)], router


def answers_of(batch: Batch, states: list[torch.Tensor], model: DecoderLM) -> list[Answer]:
    """Each document's log-probabilities and other fields at its valid labels; of a reward model, the scores and other fields
    at the token that is judged."""
    found = []
    for (row, begin, end), hidden in zip(spans(batch), states, strict=True):
        fields = {name: field[row, begin:end] for name, field in batch.items()}
        if model.config.criteria:
            at = fields["preferences"].abs().sum(-1).nonzero().flatten()
            head = {"scores": hidden[at] @ model.score.weight.T}
        else:
            at = (fields["labels"] >= 0).nonzero().flatten()
            log_probs = (hidden[at] @ model.head_weight.T).log_softmax(-1)
            head = {"log_probs": log_probs[torch.arange(len(at)), fields["labels"][at]]}
        found.append({name: field[at] for name, field in fields.items()} | head)
    return found
