"""The files of an episode, `RUN/episodes/episode_NNNNNN/`: what was sampled, its rewards, and log-probabilities.

Each group of ranks that samples the same answers writes them (`part_D.*`); `samples.json` says that all have, with hashes of
these files. `rewards.json` and `NAME.npy` follow, so that a run that is killed repeats nothing that was done.
`samples.jsonl` is for people.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launchers.folder.atomic import replaced, write_json, write_text
from qwen_moe.data.content import sha256
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Completion
from qwen_moe.training.responses import Response
from qwen_moe.training.served_answers import NAME as ANSWERS

FOLDER, SAMPLES, REWARDS, TEXT = "episodes", "samples.json", "rewards.json", "samples.jsonl"


@dataclass(frozen=True)
class Part:
    """What one group of ranks sampled: for each of its queries (numbers in the episode) the answers in order."""

    facts: list[dict[str, Any]]  # of each answer: query, prompt (tokens), tokens, truncated
    tokens: np.ndarray  # int32, of prompts and answers one after another
    log_probs: np.ndarray  # float64, of answers
    experts: np.ndarray | None  # int16 [tokens, L, K]; the last token of each answer has UNKNOWN


class EpisodeFiles:
    """The files of episode ``number`` of a run. ``settings``: a hash of what decides an episode beside the weights."""

    def __init__(self, run_dir: Path, number: int, settings: str = "") -> None:
        self.folder, self._settings = run_dir / FOLDER / f"episode_{number:06d}", settings

    def made_by(self, weights: str) -> str:
        """What decides the samples: weights with this hash, and the settings."""
        return f"{weights} {self._settings}".rstrip()

    def begin(self) -> None:
        """Forget what is there. Only one rank may call it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def write_part(
        self,
        group: int,
        queries: Sequence[int],
        prompts: Sequence[Sequence[int]],
        found: Sequence[Sequence[Completion]],
    ) -> None:
        """Write the answers ``found`` of the group of ranks ``group`` to ``prompts``, which are those of ``queries``."""
        facts, tokens, log_probs, experts = [], [], [], []
        for query, prompt, answers in zip(queries, prompts, found, strict=True):
            for answer in answers:
                whole = [*prompt, *answer.tokens]
                truncated = answer.finish_reason == "length"
                facts.append({"query": query, "prompt": len(prompt), "tokens": len(whole), "truncated": truncated})
                tokens += whole
                log_probs += answer.log_probs
                if answer.routing is not None:
                    taken = answer.routing.whole()
                    experts += [taken, torch.full((len(whole) - len(taken), *taken.shape[1:]), -1, dtype=taken.dtype)]
        arrays: dict[str, np.ndarray] = {
            "tokens": np.array(tokens, np.int32),
            "log_probs": np.array(log_probs, np.float64),
        }
        if experts:
            arrays["experts"] = torch.cat(experts).numpy()
        for name, array in arrays.items():
            _save(self.folder / f"part_{group}.{name}.npy", array)
        _write(self.folder / f"part_{group}.json", {"answers": facts})

    def has_samples(self, weights: str | None) -> bool:
        """Whether all groups' samples are there, undamaged, and with ``weights`` given, were sampled from weights with this
        hash and by the same settings: those of a run that was killed before its first checkpoint may have been others.
        Without it an update has already learned from them: raises UserError if they are damaged."""
        facts = _read(self.folder / SAMPLES)
        damaged = [name for name, known in (facts or {}).get("files", {}).items() if _hash(self.folder / name) != known]
        if weights is None and (self.folder / REWARDS).exists() and (facts is None or damaged):
            raise UserError(
                f"{self.folder / (damaged[0] if damaged else SAMPLES)} is gone or damaged, and an update has learned from "
                f"these samples: go back to a checkpoint of an earlier episode, or delete {self.folder} to sample the "
                "rest of it anew"
            )
        return facts is not None and not damaged and (weights is None or facts.get("made_by") == self.made_by(weights))

    def end_sampling(self, groups: int, weights: str, facts: Mapping[str, Any]) -> None:
        files = {path.name: _hash(path) for path in sorted(self.folder.glob("part_*"))}
        _write(
            self.folder / SAMPLES,
            {"weights": weights, "made_by": self.made_by(weights), "groups": groups, "files": files, **facts},
        )

    @property
    def facts(self) -> dict[str, Any]:
        return _read(self.folder / SAMPLES) or {}

    def parts(self) -> list[Part]:
        found = []
        for group in range(self.facts["groups"]):
            path = self.folder / f"part_{group}"
            facts = (_read(path.with_suffix(".json")) or {})["answers"]
            experts = self.folder / f"part_{group}.experts.npy"
            found.append(
                Part(
                    facts,
                    np.load(self.folder / f"part_{group}.tokens.npy"),
                    np.load(self.folder / f"part_{group}.log_probs.npy"),
                    np.load(experts, mmap_mode="r") if experts.exists() else None,
                )
            )
        return found

    def responses(self) -> tuple[list[Response], list[torch.Tensor] | None]:
        """Every response, in the order of queries, and the experts ``[n, L, K]`` of each if they were kept."""
        found: list[tuple[int, Response, np.ndarray | None]] = []
        for part in self.parts():
            at = answered = 0
            for one in part.facts:
                tokens = part.tokens[at : at + one["tokens"]].astype(np.int64)
                size = one["tokens"] - one["prompt"]
                response = Response(
                    query=one["query"],
                    tokens=tokens,
                    prompt=one["prompt"],
                    log_probs=part.log_probs[answered : answered + size],
                    truncated=one["truncated"],
                )
                experts = None if part.experts is None else part.experts[at : at + one["tokens"]]
                found.append((len(found), response, experts))
                at, answered = at + one["tokens"], answered + size
        found.sort(key=lambda one: (one[1].query, one[0]))  # answers to a query are of one group, in their order
        experts_of = [torch.from_numpy(np.array(taken)) for _, _, taken in found if taken is not None]
        return [response for _, response, _ in found], experts_of if len(experts_of) == len(found) else None

    def write_rewards(
        self, rewards: Sequence[float], facts: Mapping[str, Any], lines: Sequence[dict[str, Any]]
    ) -> None:
        write_text(self.folder / TEXT, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        _write(self.folder / REWARDS, {"rewards": list(rewards), **facts})

    def rewards(self, rewarded_by: str) -> list[float] | None:
        """Those that `write_rewards` wrote with this fact; None if they are not there, damaged, or of other rewards: they
        are computed again."""
        found = _read(self.folder / REWARDS)
        return None if found is None or found.get("rewarded_by") != rewarded_by else list(found["rewards"])

    def functions(self) -> dict[str, str]:
        """The hashes of reward functions' files that `write_rewards` wrote, if it did."""
        return dict((_read(self.folder / REWARDS) or {}).get("functions", {}))

    def write_values(self, name: str, values: Sequence[np.ndarray]) -> None:
        """Values of the tokens of all answers, in the order of `responses`."""
        path = self.folder / f"{name}.npy"
        _save(path, np.concatenate(list(values)))
        _write(path.with_suffix(".json"), {"sha256": _hash(path)})

    def values(self, name: str, responses: Sequence[Response]) -> list[np.ndarray] | None:
        """What `write_values` wrote, or None if it was not. Raises UserError if it is damaged: the weights that gave these
        values may have changed since."""
        path = self.folder / f"{name}.npy"
        facts = _read(path.with_suffix(".json"))
        if facts is None and not path.with_suffix(".json").exists():
            return None
        if facts is None or facts.get("sha256") != _hash(path):
            raise UserError(
                f"{path} is damaged: delete {self.folder}, and its samples are made anew from the weights of the newest "
                "checkpoint"
            )
        return np.split(np.load(path), np.cumsum([one.answer for one in responses])[:-1])

    def forget_arrays(self) -> None:
        """Delete what only training reads; the text stays."""
        answers = self.folder / ANSWERS
        for path in (*self.folder.glob("*.npy"), *self.folder.glob("*.json"), answers):
            path.unlink(missing_ok=True)


def _save(path: Path, array: np.ndarray) -> None:
    with replaced(path) as file:
        np.save(file, array)


def _hash(path: Path) -> str:
    """SHA-256 of a file; empty if there is none."""
    return sha256(path) if path.is_file() else ""


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_json(path, {**values, "checksum": _checksum(values)})


def _read(path: Path) -> dict[str, Any] | None:
    """What `_write` wrote; None if it is not there or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        checksum = found.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return found if checksum == _checksum(found) else None
