"""FP8 runs through the command line: in tp, ep and pp at once, killed, gone on with, and in another layout."""

import json
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.training.commands import command, run_to_end
from tests.training.test_run import (
    STEPS,
    _steps_done,
    _wait_for,
    _workers,
    corpus,  # noqa: F401 (a fixture)
    losses,
    write_recipe,
)

FP8 = {"compute": "fp8", "fp8": {"recipe": "delayed", "amax_history_len": 4}}
LAYOUT = {"tp": 2, "pp": 2, "ep": 2}


def write(folder: Path, corpus: Path, **changes: Any) -> Path:  # noqa: F811
    import yaml

    recipe = write_recipe(folder, corpus, **changes)
    values = yaml.safe_load(recipe.read_text())
    values |= {"precision": FP8, "parallel": LAYOUT, "launch": {"nproc": 4, "threads": 1}}
    values["training"]["validation_sequences"] = 4
    recipe.write_text(yaml.safe_dump(values))
    return recipe


def scales(folder: Path) -> dict[str, torch.Tensor]:
    """The FP8 state of the newest checkpoint."""
    path = max((folder / "run" / "checkpoints").glob("step_*"))
    reader = dcp.FileSystemReader(path)
    known = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(item.size) for name, item in known.items() if name.startswith("kernels.")}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("fp8")
    outcome = run_to_end(write(folder, corpus))
    assert outcome.returncode == 0, outcome.stderr
    return folder


@pytest.mark.slow
def test_a_run_in_every_axis_learns(undisturbed: Path) -> None:
    figures = losses(undisturbed)
    assert figures[-1][1] < figures[0][1] - 0.5
    found = scales(undisturbed)
    # 2 layers x (q, k, v: 1 input, 3 weights, 3 gradients; o; shared expert: 1 + 2 + 2 and down; 2 products of experts).
    assert len(found) == 2 * 2 * (7 + 3 + 5 + 3 + 3 + 3)
    history = {name: value for name, value in found.items() if name.endswith("amax_history")}
    assert all((value > 0).any() for value in history.values()), "every tensor of every stage and expert was noted"
    assert all(value.shape[1] == 4 for value in history.values())
    assert history["kernels.model.layers.1.mlp.experts.down_proj.weight.amax_history"].shape[0] == 8


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:  # noqa: F811
    process = subprocess.Popen(command(write(tmp_path, corpus)), stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: _steps_done(tmp_path) >= 6, process)
    _workers(process.pid)[1].kill()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "restarting from the last checkpoint" in stderr
    assert losses(tmp_path) == losses(undisturbed)
    before, after = scales(undisturbed), scales(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_another_layout_goes_on_with_its_scales(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:  # noqa: F811
    """Half of the steps in tp, pp and ep, the others in one process; bf16 between the products rounds differently."""
    half = STEPS // 2
    recipe = write(tmp_path, corpus, checkpoint__interval=half)
    process = subprocess.Popen(command(recipe), stderr=subprocess.DEVNULL)
    _wait_for(lambda: (tmp_path / "run" / "checkpoints" / f"step_{half:08d}").is_dir(), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # its workers end with it, after a checkpoint of the step that they are at
    process.wait()
    assert not psutil.wait_procs(family, timeout=60)[1]
    alone = ["parallel.tp=1", "parallel.pp=1", "parallel.ep=1", "launch.nproc=1"]
    outcome = run_to_end(recipe, *alone)
    assert outcome.returncode == 0, outcome.stderr
    started, resumed = map(json.loads, (tmp_path / "run" / "attempts.jsonl").read_text().splitlines())
    assert (started["world_size"], resumed["world_size"]) == (4, 1) and half <= resumed["resumed_step"] < STEPS
    for (step, loss), (_, expected) in zip(losses(tmp_path), losses(undisturbed), strict=True):
        assert loss == pytest.approx(expected, rel=0.02), step


@pytest.mark.slow
def test_other_fp8_settings_are_another_run(undisturbed: Path, corpus: Path) -> None:  # noqa: F811
    recipe = write(undisturbed, corpus)
    outcome = run_to_end(recipe, "precision.fp8.recipe=mxfp8", "precision.fp8.amax_history_len=1024")
    assert outcome.returncode == 2 and "precision.fp8.recipe was" in outcome.stderr, outcome.stderr
    outcome = run_to_end(recipe, "precision.fp8.amax_history_len=8")
    assert outcome.returncode == 2 and "has no FP8 state" in outcome.stderr, outcome.stderr
    assert "Traceback" not in outcome.stderr
