"""Scores and domains by an instruct model: log-probabilities of its possible answers, of which none is sampled."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qwen_moe.checkpoint.fingerprint import fingerprint, tokenizer_fingerprint
from qwen_moe.curation.scores.annotate import DOMAIN, LEFT_OUT, MASS, PROBABILITY, Doc
from qwen_moe.curation.scores.prompts import Around, Prompts, Shortened
from qwen_moe.curation.scores.settings import DomainSettings, Reading, ScoreSettings
from qwen_moe.curation.scores.wording import RATINGS, choose_domain, choose_language, language_of, question
from qwen_moe.errors import UserError
from qwen_moe.generation.tokenizer import tokenizer_folder

if TYPE_CHECKING:
    from qwen_moe.generation.session import Session


class _Asking:
    """Asks the model of ``session`` several questions about each document."""

    def __init__(self, settings: Reading, session: "Session") -> None:
        self._settings, self._session = settings, session
        self.prompts = Prompts(session.opened, settings.document_tokens)

    def allow(self, questions: Iterable[Around]) -> None:
        """Say how long prompts become. Raises UserError if the model does not reach so far."""
        longest = max(one.size for one in questions)
        reach = self._session.opened.config.reach
        if longest + self._settings.document_tokens > reach:
            room = reach - longest
            fix = f"lower --document-tokens to {room} or less" if room > 8 else "give a model that reads longer texts"
            raise UserError(
                f"--document-tokens (document_tokens) {self._settings.document_tokens:,} and a question of {longest:,} "
                "tokens are more than the "
                f"model's reach of {reach:,} tokens: {fix}"
            )
        self._session.reach(longest + self._settings.document_tokens)

    def answers(self, asked: Sequence[tuple[Around, Shortened]]) -> list[list[float]]:
        """The log-probabilities of the answers to each question about a document."""
        groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, (around, _) in enumerate(asked):
            groups.setdefault(around.answers, []).append(number)
        found: dict[int, list[float]] = {}
        for answers, numbers in groups.items():
            prompts = [[*asked[n][0].before, *asked[n][1].tokens, *asked[n][0].after] for n in numbers]
            found |= dict(zip(numbers, self._session.log_probs(prompts, answers), strict=True))
        return [found[number] for number in range(len(asked))]

    def identity(self) -> dict[str, Any]:
        directory, settings = self._session.opened.weights.directory, self._settings
        return {
            "model": fingerprint(directory),
            "tokenizer": tokenizer_fingerprint(tokenizer_folder(directory)),
            "document_tokens": settings.document_tokens,
            "batch_size": settings.batch_size,
            "dtype": settings.dtype,
            "layout": self._session.layout,
        }


class Rater:
    """Scores by ratings from 1 to 5: the expected rating, with the probabilities of the five answers made to add up to 1."""

    def __init__(self, settings: ScoreSettings, session: "Session") -> None:
        self._settings, self._wordings = settings, settings.wordings()
        self._asking = _Asking(settings, session)
        prompts = self._asking.prompts
        self._questions = {
            (name, language): prompts.around(*question(texts, language, prompts.chat), RATINGS)
            for name, texts in self._wordings.items()
            for language in texts
        }
        self._asking.allow(self._questions.values())

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        asked = []
        shortened = self._asking.prompts.documents([document.text for document in documents])
        for document, short in zip(documents, shortened, strict=True):
            language = language_of(document.metadata)
            for name, texts in self._wordings.items():
                chosen = choose_language(texts, language, self._settings.language)
                asked.append((self._questions[name, chosen], short))
        answers = iter(self._asking.answers(asked))
        return [self._found(short, [next(answers) for _ in self._wordings]) for short in shortened]

    def _found(self, short: Shortened, answers: list[list[float]]) -> dict[str, Any]:
        scores = {name: expected_rating(one) for name, one in zip(self._wordings, answers, strict=True)}
        mass = {name: round(_mass(one), 6) for name, one in zip(self._wordings, answers, strict=True)}
        return {"scores": scores, MASS: mass} | _left_out(short)

    def identity(self) -> dict[str, Any]:
        texts = {name: dict(texts) for name, texts in self._wordings.items()}
        return {"scorer": "model", **self._asking.identity(), "language": self._settings.language, "prompts": texts}


class DomainChooser:
    """Domains by the most likely of their names."""

    def __init__(self, settings: DomainSettings, session: "Session") -> None:
        self._settings, self._names = settings, tuple(settings.domains)
        self._asking = _Asking(settings, session)
        before, after = choose_domain(settings.domains, self._asking.prompts.chat)
        self._question = self._asking.prompts.around(before, after, self._names, end=True)
        self._asking.allow([self._question])

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        shortened = self._asking.prompts.documents([document.text for document in documents])
        answers = self._asking.answers([(self._question, short) for short in shortened])
        found = []
        for short, log_probs in zip(shortened, answers, strict=True):
            shares = normalized(log_probs)
            best = max(range(len(shares)), key=lambda number: shares[number])
            found.append({DOMAIN: self._names[best], PROBABILITY: round(shares[best], 6)} | _left_out(short))
        return found

    def identity(self) -> dict[str, Any]:
        return {"domains": "model", **self._asking.identity(), "names": dict(self._settings.domains)}


def _left_out(short: Shortened) -> dict[str, Any]:
    return {LEFT_OUT: short.left_out} if short.left_out else {}


def normalized(log_probs: Sequence[float]) -> list[float]:
    """Probabilities that add up to 1."""
    most = max(log_probs)
    weights = [math.exp(one - most) for one in log_probs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def expected_rating(log_probs: Sequence[float]) -> float:
    """The mean of the ratings 1, 2, ... by their probabilities."""
    return math.fsum(number * share for number, share in enumerate(normalized(log_probs), 1))


def _mass(log_probs: Sequence[float]) -> float:
    """The probability of any of the answers. Rounding of a model in float32 may take it above 1."""
    return min(1.0, math.fsum(map(math.exp, log_probs)))
