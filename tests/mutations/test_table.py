"""The table of planted mistakes fits the code, and the script tells mistakes that are seen from those that survive."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mutations.run import PLUGIN, ROOT, main
from tests.mutations.table import Mutation, load

MUTATIONS = load()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_a_mistake_can_be_planted_and_its_tests_are_there(mutation: Mutation) -> None:
    text = mutation.planted(ROOT)
    if mutation.file.endswith(".py"):
        compile(text, mutation.file, "exec")
    assert mutation.tests and mutation.why and mutation.old != mutation.new
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), test
        if name:
            function = re.escape(name.partition("[")[0])
            assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), test


PROJECT = {
    "sums.py": "def total(values):\n    return sum(values)\n\n\ndef mean(values):\n    return total(values) / len(values)\n",
    "test_sums.py": "import sums\n\n\ndef test_total():\n    assert sums.total([1, 2]) == 3\n\n\n"
    "def test_mean():\n    assert sums.mean([0, 0]) == 0\n",
}
ROW = """\
- name: {name}
  file: sums.py
  old: '{old}'
  new: '{new}'
  tests: ['{test}']
  why: a slip
"""
SEEN = ROW.format(name="largest", old="sum(values)", new="max(values)", test="test_sums.py::test_total")
SURVIVES = ROW.format(name="halved", old="/ len(values)", new="/ 2", test="test_sums.py::test_mean")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).write_text(text)
    plugin = Path(*PLUGIN.split(".")).with_suffix(".py")
    (tmp_path / plugin).parent.mkdir(parents=True)
    shutil.copy(ROOT / plugin, tmp_path / plugin)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def _run(project: Path, rows: str, *options: str) -> int:
    table = project / "table.yaml"
    table.write_text(rows)
    return main(options, project, table)


def test_a_survivor_is_named_and_the_checkout_stays_as_it_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(project, SEEN + SURVIVES, "--jobs", "2") == 1
    said = capsys.readouterr().out
    assert re.search(r"^seen .* largest  \(by test_sums.py::test_total\)$", said, re.MULTILINE)
    assert re.search(r"^SURVIVED .* halved ", said, re.MULTILINE)
    assert "1 of 2 mistakes seen" in said and "not seen: halved (sums.py): a slip" in said
    assert (project / "sums.py").read_text() == PROJECT["sums.py"]
    assert _run(project, SEEN + SURVIVES, "--only", "larg") == 0


def test_what_is_not_told_by_a_failing_test_is_no_success(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unreadable = ROW.format(name="unreadable", old="def total", new="def 2", test="test_sums.py")
    assert _run(project, unreadable) == 1
    assert "NO ANSWER" in capsys.readouterr().out
    (project / "test_sums.py").write_text("import time\n\n\ndef test_total():\n    time.sleep(60)\n")
    assert _run(project, SEEN, "--seconds", "2") == 2


def test_a_table_that_does_not_fit_is_refused(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(project, SEEN.replace("sum(values)", "values")) == 2
    assert "'largest': its old text occurs 5 times in sums.py, expected once" in capsys.readouterr().err
    assert _run(project, SEEN + SEEN) == 2
    assert "the same name: largest" in capsys.readouterr().err
    (project / "test_sums.py").write_text("def test_total():\n    assert False\n")
    assert _run(project, SEEN) == 2
    assert "the tests fail without a mistake" in capsys.readouterr().err
