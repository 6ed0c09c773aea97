"""The filters that a recipe can name: the library's own classes with their own settings, and a few of ours."""

import difflib
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qwen_moe.curation.documents import Lines
from qwen_moe.curation.language import LANGUAGES, detect
from qwen_moe.curation.library import (
    BaseFilter,
    C4ParagraphFilter,
    C4QualityFilter,
    Document,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    PipelineStep,
    RegexFilter,
    SymbolLinesFormatter,
)
from qwen_moe.curation.recipe import FilterSection
from qwen_moe.curation.words import word_tokenizer
from qwen_moe.errors import UserError, shown, wrong


class LanguageFilter(BaseFilter):
    """Keeps documents of ``languages``, and writes metadata["language"] and ["language_score"]. The library's filter of this
    purpose needs a model of fastText, which has to be downloaded; this one needs nothing (see `language.detect`)."""

    name = "language"

    def __init__(
        self, languages: list[str], min_score: float = 0.3, label_only: bool = False, exclusion_writer: Any = None
    ) -> None:
        super().__init__(exclusion_writer)
        if unknown := [name for name in languages if name not in LANGUAGES]:
            raise ValueError(f"language {unknown[0]!r} is not known: give some of {', '.join(LANGUAGES)}")
        self.languages, self.min_score, self.label_only = set(languages), min_score, label_only

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        name, score = detect(doc.text)
        doc.metadata["language"], doc.metadata["language_score"] = name or "unknown", round(score, 4)
        if self.label_only:
            return True
        if name not in self.languages:
            return False, f"language_{name or 'unknown'}"
        return score >= self.min_score or (False, "language_score")


class LengthFilter(BaseFilter):
    """Keeps documents of so many characters and words, which are separated by white space. 0: no limit."""

    name = "length"

    def __init__(
        self,
        min_characters: int = 0,
        max_characters: int = 0,
        min_words: int = 0,
        max_words: int = 0,
        exclusion_writer: Any = None,
    ) -> None:
        super().__init__(exclusion_writer)
        self.characters, self.words = (min_characters, max_characters), (min_words, max_words)
        for low, high in (self.characters, self.words):
            if min(low, high) < 0 or 0 < high < low:
                raise ValueError(f"no length is at least {low} and at most {high}: give limits of 0 or more, in order")

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        for what, (low, high) in (("characters", self.characters), ("words", self.words)):
            if not low and not high:
                continue
            count = len(doc.text) if what == "characters" else len(doc.text.split())
            if count < low:
                return False, f"too_few_{what}"
            if high and count > high:
                return False, f"too_many_{what}"
        return True


class SymbolFilter(BaseFilter):
    """Keeps documents in which at most ``max_symbols`` of the characters that are not white space are neither letters nor
    digits, and at most ``max_digits`` are digits."""

    name = "symbols"

    def __init__(self, max_symbols: float = 0.3, max_digits: float = 0.3, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.max_symbols, self.max_digits = max_symbols, max_digits

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        characters = "".join(doc.text.split())
        if not characters:
            return False, "empty"
        digits = sum(map(str.isdigit, characters))
        letters = sum(map(str.isalpha, characters))
        if (len(characters) - digits - letters) / len(characters) > self.max_symbols:
            return False, "too_many_symbols"
        if digits / len(characters) > self.max_digits:
            return False, "too_many_digits"
        return True


class MinimumScore(BaseFilter):
    """Keeps documents whose scores are at least ``minimum`` in every dimension that it names."""

    name = "minimum score"

    def __init__(self, minimum: dict[str, float], exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.minimum = minimum

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        scores = doc.metadata.get("scores") or {}
        for name, least in self.minimum.items():
            if name not in scores:
                return False, f"no_score_{name}"
            if not scores[name] >= least:
                return False, f"low_{name}"
        return True


class Only(BaseFilter):
    """A filter that decides about documents of some domains; it keeps all others."""

    def __init__(self, inner: Any, domains: Sequence[str]) -> None:
        super().__init__(inner.exclusion_writer)
        self.inner, self.domains, self.name = inner, frozenset(domains), inner.name

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.inner.filter(doc) if doc.metadata.get("domain") in self.domains else True


class OnlyFormat(PipelineStep):
    """A formatter for documents of some domains; it leaves all others as they are."""

    type = "format"

    def __init__(self, inner: Any, domains: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.domains, self.name = inner, frozenset(domains), inner.name

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            if document.metadata.get("domain") in self.domains:
                document.text = self.inner.format(document.text)
            yield document


class Before(PipelineStep):
    """Remembers the text of a document, before a step that may edit it."""

    type, name = "note", "text before"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            document.metadata["_before"] = document.text
            yield document


class After(PipelineStep):
    """Notes in metadata["edited"] that the step ``by`` changed the text, with its characters before and after."""

    type = "note"

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by = self.name = by

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            before = document.metadata.pop("_before")
            if document.text != before:
                document.metadata.setdefault("edited", {})[self.by] = [len(before), len(document.text)]
            yield document


class NotEmpty(BaseFilter):
    """Drops documents of which an edit has left nothing."""

    name = "not empty"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return bool(doc.text.strip()) or (False, "nothing_left")


KINDS: dict[str, Any] = {
    "language": LanguageFilter,
    "length": LengthFilter,
    "gopher_quality": GopherQualityFilter,
    "gopher_repetition": GopherRepetitionFilter,
    "c4_quality": C4QualityFilter,
    "c4_paragraphs": C4ParagraphFilter,
    "fineweb_quality": FineWebQualityFilter,
    "symbols": SymbolFilter,
    "symbol_lines": SymbolLinesFormatter,
    "regex": RegexFilter,
}
EDITING = ("c4_quality", "symbol_lines")
_OURS = ("exclusion_writer", "language", "self")  # parameters that a recipe does not set


def filter_names(sections: Sequence[FilterSection]) -> list[str]:
    """A name for each filter of a recipe: its kind, and a number where a kind is there again."""
    names: list[str] = []
    for one in sections:
        again = sum(name.split("-")[0] == one.kind for name in names)
        names.append(f"{one.kind}-{again + 1}" if again else one.kind)
    return names


def build_filters(sections: Sequence[FilterSection], words: str, folder: Path) -> list[Any]:
    """The pipeline of a recipe's filters; dropped documents go to ``folder``. Raises one UserError for all mistakes."""
    found: list[Any] = []
    mistakes = []
    for name, one in zip(filter_names(sections), sections):
        try:
            found += _build(name, one, words, folder)
        except UserError as error:
            mistakes.append(f"filter {name}: {error}")
    if mistakes:
        raise UserError("; ".join(mistakes))
    return found


def _build(name: str, one: FilterSection, words: str, folder: Path) -> list[Any]:
    cls = KINDS.get(one.kind)
    if cls is None:
        near = difflib.get_close_matches(one.kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KINDS)}"
        raise UserError(f"it is not known; {hint}")
    parameters = inspect.signature(cls.__init__).parameters
    settings = _checked(one.settings, parameters)
    if "language" in parameters:
        settings["language"] = word_tokenizer(words)
    if "exclusion_writer" in parameters:
        settings["exclusion_writer"] = Lines(folder, filter=name)
    try:
        made = cls(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    except Exception as error:  # a regular expression that is none
        raise UserError(f"{type(error).__name__}: {error}") from None
    if one.only:
        made = Only(made, one.only) if isinstance(made, BaseFilter) else OnlyFormat(made, one.only)
    if one.kind not in EDITING:
        return [made]
    return [Before(), made, After(name), NotEmpty(Lines(folder, filter=f"{name}-empty"))]


def _checked(settings: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """``settings`` in the types that a filter's signature names. Raises UserError."""
    valid = [name for name in parameters if name not in _OURS]
    required = [name for name in valid if parameters[name].default is inspect.Parameter.empty]
    found = {}
    for name in required:
        if name not in settings:
            raise UserError(f"{name} is missing: give it")
    for name, value in settings.items():
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid settings: {', '.join(valid) or 'none'}"
            raise UserError(f"unknown setting {name!r}; {hint}")
        try:
            found[name] = _adapter(parameters[name].annotation).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{name} = {shown(value):.80}: {wrong(error.errors()[0])}") from None
    return found


_PAIRS = tuple[tuple[int, float], ...]


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    """Checks values of a type. The library writes tuples of any length as tuples of one: both are meant as the former."""
    if typing.get_origin(annotation) is tuple and typing.get_origin(typing.get_args(annotation)[0]) is tuple:
        annotation = _PAIRS
    if annotation is float or (isinstance(annotation, types.UnionType) and float in typing.get_args(annotation)):
        annotation = annotation | None if annotation is float else annotation
    if annotation is float | None:
        return TypeAdapter(float | None, config=ConfigDict(allow_inf_nan=False))
    return TypeAdapter(annotation, config=ConfigDict(strict=False))
