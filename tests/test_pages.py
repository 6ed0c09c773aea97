"""What pages show can be copied: YAML can be read, and a command begins where its neighbors begin."""

import re
from pathlib import Path

import pytest
import yaml

from tests.test_links import PAGES, ROOT


def unreadable(text: str) -> list[str]:
    """The blocks of YAML that no parser reads, by their first line and what is wrong."""
    found = []
    for block in re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        try:
            list(yaml.safe_load_all(block))
        except yaml.YAMLError as error:
            found.append(f"{block.splitlines()[0]}: {error}")
    return found


def misplaced(text: str) -> list[str]:
    """Commands further right than the line before them, which does not continue on them."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    return [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" {5,}qwen-moe ", line) and before and not before.endswith("\\")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_can_be_copied(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert unreadable(text) == [] and misplaced(text) == []


def test_mistakes_are_found() -> None:
    (mistake,) = unreadable("```yaml\na: [1]\n    b: 2\n```\n```yaml\na: 1\n---\nb: 2\n```\n")
    assert mistake.startswith("a: [1]: ")
    assert misplaced("    qwen-moe a\n        qwen-moe b\n    x \\\n        qwen-moe c\n") == ["        qwen-moe b"]
