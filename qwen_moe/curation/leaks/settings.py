"""What decides which documents count as leaks of a test set."""

from typing import Annotated, Literal

from pydantic import Field

from qwen_moe.config.fields import GivenPath, Section

LEAST_TOKENS = 13
LEAST_SHARE = (3, 5)  # 0.6, as whole numbers so that the rule is exact
MOST_CHANGED = 5  # with rule `close`: one word of so many
Rule = Literal["windowed", "close", "report"]
Name = Annotated[str, Field(min_length=1)]


class LeakSettings(Section):
    """Which documents are leaks: those whose longest common subsequence with a test has at least 13 tokens and at least 0.6
    of the shorter of the two (Qwen2.5 technical report, arXiv 2412.15115, section 5).

    ``against``: files and folders of tests. ``rule``: ``report`` compares a document with a test as wholes; ``windowed``
    compares the shorter of the two with windows of the longer one, which have twice its length and overlap by half;
    ``close`` asks in addition that a stretch of the window becomes the shorter text if at most a fifth of its tokens are
    replaced, put in or left out.
    ``tokenizer``: the folder of a tokenizer, by default tokens are words. ``text_key``: the key of a document's text.
    ``test_keys``: the keys of a test's text, by default ``text_key`` or the messages. ``complete``: the index loses no
    pair, and is about ten times slower (`index.Seeds`); with rule ``report`` it always is complete. ``on_short``: what to
    do with tests of fewer than 13 tokens. ``on_bad_line``: what to do with rows that cannot be read.
    """

    against: Annotated[tuple[Name, ...], Field(min_length=1)]
    rule: Rule = "windowed"
    tokenizer: GivenPath | None = None
    text_key: Name = "text"
    test_keys: tuple[Name, ...] = ()
    complete: bool = False
    on_short: Literal["error", "skip"] = "error"
    on_bad_line: Literal["error", "skip"] = "error"

    @property
    def seeds(self) -> Literal["words", "3-grams"]:
        """What the index consists of."""
        return "words" if self.complete or self.rule == "report" else "3-grams"


def least_common(shorter: int) -> int:
    """The least length of a common subsequence that makes a leak, if the shorter text has ``shorter`` tokens."""
    numerator, denominator = LEAST_SHARE
    return max(LEAST_TOKENS, -(-numerator * shorter // denominator))


def most_edits(shorter: int) -> int:
    """The greatest number of changed tokens with rule `close`, if the shorter text has ``shorter`` tokens."""
    return shorter // MOST_CHANGED
