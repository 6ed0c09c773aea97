"""A run with context parallelism in check mode: all ranks make the same collectives, and losses are a single process's."""

from pathlib import Path

import pytest

from tests.training.commands import run_to_end
from tests.training.test_run import corpus, losses, write_recipe

__all__ = ["corpus"]  # a fixture
STEPS = (
    "training.train_tokens=512",
    "training.validation_interval=2",
    "precision.compute=fp64",
    "precision.master=fp64",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[tuple[int, float]]:
    folder = tmp_path_factory.mktemp("alone")
    outcome = run_to_end(write_recipe(folder, corpus), "launch.nproc=1", *STEPS)
    assert outcome.returncode == 0, outcome.stderr
    return losses(folder)


@pytest.mark.parametrize("kind", ["ring", "all_gather", "ulysses"])
def test_check_mode_accepts_every_kind(tmp_path: Path, corpus: Path, alone: list[tuple[int, float]], kind: str) -> None:
    settings = ("parallel.cp=2", f"parallel.cp_kind={kind}", "parallel.check_collectives=true")
    outcome = run_to_end(write_recipe(tmp_path, corpus), *settings, *STEPS)
    assert outcome.returncode == 0, outcome.stderr
    found = losses(tmp_path)
    assert [step for step, _ in found] == [step for step, _ in alone] == [1, 2, 2]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in alone], rel=1e-10)
