"""Runs through the command line in which halves of micro-batches take turns."""

from pathlib import Path

import pytest

from qwen_moe.runs.records import read_lines
from tests.training.commands import run_to_end
from tests.training.test_run import (
    STEPS,
    corpus,  # noqa: F401 (a fixture)
    write_recipe,
)


def trained(folder: Path, corpus: Path, *attempts: tuple[str, ...]) -> list[float]:  # noqa: F811
    """The loss of each step of a run, which is started with each of the overrides in turn."""
    folder.mkdir()
    recipe = write_recipe(folder, corpus, parallel__ep=2, schedule__kind="constant")
    for overrides in attempts:
        outcome = run_to_end(recipe, *overrides)
        assert outcome.returncode == 0, outcome.stderr
    records = [record for record in read_lines(folder / "run" / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


@pytest.mark.slow
def test_a_run_with_halves_and_compiled_goes_on_without(tmp_path: Path, corpus: Path) -> None:  # noqa: F811
    """In bf16. Where and how a run computes may change when it is resumed."""
    half = (f"training.train_tokens={STEPS // 2 * 8 * 32}", "parallel.ep_overlap=true", "precision.compile=always")
    changed = trained(tmp_path / "changed", corpus, half, ())
    assert changed == pytest.approx(trained(tmp_path / "plain", corpus, ()), abs=0.02)
