"""The queries of a run that samples: read and checked once, and which of them each episode has."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from launchers.counted import counted
from parallel.mesh import Axis
from qwen_moe.config import RunConfig
from qwen_moe.data.chat import Chat
from qwen_moe.data.inputs import TOKENIZER, OrderedInputs
from qwen_moe.data.ranks import same_on_all_ranks
from qwen_moe.data.tokenizer import copy_tokenizer, end_with_turn, read_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import check_prompt
from qwen_moe.generation.tokenizer import end_tokens
from qwen_moe.rollout.queries import Query, digest, read_queries
from qwen_moe.rollout.rewards import RewardSettings, check_values
from qwen_moe.rollout.summary import by_variance
from qwen_moe.training.responses import most_rows


class QuerySamples:
    """What a run that samples reads (`qwen_moe.data.samples.Ordered`): its queries, pass after pass."""

    def __init__(self, queries: Sequence[Query], held_out: Sequence[Query], seed: int, shuffled: bool) -> None:
        self.queries, self.held_out, self._seed, self._shuffled = list(queries), list(held_out), seed, shuffled
        self.fingerprint = hashlib.sha256(f"{digest(queries)} {seed} {shuffled}".encode()).hexdigest()[:32]

    def is_of_this_data(self, fingerprint: str, train_samples: int | None = None) -> bool:
        return fingerprint == self.fingerprint

    def begins_as(self, train_samples: int, samples: int) -> bool:
        """Always true: the order of queries does not depend on how many episodes follow."""
        return True

    def of_episode(self, number: int, size: int) -> list[tuple[int, Query]]:
        """The ``size`` queries of an episode, each with its place in the run, which no other has."""
        places = range(number * size, (number + 1) * size)
        count = len(self.queries)
        orders = {passes: self._order(passes) for passes in {place // count for place in places}}
        return [(place, self.queries[orders[place // count][place % count]]) for place in places]

    def _order(self, passes: int) -> np.ndarray:
        count = len(self.queries)
        if not self._shuffled:
            return np.arange(count)
        return np.random.RandomState([self._seed, passes]).permutation(count)


def open_queries(config: RunConfig, dp: Axis) -> OrderedInputs:
    """The queries of a run on every rank, and its tokenizer. All ranks must call it. Raises UserError for queries that
    cannot be read, rewarded or answered within a row, and for too few rows."""
    kept = config.run_dir / TOKENIZER
    queries, held_out = same_on_all_ranks(lambda: _read(config, kept))
    rollout = config.rollout
    assert rollout is not None
    samples = QuerySamples(queries, held_out, config.data.seed, shuffled=rollout.variances is None)
    return OrderedInputs(config, dp, samples, kept)


def _read(config: RunConfig, kept: Path) -> tuple[list[Query], list[Query]]:
    rollout, directory = config.rollout, config.data.tokenizer
    if rollout is None or directory is None:
        raise UserError(
            "objective.kind grpo samples its own answers: give the section rollout (its queries, episodes and rewards)"
        )
    copy_tokenizer(directory, kept)
    if rollout.chat:
        end_with_turn(kept, Chat(directory).end)
    settings = reward_settings(config)
    tokenizer, length = read_tokenizer(directory), config.data.sequence_length

    def check(query: Query) -> None:
        check_prompt(query.tokens, rollout.max_new_tokens, config.model)
        most, limit = config.model.trainable_length, "up to which model.dual_chunk changes nothing (training is plain)"
        if length <= most:
            most, limit = length, "of data.sequence_length"
        if len(query.tokens) + rollout.max_new_tokens > most:
            raise UserError(
                f"its prompt has {counted(len(query.tokens), 'token')} and its answer up to {rollout.max_new_tokens:,} "
                f"(rollout.max_new_tokens), more than the {most:,} {limit}: shorten it, or "
                "lower rollout.max_new_tokens"
            )
        if settings is not None:
            check_values(settings, query.values)

    def read(names: Sequence[str]) -> list[Query]:
        found: list[Query] = []
        for name in names:
            found += read_queries(Path(name), tokenizer, chat=rollout.chat, checks=[check])
        return found

    queries = read(rollout.queries)
    _check_rows(config, max(len(query.tokens) for query in queries) + rollout.max_new_tokens)
    if rollout.variances is not None:
        queries = by_variance(queries, rollout.variances)
    return queries, read(rollout.held_out)


def _check_rows(config: RunConfig, longest: int) -> None:
    """Raise UserError unless an update's answers always fit into its rows."""
    rollout, training = config.rollout, config.training
    assert rollout is not None
    answers = rollout.queries_per_update * rollout.samples
    needed = most_rows(answers, longest, config.data.sequence_length)
    if needed > training.global_batch_size:
        rows = -(-needed // training.micro_batch_size) * training.micro_batch_size
        raise UserError(
            f"an update learns from {counted(answers, 'answer')} of up to {longest:,} tokens with their prompts, "
            "which take up to "
            f"{counted(needed, 'row')} of {config.data.sequence_length:,}, and training.global_batch_size is "
            f"{training.global_batch_size}: set it to {rows} (fewer rows are computed where answers are short)"
        )


def reward_settings(config: RunConfig) -> RewardSettings | None:
    """How the rewards of `rollout.rewards` are computed; None if there are none."""
    rollout = config.rollout
    assert rollout is not None
    if not rollout.rewards:
        return None
    return RewardSettings(
        rewards=rollout.rewards,
        weights=rollout.reward_weights,
        on_failure=rollout.on_reward_failure,
        seconds=rollout.reward_seconds,
        memory_mib=rollout.reward_memory_mib,
    )


def ends(kept: Path) -> list[int]:
    """The tokens that end an answer, of a run's own tokenizer."""
    return end_tokens(kept, read_tokenizer(kept))
