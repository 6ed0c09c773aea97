"""Settings of scores and of domains, as a recipe has them."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from qwen_moe.config.fields import GivenPath, Section, Size
from qwen_moe.curation.scores.wording import DEFAULTS, LANGUAGES, Texts, check_texts

CLASSIFIER = "classifier:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OnFailure = Literal["error", "skip"]
DType = Literal["bf16", "fp16", "fp32", "fp64"]


def check_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is not a name: give up to 64 letters, digits, dots, hyphens and underscores")
    return name


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r:.80} is not a regular expression: {error}") from None
    return text


Name = Annotated[str, AfterValidator(check_name)]
Regex = Annotated[str, AfterValidator(_regex)]


class Reading(Section):
    """How a model reads documents.

    ``document_tokens``: of a longer document, the middle is left out. ``language``: of the prompt for documents without
    metadata["language"], or with one in which there is no prompt. ``batch_documents``: documents that are handed over
    together. ``batch_size``: prompts that are read together. ``dtype``: by default as stored.
    """

    document_tokens: Size = 2048
    language: str = "en"
    batch_documents: Annotated[Size, Field(le=1_000_000)] = 256
    batch_size: Annotated[Size, Field(le=100_000)] = 64
    dtype: DType | None = None


class ScoreSettings(Reading):
    """Which scores documents get.

    ``scorer``: an instruct model (a Hugging Face directory, a checkpoint or a run), ``classifier:DIR``, or
    ``module:function``. Of a model: ``prompts`` are ratings of one's own, a text by name, or a text for each language;
    ``dimensions`` are names of these or of `wording.DEFAULTS`, by default all of ``prompts`` or, without any, the first
    three defaults. ``on_failure``: what to do with a document whose score fails.
    """

    scorer: Annotated[str, Field(min_length=1)]
    dimensions: tuple[Name, ...] = ()
    prompts: dict[Name, str | dict[str, str]] = Field(default_factory=dict)
    on_failure: OnFailure = "error"

    @field_validator("scorer", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if hasattr(value, "__fspath__") else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = [*self.prompts, *(name for name in DEFAULTS if name not in self.prompts)]
        for name in self.dimensions:
            if name not in known:
                raise ValueError(f"dimension {name!r} is not known: give one of {', '.join(known)}, or add its prompt")
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"dimensions are {', '.join(self.dimensions)}: name each once")
        for name, text in self.prompts.items():
            check_texts(name, {self.language: text} if isinstance(text, str) else text)
        if self.kind != "model" and (self.dimensions or self.prompts):
            raise ValueError(f"scorer {self.scorer} has dimensions of its own: leave dimensions and prompts out")
        if self.language not in LANGUAGES and not self.prompts:
            raise ValueError(f"language is {self.language!r}, expected one of {', '.join(LANGUAGES)}")
        return self

    @property
    def kind(self) -> Literal["model", "classifier", "function"]:
        if self.scorer.startswith(CLASSIFIER):
            return "classifier"
        return "function" if FUNCTION.fullmatch(self.scorer) else "model"

    def wordings(self) -> dict[str, Texts]:
        """The text of each dimension that a model rates, by language."""
        own = {name: {self.language: t} if isinstance(t, str) else t for name, t in self.prompts.items()}
        known: Mapping[str, Texts] = DEFAULTS | own
        return {name: known[name] for name in self.dimensions or tuple(own) or tuple(DEFAULTS)[:3]}


class Rule(Section):
    """Documents of ``domain``: ``path`` is found in metadata["file_path"] (or in the id), ``text`` in the text, and each of
    ``metadata`` in that value. All are regular expressions, and all that are given must be found."""

    domain: Name
    path: Regex | None = None
    text: Regex | None = None
    metadata: dict[str, Regex] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is None and self.text is None and not self.metadata:
            raise ValueError(f"the rule of domain {self.domain} has no condition: give path, text or metadata")
        return self


class DomainSettings(Reading):
    """How documents get a domain: by the first of ``rules`` that fits, by a ``classifier``, or by a ``model`` that chooses
    among ``domains``, names with a few words on each. ``otherwise``: the domain where no rule fits; without it, a document
    keeps the one that it has."""

    rules: tuple[Rule, ...] = ()
    classifier: GivenPath | None = None
    model: GivenPath | None = None
    domains: dict[Name, str] = Field(default_factory=dict)
    otherwise: Name | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in ("rules", "classifier", "model") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"domains come from {' and '.join(given) or 'nothing'}: give one of rules, classifier, model"
            )
        if self.model is not None and len(self.domains) < 2:
            raise ValueError("a model chooses among domains: give at least two, each with a few words on what it is")
        if self.model is None and self.domains:
            raise ValueError("domains are what a model chooses among: leave them out, or give model")
        if self.otherwise is not None and not self.rules:
            raise ValueError("otherwise is for rules: leave it out")
        return self

    @property
    def kind(self) -> Literal["rules", "classifier", "model"]:
        return "rules" if self.rules else "classifier" if self.classifier is not None else "model"
