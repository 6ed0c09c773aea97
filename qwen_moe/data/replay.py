"""Routing replay: the experts that tokens took while an answer was sampled, as the field ``experts`` of a batch.

Training then computes the experts that sampling computed, and their weights anew from its own router (arXiv 2510.11370).
Shapes: b rows of S tokens, n tokens of a document, L MoE layers of the whole model in order, K experts a token.
"""

from collections.abc import Sequence

import torch

from launchers.counted import counted
from parallel.sequence import Batch
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError

FIELD = "experts"
UNKNOWN = -1  # the router selects itself


def experts_of_row(length: int, documents: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The experts ``[length, L, K]``, int16, of a packed row. ``documents``: the first token's place in the row and the
    experts ``[n, L, K]`` of each document; at least one. Tokens of no document are UNKNOWN, as are those after the n known
    ones: the last token of a sampled answer was never read. Raises ValueError where a document does not fit into the row."""
    row = torch.full((length, *documents[0][1].shape[1:]), UNKNOWN, dtype=torch.int16)
    for begin, experts in documents:
        if begin < 0 or begin + len(experts) > length:
            raise ValueError(
                f"a document of {counted(len(experts), 'token')} begins at token {begin} of a row of {length}: give "
                "its place in the "
                "row, and cut its experts as its tokens were cut"
            )
        row[begin : begin + len(experts)] = experts
    return row


def check_experts(batch: Batch, model: ModelConfig) -> None:
    """Raise UserError unless ``batch`` has no experts to replay, or those of ``model``'s layers for each of its tokens."""
    if FIELD not in batch:
        return
    experts, layers, top_k = batch[FIELD], len(model.moe_layers), model.num_experts_per_tok
    if not layers:
        raise UserError("the data has experts to replay and the model has none: leave the field out")
    expected = (*batch["labels"].shape, layers, top_k)
    if experts.shape != expected or experts.dtype not in (torch.int16, torch.int32, torch.int64):
        raise UserError(
            f"experts to replay are {experts.dtype} {list(experts.shape)}, but the rows' tokens, {layers} MoE layers and "
            f"{counted(top_k, 'expert')} per token make integers {list(expected)}: the routing was recorded with "
            "another model"
        )
    smallest, largest = (int(value) for value in experts.aminmax())
    if smallest < UNKNOWN or largest >= model.num_experts:
        raise UserError(
            f"an expert to replay is {largest if largest >= model.num_experts else smallest}, but the model has "
            f"{model.num_experts}: give 0 to {model.num_experts - 1}, or {UNKNOWN} where the router selects"
        )
    known = experts >= 0
    _refuse(known.any(-1) & ~known.all(-1), experts, f"give all {top_k}, or {UNKNOWN} in all {top_k} places")
    twice = torch.zeros_like(known[..., 0])
    for place in range(1, top_k):
        twice |= (experts[..., place:] == experts[..., :-place]).any(-1)
    _refuse(twice & known.all(-1), experts, "give each expert once")


def _refuse(wrong: torch.Tensor, experts: torch.Tensor, fix: str) -> None:
    """Raise UserError that names the first token and layer where ``wrong [b, S, L]``."""
    if bool(wrong.any()):
        row, token, layer = wrong.nonzero()[0].tolist()
        raise UserError(
            f"the experts to replay of token {token} of row {row} in MoE layer {layer} are "
            f"{experts[row, token, layer].tolist()}: {fix}"
        )
