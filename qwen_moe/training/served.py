"""Samples answers from a server, which is told to load the weights of every episode.

`RUN/served/` has the directories that the server was told to load, the newest two, each named after a hash of its weights,
and `probe.json`: greedy answers of the server, by which it is checked whether it serves these weights.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from launchers.counted import counted
from launchers.folder.atomic import write_json
from qwen_moe.checkpoint.huggingface.sharded import export_sharded
from qwen_moe.data.ranks import long_on_first_rank, same_on_all_ranks
from qwen_moe.generation.engine import Completion
from qwen_moe.generation.sampling import Sampling
from qwen_moe.rollout.hand_over import hand_over
from qwen_moe.rollout.queries import Query
from qwen_moe.rollout.server import Server, ServerSampler
from qwen_moe.rollout.server_check import TOKENS, Probe, check_probe, is_telling
from qwen_moe.sharding.build import DTYPES
from qwen_moe.training.episode_files import EpisodeFiles
from qwen_moe.training.reference import Say, weights_hash
from qwen_moe.training.responses import Response
from qwen_moe.training.served_answers import ServedAnswers, answered_by
from qwen_moe.training.step import Trainer

FOLDER, PROBE = "served", "probe.json"
_KEPT = 2  # directories: a server may still read the one before
LogProbs = Callable[[Sequence[Response]], list[np.ndarray]]


class ServedSampler:
    """Has the answers to queries sampled by `rollout.server`. ``tokenizer``: the run's; ``ends``: its end tokens.
    ``probing``: queries whose greedy answers are compared. ``log_probs``: the model's own, of each token of the answers.

    The first rank asks the server. All ranks must construct it and call its methods together, which raise UserError if the
    server is not there.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: Path,
        ends: Sequence[int],
        probing: Sequence[Query],
        log_probs: LogProbs,
        say: Say,
    ) -> None:
        config = trainer.config
        assert config.rollout is not None and config.rollout.server is not None
        self.trainer, self.settings, self._say = trainer, config.rollout.server, say
        self._tokenizer, self._log_probs = tokenizer, log_probs
        self._probing = list(probing[: self.settings.check])
        self._length = min(TOKENS, config.rollout.max_new_tokens)
        self.folder = config.run_dir / FOLDER
        self.seconds = 0.0  # that the last hand-over took, with its check
        self._weights, self._gap = "", 0.0
        self._group = dist.new_group(backend="gloo")
        settings = self.settings
        server = Server(
            url=settings.url,
            model=settings.model,
            kind=settings.kind,
            seconds=settings.seconds,
            tries=settings.tries,
            at_once=settings.at_once,
            key_variable=settings.key_variable,
            in_recipe=True,
        )
        self._server = ServerSampler(server, ends, config.model.vocab_size)

    def sample_episode(
        self, files: EpisodeFiles, queries: Sequence[tuple[int, Query]], sampling: Sampling, weights: str
    ) -> None:
        """Have the answers to ``queries``, each with its place in the run, in ``files``: those that are kept of the same
        weights, whose hash is ``weights``, and the server's to all others."""
        self.provide(weights)
        long_on_first_rank(lambda: self._ask(files, queries, sampling, weights))
        facts = {"queries": [query.id for _, query in queries]} | ({"server_gap": self._gap} if self._probing else {})
        same_on_all_ranks(lambda: files.end_sampling(1, weights, facts))

    def answers(self, queries: Sequence[Query], sampling: Sampling) -> list[list[Completion]]:
        """Answers of the present weights to ``queries``, on every rank."""
        self.provide(weights_hash(self.trainer))
        prompts, numbers = [query.tokens for query in queries], list(range(len(queries)))
        return long_on_first_rank(lambda: self._server.generate(prompts, sampling, numbers=numbers))

    def provide(self, weights: str) -> None:
        """Have the server serve the present weights, whose hash is ``weights``. Raises UserError if it does not."""
        if weights == self._weights:
            return
        begin = time.perf_counter()
        if not self._weights:  # not before: a run whose samples are all there needs no server
            long_on_first_rank(lambda: self._server.check(Sampling(temperature=1.0)))
        directory = self.folder / f"weights_{weights}"
        if not same_on_all_ranks(directory.is_dir):
            dtype = DTYPES[self.trainer.config.precision.compute]
            export_sharded(self.trainer.model, directory, dtype, self._tokenizer, self._group)
        same_on_all_ranks(lambda: self._keep(directory))
        long_on_first_rank(lambda: hand_over(self._server, directory, self.settings.reload))
        if self._probing:
            self._check(weights, directory)
        self._weights, self.seconds = weights, time.perf_counter() - begin

    def _keep(self, directory: Path) -> None:
        """Delete what an interrupted export has left, and all directories but ``directory`` and the newest others."""
        os.utime(directory)
        others = [path for path in self.folder.iterdir() if path.is_dir() and path != directory]
        whole = sorted((path for path in others if not path.suffix), key=lambda path: path.stat().st_mtime)
        for path in {*others} - {*whole[-(_KEPT - 1) :]}:
            shutil.rmtree(path, ignore_errors=True)

    def _ask(self, files: EpisodeFiles, queries: Sequence[tuple[int, Query]], sampling: Sampling, weights: str) -> None:
        made_by = files.made_by(weights)
        if answered_by(files.folder) != made_by:
            files.begin()
        with ServedAnswers(files.folder, made_by) as kept:
            left = [place for place in range(len(queries)) if place not in kept.found]
            if len(left) < len(queries):
                self._say(
                    f"{files.folder}: {len(queries) - len(left):,} of "
                    f"{counted(len(queries), 'query has', 'queries have')} their answers"
                )
            prompts = [queries[place][1].tokens for place in left]
            numbers = [queries[place][0] for place in left]
            self._server.generate(
                prompts, sampling, numbers=numbers, done=lambda index, answers: kept.add(left[index], answers)
            )
            places = range(len(queries))
            of_places = [kept.found[place] for place in places]
        files.write_part(0, places, [query.tokens for _, query in queries], of_places)

    def _check(self, weights: str, directory: Path) -> None:
        greedy = Sampling(max_new_tokens=self._length, temperature=0.0, top_p=1.0)
        prompts = [query.tokens for query in self._probing]
        answers = [answer for (answer,) in long_on_first_rank(lambda: self._server.generate(prompts, greedy))]
        own = self._log_probs(
            [
                Response(
                    query=number,
                    tokens=np.array([*prompt, *answer.tokens]),
                    prompt=len(prompt),
                    log_probs=np.array(answer.log_probs),
                    truncated=False,
                )
                for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
            ]
        )
        now = Probe(
            weights,
            [answer.tokens for answer in answers],
            [answer.log_probs for answer in answers],
            [values.astype(np.float64).tolist() for values in own],
        )
        self._gap = now.gap
        same_on_all_ranks(lambda: self._compare(now, directory))

    def _compare(self, now: Probe, directory: Path) -> None:
        before = self._probe_before(now)
        found = check_probe(before, now, self.settings.gap, self._server.server.name(), str(directory))
        self._say(f"{self._server.server.name()}: {found}")
        if before is None or is_telling(before, now):
            write_json(self.folder / PROBE, asdict(now))  # or else small changes would add up unseen

    def _probe_before(self, now: Probe) -> Probe | None:
        """The probe that is kept, if it is of the same number of answers."""
        try:
            values: dict[str, Any] = json.loads((self.folder / PROBE).read_text(encoding="utf-8"))
            probe = Probe(**values)
            return probe if len(probe.tokens) == len(now.tokens) else None
        except (OSError, ValueError, TypeError):
            return None
