"""The recipe of a curation: one section for each step, read strictly, all mistakes in one message."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from qwen_moe.config.fields import (
    GivenPath,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalSize,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Size,
)
from qwen_moe.config.load import load_as
from qwen_moe.curation.names import STEPS

NUMBERS = {name: number for number, name in enumerate(STEPS)}
_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
OTHER = "other"  # the domain of documents that no input and no classifier gives one


def check_domain(name: str) -> str:
    """Raise ValueError for a domain that cannot be the name of a folder."""
    if not _DOMAIN.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no domain: give up to 64 letters, digits, dots, hyphens and underscores")
    return name


class InputSection(Section):
    """One input. ``path``: a file, a folder, `python-stdlib`, `python-docs` or `python-packages`. ``text_key``: the key of
    JSON lines, or the column of Parquet files, that holds the text."""

    path: Annotated[str, Field(min_length=1)]
    domain: str = OTHER
    text_key: Annotated[str, Field(min_length=1)] = "text"

    @field_validator("domain")
    @classmethod
    def _check_domain(cls, name: str) -> str:
        return check_domain(name)


class FilterSection(Section):
    """One filter and its settings, as the library or `filters.py` names them. ``only``: the domains that it filters; without
    it all."""

    kind: str
    only: tuple[str, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        """`gopher_quality` or `gopher_quality: {min_doc_words: 20}`."""
        if isinstance(value, str):
            return {"kind": value}
        if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value)), str):
            ((kind, settings),) = value.items()
            settings = dict(settings) if isinstance(settings, dict) else settings or {}
            only = settings.pop("only", ()) if isinstance(settings, dict) else ()
            return {"kind": kind, "settings": settings, "only": only}
        if isinstance(value, dict) and set(value) <= {"kind", "settings", "only"}:
            return value
        raise ValueError(
            "a filter is its name, or its name with a section of settings, such as length: {min_words: 20}"
        )


class AnnotatingSection(Section):
    """Settings that another package of curation checks (`annotating`). ``workers``: how many of the step's tasks run at the
    same time."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=False)

    workers: Size = 1

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ScoresSection(AnnotatingSection):
    """Scores of documents. ``minimum``: documents with a lower score in one of these dimensions are dropped."""

    minimum: dict[str, float] = Field(default_factory=dict)


class MinHashSection(Section):
    """MinHash deduplication with the library's settings: two documents whose word n-grams have a Jaccard similarity of s are
    found with probability 1 - (1 - s^hashes_per_bucket)^num_buckets. The library's default hash is xxhash, of a version
    below 4."""

    n_grams: Annotated[Size, Field(le=100)] = 5
    num_buckets: Annotated[Size, Field(le=1000)] = 14
    hashes_per_bucket: Annotated[Size, Field(le=100)] = 8
    seed: Seed = 1
    precision: Literal[32, 64] = 64
    hash_fc: Literal["sha1", "xxhash"] = "sha1"


class DeduplicationSection(Section):
    """Which duplicates are dropped: equal texts, and texts that MinHash finds similar."""

    exact: bool = True
    minhash: MinHashSection | None = MinHashSection()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.exact and self.minhash is None:
            raise ValueError("there is nothing to do: set exact: true, or give minhash")
        return self


class WeightsSection(Section):
    """How much of each domain is kept. ``targets``: shares of tokens; domains without one share what is left in proportion
    to their tokens. ``tokens``: the wanted total; 0: as many as there are. ``max_repeats``: how often a document may be in
    the output."""

    targets: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    tokens: NonNegativeInt = 0
    max_repeats: PositiveFloat = 4.0
    seed: Seed = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.targets:
            check_domain(name)
        total = math.fsum(self.targets.values())
        if total > 1 + 1e-9:
            raise ValueError(
                f"targets sum to {total:g}: they are shares of the tokens, so give numbers that sum to 1 or less"
            )
        if self.targets and total == 0:
            raise ValueError("targets are all 0: give at least one domain a share")
        return self


class PrepareSection(Section):
    """The token files, one pair for each domain. ``tokenizer``: a Hugging Face directory; without it one of ``vocab_size``
    tokens is trained on the documents that are left."""

    tokenizer: GivenPath | None = None
    train_tokenizer: bool = False
    vocab_size: OptionalSize = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train_tokenizer == (self.tokenizer is not None):
            raise ValueError("give either tokenizer: DIR or train_tokenizer: true with vocab_size, not both or neither")
        if self.train_tokenizer != (self.vocab_size > 0):
            raise ValueError("vocab_size is the size of a trained tokenizer: give it with train_tokenizer: true only")
        return self


class SynthesiseSection(Section):
    """Texts that a model writes from templates, kept if they are rewarded. ``templates``: each a prompt with fields such as
    {topic}. ``fields``: the values of each field; every combination is a prompt, of which ``prompts`` are drawn (0: all).
    ``rewards``: as in `qwen-moe rollout`; an answer is kept if its reward is at least ``passing``. ``text``: what becomes a
    document, a template with {prompt} and {completion}. ``row``: values for the rewards, which may have fields, too."""

    checkpoint: GivenPath
    templates: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)
    fields: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    row: dict[str, str] = Field(default_factory=dict)
    prompts: NonNegativeInt = 0
    samples: Size = 1
    chat: bool = False
    rewards: tuple[str, ...] = Field(min_length=1)
    reward_weights: tuple[float, ...] = ()
    passing: float = 1.0
    max_new_tokens: Size = 256
    temperature: NonNegativeFloat = 1.0
    batch_size: Size = 16
    seed: Seed = 0
    domain: str = "synthetic"
    text: Annotated[str, Field(min_length=1)] = "{completion}"

    @field_validator("domain")
    @classmethod
    def _check_domain(cls, name: str) -> str:
        return check_domain(name)


class SlurmSection(Section):
    """Each stage of a step as a Slurm array. ``workers``: tasks at the same time (0: any number). ``env_command``: shell
    lines before the task; by default the PATH and the packages of the Python that runs this command."""

    time: str
    partition: str
    cpus_per_task: Size = 1
    mem_per_cpu_gb: Size = 2
    workers: OptionalSize = 0
    tasks_per_job: Size = 1
    qos: str = ""
    env_command: str = ""
    sbatch_args: dict[str, str] = Field(default_factory=dict)
    poll_seconds: PositiveFloat = 10.0


class CurateConfig(Section):
    """A curation. Everything that it writes goes to ``run_dir``. A step whose section is absent is left out; `read` and
    `weights` are always done.

    ``tasks``: into how many parts the documents are divided, each a file in every step. ``workers``: how many of these are
    worked on at the same time (0: one per core). ``words``: how filters and MinHash find words: `simple`, or the language of
    one of the library's tokenizers. ``on_bad_line``: what to do with lines, rows and files that cannot be read.
    """

    run_dir: GivenPath
    input: tuple[InputSection, ...] = ()
    tasks: Annotated[PositiveInt, Field(le=100_000)] = 8
    workers: OptionalSize = 0
    words: Annotated[str, Field(min_length=1)] = "simple"
    on_bad_line: Literal["error", "skip"] = "error"
    filters: tuple[FilterSection, ...] = ()
    scores: ScoresSection | None = None
    domains: AnnotatingSection | None = None
    deduplication: DeduplicationSection | None = None
    decontamination: AnnotatingSection | None = None
    weights: WeightsSection = WeightsSection()
    prepare: PrepareSection
    synthesise: SynthesiseSection | None = None
    slurm: SlurmSection | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        """An input may be its path alone."""
        if isinstance(value, str):
            value = [value]
        return [{"path": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.input and self.synthesise is None:
            raise ValueError("there is no text: give input")
        names = [one.path for one in self.input]
        if twice := [name for number, name in enumerate(names) if name in names[:number]]:
            raise ValueError(
                f"input {twice[0]} is given twice, so each of its documents would be there twice: give it once"
            )
        return self

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of this curation, in order."""
        always = ("read", "weights", "prepare")
        return tuple(name for name in STEPS if name in always or getattr(self, name, None))


def load_curation(path: Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Read a recipe, from a file or from the package, with `section.key=value` overrides. Raises UserError."""
    return load_as(CurateConfig, path, overrides)
