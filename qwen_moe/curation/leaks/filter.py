"""The check for leaks as a step of a datatrove pipeline (extra `curate`): import this module only if it is needed."""

from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from qwen_moe.curation.leaks.finder import Finder
from qwen_moe.curation.leaks.sequences import read_sequences
from qwen_moe.curation.leaks.settings import LeakSettings
from qwen_moe.curation.leaks.tokens import tokens_of
from qwen_moe.curation.leaks.work import REASON, make_finder


class LeakFilter(BaseFilter):
    """Drops documents that are leaks of the tests of ``settings`` with the reason `leak`. Their metadata says of which test,
    under `leak`. Each process reads the tests and builds the index when its first document comes; `check` reads the tests
    before that, and raises UserError if they cannot be used."""

    name = "Leaks of tests"

    def __init__(self, settings: LeakSettings, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.settings = settings
        self._finder: Finder | None = None

    def check(self) -> None:
        """Raises UserError for test sets that are empty, too short for the rule, or cannot be read."""
        read_sequences(self.settings, tokens_of(self.settings.tokenizer))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether the document is kept; of one that is not, the reason."""
        if self._finder is None:
            self._finder = make_finder(self.settings, read_sequences(self.settings, tokens_of(self.settings.tokenizer)))
        leak, _ = self._finder.leak(doc.text)
        if leak is None:
            return True
        doc.metadata["leak"] = leak
        return False, REASON

    def __getstate__(self) -> dict[str, Any]:
        """Without the index: other processes build their own."""
        return self.__dict__ | {"_finder": None}
