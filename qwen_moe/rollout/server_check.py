"""Whether a server serves the weights that it should: the log-probabilities that it gives its answers, against ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from launchers.counted import counted
from qwen_moe.errors import UserError
from qwen_moe.generation.likelihood import Likelihood, ScoredText
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.session import Session
from qwen_moe.rollout.queries import Query
from qwen_moe.rollout.server import Sampler

TOKENS = 64  # of an answer that is compared, at most
_TELLING = 1e-3  # nats a token that weights must have changed log-probabilities by to tell them from the ones before


@dataclass(frozen=True)
class Probe:
    """Greedy answers of a server to the same prompts at some time. ``weights``: a hash of those that it was told to load.
    ``served``, ``own``: what the server and the model itself give each token of ``tokens``."""

    weights: str
    tokens: list[list[int]]
    served: list[list[float]]
    own: list[list[float]]

    @property
    def gap(self) -> float:
        """How far both are apart: nats a token, the mean over answers."""
        return mean_gap(self.served, [sum(one) for one in self.own])


def mean_gap(served: Sequence[Sequence[float]], own: Sequence[float]) -> float:
    """The mean over answers of how far two log-probabilities are apart, in nats a token: ``served`` of each token, ``own``
    of whole answers."""
    return fmean(abs(sum(one) - other) / len(one) for one, other in zip(served, own, strict=True))


def changes(before: Probe, now: Probe) -> tuple[float, float, float]:
    """By how much log-probabilities have changed from ``before`` to ``now``: the server's, the model's own, and how far the
    two changes are apart; nats a token, root mean squares over tokens of answers that have stayed the same."""
    pairs: list[tuple[float, float]] = []  # how the server's and the model's have changed
    of_answers = zip(before.tokens, before.served, before.own, now.tokens, now.served, now.own, strict=True)
    for old, old_served, old_own, new, served, own in of_answers:
        for place, (token, other) in enumerate(zip(old, new, strict=False)):
            if token != other:
                break
            pairs.append((served[place] - old_served[place], own[place] - old_own[place]))
    if not pairs:
        return 0.0, 0.0, 0.0
    server, model, apart = ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs])
    return _rms(server), _rms(model), _rms(apart)


def _rms(values: list[float]) -> float:
    return math.sqrt(fmean(value**2 for value in values))


def is_telling(before: Probe, now: Probe) -> bool:
    """Whether the model has changed enough to tell its weights from those of ``before`` by ``now``."""
    return changes(before, now)[1] > _TELLING


def check_probe(before: Probe | None, now: Probe, limit: float, where: str, told: str) -> str:
    """Raise UserError unless a server serves the weights that it was told to load; returns what was found.

    It does not if the log-probabilities of ``now`` are more than ``limit`` nats a token apart on average, or if those of the
    server have not changed as the model's have since ``before``: then its weights are older ones, however close to the new.
    ``where``, ``told``: the server and the directory in messages.
    """
    answers = counted(len(now.tokens), "greedy answer")
    facts = f"log-probabilities of {answers} are {now.gap:.2g} nats a token from the model's"
    if now.gap > limit:
        raise UserError(
            f"{where}: its {facts}, more than {limit:g}: it serves other weights than {told}, which it was told to load. "
            "Have it load them, or, if it computes in a much narrower dtype, raise rollout.server.gap"
        )
    if before is not None and is_telling(before, now):
        server, model, apart = changes(before, now)
        # Noise of a server that has loaded the weights is in ``server`` as much as in ``apart``.
        if server < 0.5 * apart:
            raise UserError(
                f"{where} serves old weights: since an earlier episode the model's log-probabilities of the same answers "
                f"have changed by {model:.2g} nats a token, and the server's by {server:.2g}. It was told to load {told}: "
                "have it load them, and drop what it keeps of earlier prompts"
            )
    return facts


def check_weights(session: Session, sampler: Sampler, queries: list[Query], sampling: Sampling, limit: float) -> None:
    """Compare an answer of ``sampler`` to each of ``queries`` with the model of ``session``, whose weights this reads.

    Raises UserError if their log-probabilities are more than ``limit`` nats a token apart on average: weights that were
    handed over in part, or not at all, still answer.
    """
    short = replace(sampling, samples=1, max_new_tokens=min(sampling.max_new_tokens, TOKENS))
    numbers, prompts = [query.number for query in queries], [query.tokens for query in queries]
    answers = [answer for (answer,) in sampler.generate(prompts, short, numbers=numbers)]
    texts = [
        ScoredText([*prompt, *answer.tokens], len(answer.tokens))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    own: dict[int, Likelihood] = {}
    session.likelihoods(texts, own.update)
    apart = mean_gap([one.log_probs for one in answers], [own[i].log_prob for i in range(len(answers))])
    facts = (
        f"log-probabilities of {counted(len(answers), 'answer')} are {apart:.2g} nats a token from "
        "those of the checkpoint"
    )
    if apart > limit:
        raise UserError(
            f"--server: its {facts}, more than {limit:g}: it serves other weights. Load {session.opened.weights.directory} "
            "into it, or, if it computes in a much narrower dtype, raise --server-gap"
        )
    session.say(f"server: its {facts}")
