"""Whole runs with context parallelism through the command line: their figures, their weights, and a kill."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen_moe.runs.records import read_lines
from tests.training.commands import command, run_to_end
from tests.training.test_run import (
    STEPS,
    _steps_done,
    _wait_for,
    _workers,
    corpus,  # noqa: F401  a fixture
    losses,
    write_recipe,
)

# Balancing of sequences, because that of the global batch depends on how it is cut into micro-batches.
EXACT: dict[str, Any] = {
    "precision__compute": "fp64",
    "precision__master": "fp64",
    "balance__scope": "sequence",
    "data__respect_document_boundaries": True,
    "data__mask_end_of_document": True,
}
RING: dict[str, Any] = EXACT | {"parallel__cp": 2, "parallel__cp_kind": "ring", "training__recompute": "full"}


def _run(folder: Path, corpus: Path, **changes: Any) -> Path:  # noqa: F811
    outcome = run_to_end(write_recipe(folder, corpus, **changes), "checkpoint.export_hf=true")
    assert outcome.returncode == 0, outcome.stderr
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:  # noqa: F811
    return _run(tmp_path_factory.mktemp("alone"), corpus, **EXACT, launch__nproc=1)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:  # noqa: F811
    return _run(tmp_path_factory.mktemp("ring"), corpus, **RING)


def _same(folder: Path, other: Path) -> None:
    """All figures that do not depend on time, validation among them, and the exported weights."""
    kept = ("step", "tokens", "loss", "validation_loss", "z_loss", "balance_loss", "grad_norm", "learning_rate")
    records, expected = ([*read_lines(where / "run" / "metrics.jsonl")] for where in (folder, other))
    for got, want in zip(records, expected, strict=True):
        assert got.get("expert_counts") == want.get("expert_counts")
        figures = {key: want[key] for key in kept if key in want}
        assert {key: got[key] for key in kept if key in got} == pytest.approx(figures, rel=1e-10, abs=0)
    weights, whole = (load_file(where / "run" / "hf" / "model.safetensors") for where in (folder, other))
    for name, tensor in whole.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-7, atol=1e-9)
    assert weights.keys() == whole.keys()


def test_a_run_has_the_figures_and_weights_of_one_process(ring: Path, alone: Path) -> None:
    """Seven validation samples are padded to eight, by one whose labels are all ignored."""
    _same(ring, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"parallel__cp_kind": "all_gather"},
        {"parallel__cp_kind": "ulysses"},
        {"parallel__cp": 4, "parallel__cp_ulysses": 2, "training__micro_batch_size": 1},
        {"parallel__pp": 2, "parallel__cp_kind": "auto", "parallel__ep": 2, "model__tie_word_embeddings": False},
    ],
    ids=str,
)
def test_each_kind_has_them(changes: dict[str, Any], alone: Path, tmp_path: Path, corpus: Path) -> None:  # noqa: F811
    _same(_run(tmp_path, corpus, **RING | changes), alone)


@pytest.mark.slow
def test_a_kill_changes_nothing(ring: Path, tmp_path: Path, corpus: Path) -> None:  # noqa: F811
    recipe = write_recipe(tmp_path, corpus, **RING)
    process = subprocess.Popen(command(recipe), stderr=subprocess.DEVNULL)
    _wait_for(lambda: _steps_done(tmp_path) >= 5, process)
    _workers(process.pid)[1].kill()
    assert process.wait(timeout=120) == 0
    assert losses(tmp_path) == losses(ring)
    steps = [r["step"] for r in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert steps == [*range(1, STEPS + 1)]
