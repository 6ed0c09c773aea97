"""Domains by regular expressions: the first rule that fits decides."""

import re
from collections.abc import Sequence
from typing import Any

from qwen_moe.curation.scores.annotate import DOMAIN, Doc
from qwen_moe.curation.scores.settings import DomainSettings, Rule


class Rules:
    """The rules of ``settings``. A document that none fits gets ``otherwise``, if it is given."""

    def __init__(self, settings: DomainSettings) -> None:
        self._settings = settings

    def annotate(self, documents: Sequence[Doc]) -> list[dict[str, Any]]:
        found = []
        for document in documents:
            fitting = (rule.domain for rule in self._settings.rules if fits(rule, document))
            domain = next(fitting, self._settings.otherwise)
            found.append({} if domain is None else {DOMAIN: domain})
        return found

    def identity(self) -> dict[str, Any]:
        rules = [rule.model_dump(mode="json", exclude_none=True) for rule in self._settings.rules]
        return {"domains": "rules", "rules": rules, "otherwise": self._settings.otherwise}


def fits(rule: Rule, document: Doc) -> bool:
    """Whether everything that ``rule`` asks for is found."""
    if rule.path is not None and not re.search(rule.path, str(document.metadata.get("file_path", document.id))):
        return False
    if rule.text is not None and not re.search(rule.text, document.text):
        return False
    return all(
        name in document.metadata and re.search(expression, str(document.metadata[name]))
        for name, expression in rule.metadata.items()
    )
