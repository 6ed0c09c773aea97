"""A run whose length changes is the run of the new length, to the bit; where it would not be, it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launchers.errors import LaunchError
from qwen_moe.checkpoint.directory import commit, file_entry, files_in, partial_path
from qwen_moe.config import load_config
from qwen_moe.errors import UserError
from qwen_moe.launch.folder import is_complete, open_folder
from qwen_moe.runs.identity import ON_RESUME, differences, saved_settings
from qwen_moe.runs.records import read_lines
from qwen_moe.training.extension import check_length
from tests.training.commands import run_to_end
from tests.training.test_run import corpus, write_recipe
from tests.training.test_step import SEQ, make_config

__all__ = ["corpus"]
TOKENS = 8 * 32  # of a step
WSD = {"schedule__kind": "wsd", "schedule__decay_tokens": 2 * TOKENS, "schedule__warmup_tokens": 3 * TOKENS}
CONSTANT = {"schedule__kind": "constant", "schedule__warmup_tokens": 3 * TOKENS}


def recipe(folder: Path, corpus: Path, steps: int, **changes: Any) -> Path:
    """Of runs that keep the checkpoint of step 6."""
    folder.mkdir(exist_ok=True)
    shared = {"launch__nproc": 1, "training__train_tokens": steps * TOKENS, "checkpoint__keep_steps": [6]}
    return write_recipe(folder, corpus, **shared | changes)


def train(folder: Path, corpus: Path, steps: int, **changes: Any) -> str:
    outcome = run_to_end(recipe(folder, corpus, steps, **changes))
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stderr


def refused(folder: Path, corpus: Path, steps: int, **changes: Any) -> str:
    before = (folder / "run" / "config.yaml").read_text()
    outcome = run_to_end(recipe(folder, corpus, steps, **changes))
    assert outcome.returncode == 2 and "Traceback" not in outcome.stderr, outcome.stderr
    assert (folder / "run" / "config.yaml").read_text() == before, "the folder still says what was trained"
    return outcome.stderr


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = read_lines(folder / "run" / "metrics.jsonl")
    return [(r["step"], r["loss"], r["learning_rate"]) for r in records if "loss" in r]


def copy_until(folder: Path, step: int, target: Path) -> Path:
    """The run as it was when the checkpoint of ``step`` was its newest."""
    shutil.copytree(folder, target)
    for path in (target / "run" / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return target


def say_as_earlier_versions(checkpoint: Path) -> None:
    """Rewrite a checkpoint's settings in the form that they had before they were one table."""
    partial = partial_path(checkpoint)
    checkpoint.rename(partial)
    facts = json.loads((partial / "manifest.json").read_text())
    state = json.loads((partial / "train_state.json").read_text())
    saved = state["settings"]
    kept = {key: saved[key] for key in ("seed", "optimizer", "schedule", "balance")}
    kept["precision"] = {key: saved["precision"][key] for key in ("compute", "master")}
    kept["training"] = {key: saved["training"][key] for key in ("train_tokens", "global_batch_size")}
    assert set(saved) == {*kept, "data", "objective", "rollout"} and len(kept["optimizer"]) == 6
    (partial / "train_state.json").write_text(json.dumps(state | {"settings": kept}))
    entries = {file.as_posix(): file_entry(partial / file) for file in files_in(partial)}
    commit(checkpoint, entries, {key: facts[key] for key in ("step", "compute_dtype", "world_size")})


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """12 steps at a constant rate, without a stop: what others are compared with."""
    folder = tmp_path_factory.mktemp("constant")
    train(folder, corpus, 12, **CONSTANT)
    return folder


@pytest.fixture(scope="module")
def wsd(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """12 steps, of which the last two decay."""
    folder = tmp_path_factory.mktemp("wsd")
    train(folder, corpus, 12, **WSD)
    return folder


def test_a_complete_run_is_made_longer(constant: Path, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    exported = CONSTANT | {"checkpoint__export_hf": True}
    train(folder, corpus, 6, **exported)
    (entry,) = open_folder(folder, [])
    assert is_complete(entry)
    weights = (folder / "run" / "hf" / "model.safetensors").read_bytes()

    say_as_earlier_versions(folder / "run" / "checkpoints" / "step_00000006")
    recipe(folder, corpus, 12, **exported)
    (entry,) = open_folder(folder, [])
    assert not is_complete(entry)
    said = train(folder, corpus, 12, **exported)
    assert "(step 6 of 12)" in said
    assert losses(folder) == losses(constant) and len(losses(folder)) == 12
    assert is_complete(entry)
    # What it exported when it was shorter is kept apart from what it exports now.
    run = folder / "run"
    assert (run / "hf_step_00000006" / "model.safetensors").read_bytes() == weights
    assert (run / "hf" / "model.safetensors").read_bytes() != weights
    assert load_config(run / "config.yaml").train_steps == 12


@pytest.mark.slow
def test_a_trunk_is_made_longer_before_it_decays(wsd: Path, corpus: Path, tmp_path: Path) -> None:
    alone, longer = tmp_path / "alone", copy_until(wsd, 6, tmp_path / "longer")
    train(alone, corpus, 16, **WSD)
    train(longer, corpus, 16, **WSD)
    assert losses(longer) == losses(alone) and losses(longer)[11][2] != losses(wsd)[11][2]


def test_a_cosine_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(tmp_path, corpus, 6)
    said = refused(tmp_path, corpus, 12)
    assert f"training.train_tokens was {6 * TOKENS}, is now {12 * TOKENS}" in said
    assert "the learning rate of step 2, which is done," in said and "A cosine reaches to the end" in said
    assert "restore the setting" in said and "checkpoint.load_from" in said


def test_data_that_come_in_another_order_are_refused(constant: Path, corpus: Path) -> None:
    """A second pass over the data shuffles the documents of both passes together."""
    said = refused(constant, corpus, 900, **CONSTANT)
    assert f"a run of {900 * TOKENS} tokens reads the data in another order than one of {12 * TOKENS}" in said
    assert "data.order_tokens" in said


def test_a_run_is_made_shorter_where_that_changes_nothing(constant: Path, corpus: Path, tmp_path: Path) -> None:
    folder = copy_until(constant, 6, tmp_path / "shorter")
    recipe(folder, corpus, 6, **CONSTANT)
    (entry,) = open_folder(folder, [])
    assert not is_complete(entry), "the run decides whether it may end there"
    train(folder, corpus, 8, **CONSTANT)
    assert losses(folder) == losses(constant)[:8]
    said = refused(folder, corpus, 7, **CONSTANT)
    assert "holds a longer run" in said and f"Set at least {8 * TOKENS} tokens" in said
    (entry,) = open_folder(folder, [])
    with pytest.raises(LaunchError, match=r"training\.train_tokens was"):
        is_complete(entry)


def lengths(before: int, now: int, step: int, **changes: Any) -> None:
    tokens = 8 * SEQ
    changes = {"optimizer__learning_rate": 1.0} | {
        name: value * tokens if name.endswith("_tokens") else value for name, value in changes.items()
    }
    old, new = (make_config(training__train_tokens=steps * tokens, **changes) for steps in (before, now))
    check_length(new, differences(saved_settings(old), new, ON_RESUME), step)


W = {"schedule__kind": "wsd", "schedule__decay_tokens": 4, "schedule__warmup_tokens": 2}


@pytest.mark.parametrize(
    ("before", "now", "step", "schedule"),
    [
        (20, 30, 20, {"schedule__kind": "constant"}),
        (20, 10, 10, {"schedule__kind": "constant"}),
        (20, 30, 17, W),  # the decay begins after 16; its first step still has the whole rate
        (30, 20, 17, W),
        (20, 30, 5, {"schedule__kind": "cosine", "schedule__warmup_tokens": 5}),  # a warm-up is the same for any length
        (20, 20, 20, {"schedule__kind": "cosine"}),
    ],
)
def test_lengths_that_leave_the_past_as_it_was(before: int, now: int, step: int, schedule: dict[str, Any]) -> None:
    lengths(before, now, step, **schedule)


@pytest.mark.parametrize(
    ("before", "now", "step", "schedule", "message"),
    [
        (20, 9, 10, {"schedule__kind": "constant"}, "holds a longer run"),
        (
            20,
            30,
            18,
            W,
            r"was 1920, is now 2880.* rate of step 18, which is done.* began after step 16.*checkpoint\.branch_from",
        ),
        (30, 20, 18, W, "learning rate of step 18, which is done"),
        (
            20,
            30,
            7,
            {"schedule__kind": "cosine", "schedule__warmup_tokens": 5},
            "learning rate of step 7, which is done",
        ),
    ],
)
def test_lengths_that_would_have_changed_it(
    before: int, now: int, step: int, schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        lengths(before, now, step, **schedule)


@pytest.mark.parametrize("length", ["many", True, None, 0, -5, 1.5])
def test_a_length_that_is_none_is_another_setting(length: Any) -> None:
    config = make_config()
    saved = saved_settings(config)
    saved["training"]["train_tokens"] = length
    with pytest.raises(UserError, match=r"holds a run with other settings: training\.train_tokens was"):
        check_length(config, differences(saved, config, ON_RESUME), 1)
