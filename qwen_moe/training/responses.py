"""Sampled answers as rows for an update: packed, with advantages, weights and the log-probabilities of their tokens.

A response is a document: its prompt and its answer, whose tokens are learned. Which response is in which row, and every
weight, follow from the whole update, so that no layout and no micro-batch can change the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from parallel.sequence import Batch
from qwen_moe.config import RunConfig
from qwen_moe.data.packing import ROWS_PER_WINDOW, pack
from qwen_moe.data.replay import FIELD, experts_of_row
from qwen_moe.data.samples import IGNORE
from qwen_moe.objectives.policy import group_advantages, policy_weights


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer to the query with number ``query`` of the episode. ``tokens``: of prompt and answer; ``prompt``: how many of
    them are the prompt's. ``log_probs``: the sampler's, of each token of the answer."""

    query: int
    tokens: np.ndarray  # [n] int64
    prompt: int
    log_probs: np.ndarray
    truncated: bool
    reward: float = 0.0

    @property
    def answer(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - self.prompt

    @property
    def learned(self) -> slice:
        """Where the labels of the answer are: each at the token before."""
        return slice(self.prompt - 1, len(self.tokens) - 1)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What the rewards of an update say. ``learned``: whether a response is learned from; ``flat``: groups without
    variance, of ``groups``."""

    advantages: np.ndarray  # [N]
    weights: np.ndarray  # [N]
    learned: np.ndarray  # [N] bool
    groups: int
    flat: int


def judge(config: RunConfig, responses: Sequence[Response]) -> Judged:
    """Advantages over groups, and the weights of tokens over the whole update."""
    rollout, policy = config.rollout, config.objective.policy
    assert rollout is not None
    rewards = torch.tensor([one.reward for one in responses], dtype=torch.float64)
    groups = torch.tensor([one.query for one in responses])
    found = group_advantages(rewards, groups, divide_by_std=policy.divide_by_std)
    flat = np.isin(groups.numpy(), [q for q in groups.unique().tolist() if len(rewards[groups == q].unique()) == 1])
    learned = np.ones(len(responses), bool)
    if rollout.flat_groups == "leave out":
        learned &= ~flat
    if rollout.truncated == "leave out":
        learned &= ~np.array([one.truncated for one in responses])
    lengths = torch.tensor([one.answer if take else 0 for one, take in zip(responses, learned, strict=True)])
    weights = policy_weights(lengths, policy.normalization, policy.longest)
    return Judged(
        advantages=found.advantages.numpy(),
        weights=weights.numpy(),
        learned=learned,
        groups=found.groups,
        flat=found.without_variance,
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a response is: number ``response`` of the update, from ``start`` on in its row."""

    response: int
    start: int


def rows_of(
    lengths: Sequence[int], taken: np.ndarray, length: int, multiple: int, at_least: int = 0
) -> list[list[Place]]:
    """The responses of each row of ``length`` tokens, of those that are ``taken [N]`` (bool); the number of rows is a
    multiple of ``multiple``."""
    numbers = np.flatnonzero(taken)
    packed = pack(np.array(lengths, np.int64)[numbers], length, None)
    count = -(-max(len(packed), at_least, 1) // multiple) * multiple
    found: list[list[Place]] = []
    for row in range(count):
        places, start = [], 0
        for number in numbers[packed.row(row)].tolist() if row < len(packed) else ():
            places.append(Place(response=number, start=start))
            start += lengths[number]
        found.append(places)
    return found


def most_rows(answers: int, longest: int, length: int) -> int:
    """The most rows of ``length`` tokens that `rows_of` takes for as many answers of up to ``longest`` tokens.

    Of the rows that `pack` makes of a window, at most one has room for another answer, so that each of the others holds as
    many answers as fit into a row, or more."""
    fit = length // longest
    windows = (answers - 1) * longest // (length * ROWS_PER_WINDOW) + 1
    return -(-(answers + (windows - 1) * (fit - 1)) // fit)


def batch_of(rows: Sequence[Sequence[Place]], responses: Sequence[Response], length: int, padding: int) -> Batch:
    """The tokens of ``rows``, ``[b, length]``: all fields that do not depend on rewards. The labels are those of all
    answers."""
    shape = (len(rows), length)
    fields = {
        "input_ids": np.full(shape, padding),
        "labels": np.full(shape, IGNORE),
        "document_starts": np.zeros(shape, np.int64),
        "counted": np.zeros(shape, bool),
    }
    for row, places in enumerate(rows):
        end = 0
        for place in places:
            one = responses[place.response]
            at, end = slice(place.start, place.start + len(one.tokens)), place.start + len(one.tokens)
            fields["input_ids"][row, at] = one.tokens
            fields["labels"][row, at][one.learned] = one.tokens[one.prompt :]
            fields["document_starts"][row, at] = place.start
        fields["counted"][row, :end] = True
        fields["document_starts"][row, end:] = end
    fields["position_ids"] = np.arange(length) - fields["document_starts"]
    return {name: torch.from_numpy(values) for name, values in fields.items()}


def with_values(
    batch: Batch,
    rows: Sequence[Sequence[Place]],
    responses: Sequence[Response],
    values: Mapping[str, Sequence[np.ndarray]],
) -> Batch:
    """``batch`` with fields that have a value for each token of each answer, 0 elsewhere."""
    for name, of_responses in values.items():
        field = torch.zeros(batch["labels"].shape, dtype=torch.from_numpy(np.asarray(of_responses[0])).dtype)
        for row, places in enumerate(rows):
            for place in places:
                one = responses[place.response]
                at = slice(place.start + one.prompt - 1, place.start + len(one.tokens) - 1)
                field[row, at] = torch.from_numpy(np.asarray(of_responses[place.response]))
        batch[name] = field
    return batch


def with_judgment(
    batch: Batch, rows: Sequence[Sequence[Place]], responses: Sequence[Response], judged: Judged
) -> Batch:
    """``batch`` with advantages and weights."""
    of_tokens = {
        name: [np.full(one.answer, value) for one, value in zip(responses, values, strict=True)]
        for name, values in (("advantages", judged.advantages), ("weights", judged.weights))
    }
    return with_values(batch, rows, responses, of_tokens)


def with_experts(batch: Batch, rows: Sequence[Sequence[Place]], experts: Sequence[torch.Tensor]) -> Batch:
    """``batch`` with the experts ``[n, L, K]`` that each response's tokens took."""
    length, like = batch["labels"].shape[1], experts[0]
    nothing = like[:0]
    batch[FIELD] = torch.stack(
        [experts_of_row(length, [(p.start, experts[p.response]) for p in places] or [(0, nothing)]) for places in rows]
    )
    return batch
