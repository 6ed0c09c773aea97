"""Every row of the table in docs/damage.md is true: the damage is done and what happens is compared."""

import re
from collections.abc import Iterator

import pytest

from tests.fuzz.draws import Draw, Fuzz
from tests.fuzz.options import BASE, PARSERS, judge_options
from tests.fuzz.rows import ROWS, Row
from tests.fuzz.server import HEAVY, ROOT, Server
from tests.fuzz.targets import READERS, TARGETS
from tests.fuzz.world import build, build_light


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    server = Server(["qwen_moe.checkpoint.huggingface.convert"])
    folder = tmp_path_factory.mktemp("light")
    try:
        yield Fuzz(build_light(folder / "world", server), folder)
    finally:
        server.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzz]:
    server = Server(HEAVY)
    folder = tmp_path_factory.mktemp("whole")
    try:
        yield Fuzz(build(folder / "world", server), folder)
    finally:
        server.close()


def _check(fuzz: Fuzz, row: Row) -> None:
    judge = fuzz.judge(row.draw) if isinstance(row.draw, Draw) else judge_options(fuzz, row.draw)
    assert judge is None, f"{judge}\n{row.draw.repeat()}"
    answer = fuzz.last
    assert answer.code == row.code, f"{row.draw.repeat()}\n{answer.out}\n{answer.err}"
    assert re.search(row.says, answer.err), f"{row.draw.repeat()}\n{answer.err}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.light], ids=lambda row: f"{row.file}: {row.damage}")
def test_a_row_is_true(light: Fuzz, row: Row) -> None:
    _check(light, row)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if not row.light], ids=lambda row: f"{row.file}: {row.damage}")
def test_a_row_about_runs_is_true(whole: Fuzz, row: Row) -> None:
    _check(whole, row)


def test_the_document_has_these_rows_and_no_other() -> None:
    text = (ROOT / "docs" / "damage.md").read_text(encoding="utf-8")
    section = text.partition("## Shown by tests\n")[2].partition("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| ")][1:] == [row.line() for row in ROWS]


def test_nothing_is_left_out_of_the_draws() -> None:
    """Every verb has a base to draw options for, and every reader is used."""
    assert BASE.keys() == PARSERS.keys()
    assert {reader for target in TARGETS.values() for reader in target.readers} == READERS.keys()
