"""Whether a server serves the weights of a checkpoint: the log-probabilities that it gives its answers, against ours."""

from dataclasses import replace
from statistics import fmean

from qwen_moe.errors import UserError
from qwen_moe.generation.likelihood import Likelihood, ScoredText
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.session import Session
from qwen_moe.rollout.queries import Query
from qwen_moe.rollout.server import Sampler

_TOKENS = 64  # of an answer that is compared, at most


def check_weights(session: Session, sampler: Sampler, queries: list[Query], sampling: Sampling, limit: float) -> None:
    """Compare an answer of ``sampler`` to each of ``queries`` with the model of ``session``, whose weights this reads.

    Raises UserError if their log-probabilities are more than ``limit`` nats a token apart on average: weights that were
    handed over in part, or not at all, still answer.
    """
    short = replace(sampling, samples=1, max_new_tokens=min(sampling.max_new_tokens, _TOKENS))
    numbers, prompts = [query.number for query in queries], [query.tokens for query in queries]
    answers = [answer for (answer,) in sampler.generate(prompts, short, numbers=numbers)]
    texts = [
        ScoredText([*prompt, *answer.tokens], len(answer.tokens))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    own: dict[int, Likelihood] = {}
    session.likelihoods(texts, own.update)
    apart = fmean(abs(sum(one.log_probs) - own[i].log_prob) / len(one.tokens) for i, one in enumerate(answers))
    facts = f"log-probabilities of {len(answers)} answers are {apart:.2g} nats a token from those of the checkpoint"
    if apart > limit:
        raise UserError(
            f"--server: its {facts}, more than {limit:g}: it serves other weights. Load {session.opened.weights.directory} "
            "into it, or, if it computes in a much narrower dtype, raise --server-gap"
        )
    session.say(f"server: its {facts}")
