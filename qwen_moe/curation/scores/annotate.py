"""What scores documents or gives them a domain: one interface for models, classifiers, functions and rules."""

import argparse
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from launchers.counted import counted
from qwen_moe.curation.scores.settings import CLASSIFIER, DomainSettings, ScoreSettings
from qwen_moe.errors import UserError

if TYPE_CHECKING:
    from qwen_moe.generation.session import Session

ERROR = "score_error"  # metadata of a document whose score failed: what happened, and where
MASS = "rating_mass"  # metadata: the probability of any rating at all, for each dimension
LEFT_OUT = "characters_not_read"  # metadata of a document that was shortened for the model
DOMAIN, PROBABILITY = "domain", "domain_probability"
_MERGED = ("scores", MASS)


class Doc(Protocol):
    """A document, of datatrove or of ours."""

    text: str
    id: str
    metadata: dict[str, Any]


class Annotator(Protocol):
    """Finds metadata for documents."""

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        """The metadata to add to each document. What is found for one does not depend on the others."""

    def identity(self) -> dict[str, Any]:
        """What decides the results, for a record."""


def add_metadata(document: Doc, found: Mapping[str, Any]) -> None:
    """Put what an annotator ``found`` into the metadata of ``document``; scores of other dimensions stay."""
    for name, value in found.items():
        if name in _MERGED:
            document.metadata[name] = {**(document.metadata.get(name) or {}), **value}
        else:
            document.metadata[name] = value


def scores_of(document: Doc) -> dict[str, float] | None:
    """The scores of ``document``, None if it has none. Raises UserError for one that is no finite number."""
    return _numbers(document, "scores", "score")


def _numbers(document: Doc, key: str, what: str) -> dict[str, float] | None:
    found = document.metadata.get(key)
    if not found:
        return None
    where = getattr(document, "where", "") or document.id
    if problem := problem_of_scores(found, what):
        raise UserError(f"{where}: {problem}")
    checked: dict[str, float] = found
    return checked


def problem_of_scores(found: Any, what: str = "score") -> str:
    """Why ``found`` is no object with a number for each dimension; empty if it is one."""
    if not isinstance(found, dict):
        return f"{what}s is {found!r:.60}, expected an object with a number for each dimension"
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return f"the {what} {name} is {value!r:.60}, expected a finite number"
    return ""


def forget(document: Doc) -> None:
    """Remove what an earlier command noted of how it scored ``document``; scores and domain stay. Raises UserError for a
    score, or a mass of ratings, that is no number."""
    scores_of(document)
    _numbers(document, MASS, MASS)
    for name in (ERROR, LEFT_OUT):
        document.metadata.pop(name, None)


def check_none_failed(documents: Sequence[Doc]) -> None:
    """Raise UserError if scores failed, which counts them and names the most frequent reason."""
    failed = [document for document in documents if ERROR in document.metadata]
    if not failed:
        return
    reasons = Counter(document.metadata[ERROR] for document in failed)
    reason, count = reasons.most_common(1)[0]
    first = getattr(failed[0], "where", "") or failed[0].id
    others = f" and {counted(len(failed) - count, 'other')}" if len(failed) > count else ""
    raise UserError(
        f"the score of {len(failed):,} of {counted(len(documents), 'document')} failed, the first that of {first}: "
        f"{counted(count, 'time')} "
        f"{reason}{others}. Correct the function, and give another output; or "
        "skip such documents, which then have no score (--on-failure skip, on_failure: skip)"
    )


def needs_model(settings: ScoreSettings | DomainSettings | None) -> bool:
    return settings is not None and settings.kind == "model"


def model_of(settings: ScoreSettings | DomainSettings) -> Path:
    return Path(settings.scorer) if isinstance(settings, ScoreSettings) else Path(settings.model or "")


def open_annotator(settings: ScoreSettings | DomainSettings, session: "Session | None" = None) -> Annotator:
    """What ``settings`` describe. ``session``: of their model; by default it is opened here, on one device. Raises
    UserError."""
    if settings.kind == "model":
        from qwen_moe.curation.scores.rating import DomainChooser, Rater

        opened = session or open_model(model_of(settings), settings.dtype, settings.batch_size)
        return Rater(settings, opened) if isinstance(settings, ScoreSettings) else DomainChooser(settings, opened)
    if isinstance(settings, DomainSettings):
        if settings.kind == "rules":
            from qwen_moe.curation.scores.rules import Rules

            return Rules(settings)
        from qwen_moe.curation.scores.classifier import Classifier, DomainClassifier

        assert settings.classifier is not None
        return DomainClassifier(Classifier.load(settings.classifier))
    if settings.kind == "classifier":
        from qwen_moe.curation.scores.classifier import Classifier, ScoreClassifier

        return ScoreClassifier(Classifier.load(Path(settings.scorer.removeprefix(CLASSIFIER))))
    from qwen_moe.curation.scores.functions import FunctionScorer

    return FunctionScorer(settings.scorer)


@functools.lru_cache(8)
def open_cached(settings: str, kind: type[ScoreSettings] | type[DomainSettings]) -> Annotator:
    """`open_annotator`, from JSON: tasks that one process does after another share it."""
    return open_annotator(kind.model_validate_json(settings))


@functools.lru_cache(1)
def open_model(directory: Path, dtype: str | None, batch_size: int) -> "Session":
    """A model on one device, shared by the steps of this process. Raises UserError."""
    from qwen_moe.generation.session import Session

    if not directory.is_dir():
        raise UserError(
            f"the model {directory} does not exist: give a Hugging Face directory, a checkpoint or a run (a scorer may also "
            "be classifier:DIR or module:function)"
        )
    options: dict[str, Any] = {"checkpoint": directory, "dtype": dtype, "batch_size": batch_size}
    # Prompts are short: documents are shortened to fit.
    options |= {"context_extension": "none", "chunk_size": None, "attention": "dense", "kept_share": None}
    options["compile"] = False
    return Session(argparse.Namespace(**options), split=False)
