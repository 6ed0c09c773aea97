"""Episodes of a run that learns from its own samples: sample, reward, compare with the reference, learn.

An episode's answers are sampled from the weights at its beginning and kept (`episode_files`). A run that is killed samples
nothing again that is there, so it continues to the same bits. Every rank of a run takes part in all that is done here.
"""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from launchers.counted import counted
from launchers.folder.run_folder import CHECKPOINTS
from parallel.sequence import Batch
from qwen_moe.checkpoint.directory import list_checkpoints
from qwen_moe.checkpoint.train_state import read_train_state
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import OrderedInputs
from qwen_moe.data.ranks import same_on_all_ranks
from qwen_moe.data.replay import FIELD
from qwen_moe.data.samples import rank_samples
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Completion
from qwen_moe.generation.sampling import Sampling
from qwen_moe.rollout.queries import Query
from qwen_moe.runs.identity import Rule, flat
from qwen_moe.runs.recorder import Recorder
from qwen_moe.training.episode_files import EpisodeFiles
from qwen_moe.training.log_probs import Frozen, frozen_model, label_log_probs
from qwen_moe.training.queries import QuerySamples, ends
from qwen_moe.training.reference import COLUMN, LOAD_FROM, REWARD_MODEL, Say, keep_or_compare, weights_hash
from qwen_moe.training.responses import (
    Judged,
    Place,
    Response,
    batch_of,
    judge,
    rows_of,
    with_experts,
    with_judgment,
    with_values,
)
from qwen_moe.training.restore import load_start
from qwen_moe.training.rewards import Rewards
from qwen_moe.training.sampler import PolicySampler
from qwen_moe.training.served import ServedSampler
from qwen_moe.training.step import Trainer

OLD = "old_log_probs"


@dataclass(kw_only=True)
class _Packed:
    """Responses, and which of them each row holds."""

    responses: list[Response]
    experts: list[torch.Tensor] | None = None
    rows: list[list[Place]]


@dataclass(kw_only=True)
class _Update(_Packed):
    """What one optimizer step learns from."""

    judged: Judged
    values: dict[str, list[np.ndarray]]


class Episodes:
    """The episodes of one run on this rank. ``step``s count the batches that the run has read."""

    def __init__(self, config: RunConfig, trainer: Trainer, inputs: OrderedInputs, say: Say) -> None:
        assert config.rollout is not None and isinstance(inputs.batches, QuerySamples) and inputs.tokenizer is not None
        self.config, self.rollout, self.trainer, self._say = config, config.rollout, trainer, say
        self._samples, self._number = inputs.batches, -1
        self._made_by = _hash([flat(config, {Rule.TRAJECTORY}), inputs.batches.fingerprint])
        self._update = 0
        self._tokenizer = read_tokenizer(inputs.tokenizer)
        self._ends = ends(inputs.tokenizer)
        self._sampler: PolicySampler | ServedSampler
        if self.rollout.server is None:
            self._sampler = PolicySampler(trainer, self._ends, self._tokenizer.decode, self.rollout.batch)
        else:
            queries = self._samples.queries
            self._sampler = ServedSampler(trainer, inputs.tokenizer, self._ends, queries, self._own_log_probs, say)
        self._updates: list[_Update] = []
        self._facts: dict[str, float] = {}
        self._tokens = 0
        tokenizer = inputs.tokenizer
        same_on_all_ranks(lambda: self._open_rewards(tokenizer))
        self._frozen: Frozen | None = None
        if COLUMN in trainer.objective.fields:
            if config.checkpoint.load_from is None:
                raise UserError(
                    f"objective.policy.kl {config.objective.policy.kl} compares with the model that the run begins from: "
                    "give checkpoint.load_from, or leave the divergence out"
                )
            self._frozen = frozen_model(trainer)
            load_start(config, self._frozen.model, say)

    _rewards: Rewards  # on rank 0 alone

    def _open_rewards(self, tokenizer: Path) -> None:
        self._rewards = Rewards(self.config, tokenizer)

    def check_models(self, begins: bool) -> None:
        """Raise UserError if a run that does not begin (``begins``) goes on with another reference or reward model."""
        models = {} if self._frozen is None else {LOAD_FROM: weights_hash(self.trainer, self._frozen.model)}
        if self.rollout.reward_model is not None:
            models[REWARD_MODEL] = same_on_all_ranks(lambda: self._rewards.model_files)
        if models:
            keep_or_compare(self.config, models, begins)

    def close(self) -> None:
        if dist.get_rank() == 0:
            self._rewards.close()

    def micro_batches(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of a step; samples first where its episode has no samples yet."""
        number, update = divmod(step, self.rollout.updates_per_episode)
        if number != self._number:
            self._open(number, at_begin=update == 0)
        one, self._update = self._updates[update], update
        self._tokens = max(1, sum(len(one.responses[place.response].tokens) for row in one.rows for place in row))
        return [
            with_judgment(
                with_values(self._batch(one, rows), rows, one.responses, one.values), rows, one.responses, one.judged
            )
            for rows in self._own(one.rows)
        ]

    @property
    def tokens(self) -> int:
        """Tokens of the last step's micro-batches on all ranks, without padding: 1 where there is nothing to learn from, so
        that a step has a speed."""
        return self._tokens

    def facts(self) -> dict[str, float]:
        """Figures of the last step's episode and of its part of it, for the record."""
        one = self._updates[self._update]
        used = one.judged.learned
        served = {"hand_over_seconds": self._sampler.seconds} if isinstance(self._sampler, ServedSampler) else {}
        return (
            self._facts
            | served
            | {
                "used_answers": float(used.mean()),
                "flat_groups": one.judged.flat / one.judged.groups,
            }
        )

    def _open(self, number: int, at_begin: bool) -> None:
        """Have the samples of an episode, its rewards and its log-probabilities, from files where they are there."""
        files = EpisodeFiles(self.config.run_dir, number, self._made_by)
        weights = weights_hash(self.trainer) if at_begin else None
        begin = time.perf_counter()
        if not same_on_all_ranks(lambda: files.has_samples(weights)):
            self._sample(files, number, weights or weights_hash(self.trainer))
        sampled = time.perf_counter()
        responses, experts = files.responses()
        queries = self._samples.of_episode(number, self.rollout.queries_per_episode)
        rewards = same_on_all_ranks(lambda: self._reward(files, number, responses, [query for _, query in queries]))
        responses = [replace(one, reward=reward) for one, reward in zip(responses, rewards, strict=True)]
        self._updates = self._cut(responses, experts)
        gap = self._compute(files, responses)
        answers = np.array([one.answer for one in responses])
        self._facts = {
            "reward": math.fsum(rewards) / len(rewards),
            "reward_std": float(np.mean([np.std([one.reward for one in group]) for group in self._groups(responses)])),
            "answer_tokens": float(answers.mean()),
            "truncated": sum(one.truncated for one in responses) / len(responses),
            "sampling_seconds": sampled - begin,
            "preparing_seconds": time.perf_counter() - sampled,
        } | gap
        if "server_gap" in files.facts:
            self._facts["server_gap"] = files.facts["server_gap"]
        self._number = number
        if dist.get_rank() == 0:
            self._forget(number)

    def _groups(self, responses: Sequence[Response]) -> list[Sequence[Response]]:
        size = self.rollout.samples
        return [responses[first : first + size] for first in range(0, len(responses), size)]

    def _sample(self, files: EpisodeFiles, number: int, weights: str) -> None:
        rollout = self.rollout
        queries = self._samples.of_episode(number, rollout.queries_per_episode)
        sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=1.0,
            top_p=1.0,
            samples=rollout.samples,
            seed=self.config.seed,
        )
        self._sampler.sample_episode(files, queries, sampling, weights)

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without its end token."""
        whole = list(tokens)
        return self._tokenizer.decode(whole[:-1] if whole and whole[-1] in self._ends else whole)

    def _reward(
        self, files: EpisodeFiles, number: int, responses: Sequence[Response], queries: Sequence[Query]
    ) -> list[float]:
        self._rewards.import_changed()
        rewarded_by = _hash(self._rewards.identity())
        kept = files.rewards(rewarded_by)
        if kept is not None:
            return kept
        functions = self._rewards.functions()
        before = files.functions() or EpisodeFiles(self.config.run_dir, number - 1, self._made_by).functions()
        for name in [name for name, file in functions.items() if before.get(name, file) != file]:
            self._say(f"the file of the reward {name} changed: it decides from episode {number} on")
        texts = [self._text(one.tokens[one.prompt :].tolist()) for one in responses]
        rewards, parts = self._rewards.score(responses, queries, texts)
        lines = [
            {
                "query": queries[one.query].id,
                "prompt": queries[one.query].prompt,
                "answer": text,
                "reward": reward,
                "parts": part,
                "tokens": one.answer,
                "truncated": one.truncated,
            }
            for one, text, reward, part in zip(responses, texts, rewards, parts, strict=True)
        ]
        facts = {"episode": number, "rewarded_by": rewarded_by, "functions": functions}
        files.write_rewards(rewards, facts, lines)
        return rewards

    def _cut(self, responses: Sequence[Response], experts: list[torch.Tensor] | None) -> list[_Update]:
        """The parts of an episode that its steps learn from. Rows hold what is learned from, and nothing else."""
        config, training = self.config, self.config.training
        size = self.rollout.queries_per_update * self.rollout.samples
        grids = self.trainer.grids
        # Pipelines run a fixed number of micro-batches.
        at_least = training.global_batch_size if grids.pp.size > 1 else 0
        found = []
        for first in range(0, len(responses), size):
            own = list(responses[first : first + size])
            lengths = [len(one.tokens) for one in own]
            judged, multiple = judge(config, own), training.micro_batch_size * grids.dp.size
            rows = rows_of(lengths, judged.learned, config.data.sequence_length, multiple, at_least)
            taken = None if experts is None else experts[first : first + size]
            found.append(_Update(responses=own, experts=taken, rows=rows, judged=judged, values={}))
        return found

    def _own(self, rows: list[list[Place]]) -> list[list[list[Place]]]:
        """The rows of each of this data-parallel rank's micro-batches."""
        return [rows[first : first + count] for first, count in self._ranges(rows, self.trainer.grids.dp.index)]

    def _ranges(self, rows: list[list[Place]], rank: int) -> list[tuple[int, int]]:
        return list(rank_samples(0, len(rows), self.config.training.micro_batch_size, rank, self.trainer.grids.dp.size))

    def _batch(self, one: _Packed, rows: list[list[Place]]) -> Batch:
        batch = batch_of(rows, one.responses, self.config.data.sequence_length, self._ends[0])
        return batch if one.experts is None else with_experts(batch, rows, one.experts)

    def _compute(self, files: EpisodeFiles, responses: Sequence[Response]) -> dict[str, float]:
        """Give every update the old and the reference's log-probabilities. Returns how far the trainer's are from the
        sampler's."""
        sampled = [one.log_probs for one in responses]
        gap: dict[str, float] = {}
        old = sampled
        if self.rollout.old_log_probs == "trainer":
            old = self._kept(files, OLD, responses, None)
            learned = np.concatenate([one.judged.learned for one in self._updates])
            pairs = [(o, s) for o, s, counts in zip(old, sampled, learned, strict=True) if counts]
            apart = np.abs(np.concatenate([o.astype(np.float64) - s for o, s in pairs])) if pairs else np.zeros(1)
            gap = {"sampler_gap_max": float(apart.max()), "sampler_gap_mean": float(apart.mean())}
        values = {OLD: old}
        if self._frozen is not None:
            values[COLUMN] = self._kept(files, COLUMN, responses, self._frozen)
        first = 0
        for one in self._updates:
            one.values = {name: found[first : first + len(one.responses)] for name, found in values.items()}
            first += len(one.responses)
        return gap

    def _kept(
        self, files: EpisodeFiles, name: str, responses: Sequence[Response], of: Frozen | None
    ) -> list[np.ndarray]:
        """Log-probabilities of all answers' tokens, 0 in answers that are not learned from: kept ones, or of the present
        weights or of ``of``."""
        kept = same_on_all_ranks(lambda: files.values(name, responses))
        if kept is not None:
            return kept
        found = [values for one in self._updates for values in self._log_probs(one, of)]
        same_on_all_ranks(lambda: files.write_values(name, found))
        return found

    def _own_log_probs(self, responses: Sequence[Response]) -> list[np.ndarray]:
        """What the present weights give to the tokens of answers."""
        taken, grids = np.ones(len(responses), bool), self.trainer.grids
        multiple = self.config.training.micro_batch_size * grids.dp.size
        lengths = [len(one.tokens) for one in responses]
        rows = rows_of(lengths, taken, self.config.data.sequence_length, multiple)
        return self._log_probs(_Packed(responses=list(responses), rows=rows), None)

    def _log_probs(self, one: _Packed, of: Frozen | None) -> list[np.ndarray]:
        batches = [self._batch(one, rows) for rows in self._own(one.rows)]
        if of is not None:
            for batch in batches:
                batch.pop(FIELD, None)  # the reference's router chooses for itself
        dtype = np.float64 if self.config.precision.compute == "fp64" else np.float32
        found = [np.zeros(response.answer, dtype) for response in one.responses]
        for index, everywhere in enumerate(label_log_probs(self.trainer, batches, of)):
            for rank, of_rank in enumerate(everywhere.numpy()):
                first, _ = self._ranges(one.rows, rank)[index]
                for place, row in enumerate(of_rank):
                    for at in one.rows[first + place]:
                        learned = one.responses[at.response].learned
                        found[at.response] = row[at.start + learned.start : at.start + learned.stop].copy()
        return found

    def _forget(self, number: int) -> None:
        """Delete the arrays of episodes that no kept checkpoint can come back to."""
        kept = list_checkpoints(self.config.run_dir / CHECKPOINTS)
        oldest = (read_train_state(kept[0]).step if kept else 0) // self.rollout.updates_per_episode
        for earlier in range(max(0, oldest - 50), min(oldest, number)):
            EpisodeFiles(self.config.run_dir, earlier).forget_arrays()

    def after(self, done: int, recorder: Recorder) -> None:
        """Measure the mean reward of greedy answers to the held-out queries: before the first step, every
        `rollout.held_out_interval` episodes, and after the last step. All ranks must call it."""
        held_out = self._samples.held_out
        every = self.rollout.held_out_interval * self.rollout.updates_per_episode
        if not held_out or not (done in (0, self.config.end_step) or (every and done % every == 0)):
            return
        sampling = Sampling(max_new_tokens=self.rollout.max_new_tokens, temperature=0.0, top_p=1.0, samples=1)
        everyone = self._sampler.answers(held_out, sampling)
        reward = same_on_all_ranks(lambda: self._mean_reward(held_out, everyone))
        record = {"step": done, "held_out_reward": reward, "held_out_queries": len(held_out)}
        text = f"mean reward of greedy answers to {counted(len(held_out), 'held-out query')} {reward:.4f}"
        recorder.event(record, f"step {done}: {text}")

    def _mean_reward(self, queries: Sequence[Query], answers: Sequence[Sequence[Completion]]) -> float:
        responses = [
            Response(
                query=number,
                tokens=np.array([*query.tokens, *answer.tokens]),
                prompt=len(query.tokens),
                log_probs=np.zeros(0),
                truncated=answer.finish_reason == "length",
            )
            for number, (query, (answer,)) in enumerate(zip(queries, answers, strict=True))
        ]
        texts = [self._text(one.tokens[one.prompt :].tolist()) for one in responses]
        rewards, _ = self._rewards.score(responses, queries, texts)
        return math.fsum(rewards) / len(rewards)


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
