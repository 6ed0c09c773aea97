"""A run that branches off a trunk ends where a run of its own would have, to the bit; and a wrong trunk is refused."""

from pathlib import Path

import pytest

from tests.training.commands import run_to_end
from tests.training.test_run import STEPS, corpus, losses, write_recipe

__all__ = ["corpus"]
TOKENS = 8 * 32
TRUNK = ("schedule.kind=wsd", f"schedule.decay_tokens={2 * TOKENS}", "checkpoint.keep=1")
BRANCH = (*TRUNK, f"training.train_tokens={8 * TOKENS}", f"data.order_tokens={STEPS * TOKENS}")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    outcome = run_to_end(_recipe(folder, corpus), *TRUNK, "checkpoint.keep_steps=[3,6]")
    assert outcome.returncode == 0, outcome.stderr
    assert [p.name for p in sorted((folder / "run" / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (3, 6, STEPS)
    ]
    return folder


def _recipe(folder: Path, corpus: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder, corpus)


def test_a_branch_ends_where_its_own_run_would(trunk: Path, corpus: Path, tmp_path: Path) -> None:
    alone, branch = tmp_path / "alone", tmp_path / "branch"
    assert run_to_end(_recipe(alone, corpus), *BRANCH).returncode == 0
    start = trunk / "run" / "checkpoints" / "step_00000006"
    outcome = run_to_end(_recipe(branch, corpus), *BRANCH, f"checkpoint.branch_from={start}")
    assert outcome.returncode == 0, outcome.stderr
    assert "branched from" in outcome.stderr
    found = losses(branch)
    assert found[0][0] == 7 and found == [row for row in losses(alone) if row[0] > 6]


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        (3, ["optimizer.learning_rate=0.02"], "optimizer.learning_rate was 0.01, is now 0.02"),
        (6, [f"schedule.decay_tokens={4 * TOKENS}"], "the learning rate of step 6 was"),
        (6, [f"schedule.warmup_tokens={TOKENS * 2}"], "the learning rate of step 1 was"),
        (6, ["data.order_tokens=0"], "or in another order"),
        (5, [], "it is not there, or not a whole checkpoint; train the run that it belongs to first"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused(
    step: int, changes: list[str], message: str, trunk: Path, corpus: Path, tmp_path: Path
) -> None:
    start = trunk / "run" / "checkpoints" / f"step_{step:08d}"
    alone = "launch.nproc=1"
    given = [item.partition("=")[0] for item in changes]
    branch = [item for item in BRANCH if item.partition("=")[0] not in given]
    outcome = run_to_end(_recipe(tmp_path / "x", corpus), *branch, f"checkpoint.branch_from={start}", alone, *changes)
    assert outcome.returncode == 2 and message in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr
