"""The tests that documents are compared with: sequences of text, read from the files of test sets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.counted import counted
from qwen_moe.curation.leaks.rows import BadLine, find_rows, read_rows, row_of, text_of
from qwen_moe.curation.leaks.settings import LEAST_TOKENS, LeakSettings
from qwen_moe.curation.leaks.tokens import Tokens
from qwen_moe.data.sources import Source, Tally
from qwen_moe.data.words import hash_of
from qwen_moe.errors import UserError


@dataclass(frozen=True)
class TestSequence:
    """One test: its text, and where it stands."""

    __test__ = False  # for pytest, which looks for classes of this name

    text: str
    file: str
    line: int

    @property
    def hash(self) -> str:
        return hash_of(self.text)


@dataclass
class Sequences:
    """All tests that are compared, by file how many there are, and what was left out."""

    found: list[TestSequence] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    short: Tally = field(default_factory=Tally)
    bad: Tally = field(default_factory=Tally)

    @property
    def hashes(self) -> list[str]:
        return [one.hash for one in self.found]


def read_sequences(settings: LeakSettings, tokens: Tokens) -> Sequences:
    """The tests of ``settings.against``. Raises UserError if there are none, if one is too short for the rule, or if a row
    cannot be read, unless the settings say that such rows are left out."""
    sequences = Sequences()
    _check_given(settings.against)
    try:
        sources = find_rows(settings.against).sources
    except UserError as error:
        raise UserError(f"test set: {error}") from None
    for source in sources:
        name = str(source.path)
        sequences.files[name] = 0
        for line in read_rows(source, settings.text_key, settings.on_bad_line == "skip", settings.test_keys):
            try:
                text = text_of(row_of(line), line, settings.text_key, _keys(settings, source))
            except BadLine as error:
                if settings.on_bad_line == "error":
                    raise UserError(f"test set: {error}") from None
                sequences.bad.add("rows that cannot be read", line.where)
                continue
            if len(tokens.of(text)) < LEAST_TOKENS:
                sequences.short.add(f"tests of fewer than {LEAST_TOKENS} tokens", line.where)
                continue
            sequences.files[name] += 1
            sequences.found.append(TestSequence(text, name, line.line))
    _check_found(sequences, settings)
    return sequences


def _keys(settings: LeakSettings, source: Source) -> Sequence[str]:
    """The keys of a test's text; plain text has none."""
    return settings.test_keys if source.has_rows else ()


def _check_given(against: Sequence[str]) -> None:
    for name in against:
        if Path(name).is_file() and not Path(name).stat().st_size:
            raise UserError(f"test set {name} is empty: give one with tests, or leave it out")


def _check_found(sequences: Sequences, settings: LeakSettings) -> None:
    short = sum(sequences.short.counts.values())
    if short and settings.on_short == "error":
        count = short + len(sequences.found)
        raise UserError(
            f"{short:,} of {counted(count, 'test is', 'tests are')} too short for the rule, which needs "
            f"{LEAST_TOKENS} tokens in common: "
            f"{sequences.short}. Join more of their keys with --test-key (such as question,answer), or leave them unchecked "
            "with --on-short skip"
        )
    if not sequences.found:
        left_out = "; ".join(str(tally) for tally in (sequences.short, sequences.bad) if tally.counts)
        raise UserError(
            f"{', '.join(settings.against)}: the test set is empty{left_out and f' (left out: {left_out})'}; give files "
            "with tests"
        )
