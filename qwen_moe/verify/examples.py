"""Batches of packed documents with random padding and lengths, and with what each objective of post-training reads.

Where a token has no valid label, fields of log-probabilities, advantages and weights are NaN: nothing may read them.
"""

import math
import random
from itertools import pairwise

import torch

from parallel.sequence import Batch
from qwen_moe.config import RunConfig
from qwen_moe.data.samples import IGNORE, documents_of
from qwen_moe.objectives.policy import policy_weights

SHORTEST = 3  # tokens of a document
LEAST_LENGTH = 4 * SHORTEST + 4  # of a row: two pairs, and padding


def packed_batch(config: RunConfig, step: int) -> Batch:
    """The batch of one step of an objective of post-training, ``[global_batch_size, S]``."""
    rng = random.Random(f"{config.seed}/{step}")
    generator = torch.Generator().manual_seed(1000 * config.seed + step)
    rows, sequence, kind = config.training.global_batch_size, config.data.sequence_length, config.objective.kind
    pairs, empty = kind in ("dpo", "reward_model"), empty_rows(config, step)
    lengths = [[] if row in empty else _lengths(rng, sequence, pairs) for row in range(rows)]
    tokens = torch.randint(0, config.model.vocab_size, (rows, sequence + 1), generator=generator)
    ends, labels = torch.zeros(rows, sequence, dtype=torch.bool), tokens[:, 1:].clone()
    counted = torch.zeros(rows, sequence, dtype=torch.bool)
    for row, documents in enumerate(lengths):
        begin = 0
        for length in documents:
            left_out = (
                kind == "grpo" and rng.random() < 0.15 and row + begin > 0
            )  # a truncated response, never all of them
            labels[row, begin : begin + (length if left_out else rng.randint(0, length - 2))] = IGNORE
            begin += length
            ends[row, begin - 1] = True
        labels[row, begin:] = IGNORE
        counted[row, :begin] = True
    labels[ends] = IGNORE
    batch = {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "counted": counted} | documents_of(ends)
    if kind == "reward_model":
        batch["preferences"] = _preferences(len(config.model.criteria), lengths, sequence, rng)
    elif kind != "sft":
        batch |= _fields(config, labels, lengths, generator)
    if replays(config):
        batch["experts"] = _experts(config, rows, generator)
    return batch


def empty_rows(config: RunConfig, step: int) -> set[int]:
    """The rows of a batch that have nothing to learn from, as at the end of an epoch: in a third of the cases about half of
    them, but never the first. So some ranks have no such row in a step, or in a micro-batch."""
    if random.Random(f"{config.seed}/empty").random() > 1 / 3:
        return set()
    rng = random.Random(f"{config.seed}/{step}/empty")
    return {row for row in range(1, config.training.global_batch_size) if rng.random() < 0.5}


def replays(config: RunConfig) -> bool:
    """Whether the batches of a case have experts to replay: about half of those of ``grpo`` with a MoE model."""
    drawn = random.Random(f"{config.seed}/experts").random() < 0.5
    return drawn and config.objective.kind == "grpo" and bool(config.model.moe_layers)


def _experts(config: RunConfig, rows: int, generator: torch.Generator) -> torch.Tensor:
    """``[rows, S, L, K]``: different experts at random, and in a quarter of places -1. Padding has them too."""
    model = config.model
    places = (rows, config.data.sequence_length, len(model.moe_layers))
    experts = torch.rand(*places, model.num_experts, generator=generator).topk(model.num_experts_per_tok).indices
    known = torch.rand(*places, 1, generator=generator) < 0.75
    return experts.where(known, -1).to(torch.int16)


def spans(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each document that is not padding, in order."""
    found = []
    for row, (starts, counted) in enumerate(zip(batch["document_starts"], batch["counted"], strict=True)):
        begins = [*starts.unique().tolist(), len(starts)]
        found += [(row, begin, end) for begin, end in pairwise(begins) if counted[begin]]
    return found


def _lengths(rng: random.Random, sequence: int, pairs: bool) -> list[int]:
    """The lengths of a row's documents, which leave room for padding in about half of the rows."""
    used = sequence - rng.choice([0, rng.randint(1, sequence // 4)])
    most = used // SHORTEST
    count = 2 * rng.randint(1, min(2, most // 2)) if pairs else rng.randint(1, min(4, most))
    spare = used - count * SHORTEST
    cuts = sorted(rng.randint(0, spare) for _ in range(count - 1))
    return [SHORTEST + b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]


def _preferences(criteria: int, lengths: list[list[int]], sequence: int, rng: random.Random) -> torch.Tensor:
    """``[rows, S, C]``: random judgments of each pair, at the last token of each answer or at the one before it, as where a
    template ends a turn with a line break. Some pairs are judged by some criteria only, or by none."""
    found = torch.zeros(len(lengths), sequence, criteria, dtype=torch.int64)
    for row, documents in enumerate(lengths):
        begin = 0
        for first, second in zip(documents[0::2], documents[1::2], strict=True):
            judged = torch.tensor([rng.choice([-1, 0, 1, 1]) for _ in range(criteria)])
            if row == begin == 0:
                judged[0] = 1  # no step is without a judgment
            for sign, length in ((1, first), (-1, second)):
                begin += length
                found[row, begin - 1 - rng.randint(0, 1)] = sign * judged
    return found


def _fields(config: RunConfig, labels: torch.Tensor, lengths: list[list[int]], generator: torch.Generator) -> Batch:
    """What dpo and grpo read besides the documents. Log-probabilities are near those of an untrained model, so that clipping
    is at work on some tokens and not on others."""
    valid = labels >= 0

    def log_probs() -> torch.Tensor:
        noise = 0.5 * torch.randn(labels.shape, generator=generator, dtype=torch.float64)
        return (noise - math.log(config.model.vocab_size)).where(valid, float("nan"))

    fields = {"reference_log_probs": log_probs()}
    if config.objective.kind == "dpo":
        return fields
    learned = [
        int(part.sum())
        for row, documents in zip(valid, lengths, strict=True)
        for part in row[: sum(documents)].split(documents)
    ]
    policy = config.objective.policy
    of_responses = {
        "advantages": torch.randn(len(learned), generator=generator, dtype=torch.float64),
        "weights": policy_weights(torch.tensor(learned), policy.normalization, policy.longest),
    }
    flat = [length for documents in lengths for length in documents]
    for name, values in of_responses.items():
        by_token = values.repeat_interleave(torch.tensor(flat)).split([sum(documents) for documents in lengths])
        padded = torch.nn.utils.rnn.pad_sequence([*by_token, torch.zeros(labels.shape[1])], batch_first=True)[:-1]
        fields[name] = padded.where(valid, float("nan"))
    return fields | {"old_log_probs": log_probs()}
