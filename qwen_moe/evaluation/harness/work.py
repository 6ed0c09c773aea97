"""Requests to a model that may be split over processes: the first one runs the harness, the others compute with it."""

from collections.abc import Callable, Sequence
from typing import Any

from qwen_moe.generation.engine import Completion
from qwen_moe.generation.likelihood import Likelihood, ScoredText
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.session import Session

Answered = Callable[[dict[int, Any]], None]  # answers by their index among what was asked


class Work:
    """Asks the model of a session. Only the rank that reports has one; `serve` is what the others do."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def likelihoods(self, texts: Sequence[ScoredText], done: Callable[[dict[int, Likelihood]], None]) -> None:
        self.session.agree(("likelihoods", texts))
        self.session.likelihoods(texts, done)

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        numbers: Sequence[int],
        done: Callable[[dict[int, Completion]], None],
    ) -> None:
        """One answer to each of ``prompts``; see `Engine.generate` for ``numbers``."""
        self.session.agree(("generate", prompts, sampling, numbers))
        places = {number: index for index, number in enumerate(numbers)}
        self.session.generate(
            list(prompts),
            sampling,
            numbers=numbers,
            done=lambda number, completions: done({places[number]: completions[0]}),
        )

    def end(self) -> None:
        self.session.agree(None)


def serve(session: Session) -> None:
    """Compute what the rank that reports asks for, until it ends."""
    while True:
        asked: Any = session.agree(None)
        if asked is None:
            return
        if asked[0] == "likelihoods":
            session.likelihoods(asked[1], lambda found: None)
        else:
            _, prompts, sampling, numbers = asked
            session.generate(list(prompts), sampling, numbers=numbers)
