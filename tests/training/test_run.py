"""Whole runs through the command line: train, stop, kill, go on, refuse; two processes each."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from qwen_moe.cli import main
from qwen_moe.models.ops.compiled import missing_compiler
from qwen_moe.runs.records import read_lines
from tests.distributed import run_distributed
from tests.training.commands import command, run_to_end

STEPS = 12
EXPORT = ("checkpoint.export_hf=true", "sample_prompt=router expert")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenized corpus of sentences made of few words, so that a few steps learn something."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["router", "expert", "token", "gradient", "tensor", "pipeline", "batch", "loss"]
    documents = [" ".join(rng.choices(words, k=200)) for _ in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    arguments = ["--input", str(folder / "text.jsonl"), "--output", str(folder / "tokens")]
    assert main(["data", "prepare", *arguments, "--train-tokenizer", "--vocab-size", "300", "--workers", "1"]) == 0
    return folder


def write_recipe(folder: Path, corpus: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {
            "family": "qwen2_moe",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "max_position_embeddings": 256,
        },
        "data": {
            "train": [{"prefix": str(corpus / "tokens")}],
            "tokenizer": str(corpus / "tokens-tokenizer"),
            "sequence_length": 32,
            "split": "90,10,0",
        },
        "training": {
            "train_tokens": STEPS * 8 * 32,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "validation_interval": 4,
            "validation_sequences": 7,
        },
        "optimizer": {"learning_rate": 0.01},
        "balance": {"z_loss_coefficient": 1e-4},
        "checkpoint": {"interval": 2, "keep": 2, "export_hf": False},
        "logging": {"expert_load_interval": 4},
        "launch": {"nproc": 2},
    }
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        values.setdefault(section, {})[key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder: Path) -> list[tuple[int, float]]:
    """Every figure that the run computed, exactly, in order."""
    records = read_lines(folder / "run" / "metrics.jsonl")
    return [(r["step"], r.get("loss", r.get("validation_loss"))) for r in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    """As a user trains; the other runs of these tests are compared with it."""
    options = (*EXPORT, "logging.tensorboard=true")
    outcome = subprocess.run(
        command(write_recipe(folder, corpus), *options), capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    return folder


def test_a_run_learns_and_leaves_everything_it_promises(undisturbed: Path) -> None:
    run = undisturbed / "run"
    figures = losses(undisturbed)
    assert [step for step, _ in figures] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert figures[-1][1] < figures[0][1] - 0.5
    for name in ("loss.png", "expert_load.png", "sample.txt", "config.yaml", "attempts.jsonl", "hf/config.json"):
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000010", "step_00000012"]
    assert list((run / "tensorboard").iterdir())
    record = read_lines(run / "metrics.jsonl")[-2]
    assert record["tokens"] == STEPS * 8 * 32 and 0 < record["share_of_peak"] < 2 and record["memory_bytes"] > 1e7
    counts = record["expert_counts"]
    assert len(counts) == 2 and all(sum(layer) == 8 * 32 * 2 for layer in counts)
    assert (run / "sample.txt").read_text().startswith("router expert")


def test_running_again_changes_nothing(undisturbed: Path, corpus: Path) -> None:
    before = losses(undisturbed)
    outcome = run_to_end(write_recipe(undisturbed, corpus), *EXPORT)
    assert outcome.returncode == 0, outcome.stderr
    assert losses(undisturbed) == before


def _wait_for(condition: Any, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was disturbed"
        assert time.monotonic() < end, "the run did not get there"
        time.sleep(0.02)


def _steps_done(folder: Path) -> int:
    try:
        return len(read_lines(folder / "run" / "metrics.jsonl"))
    except FileNotFoundError:
        return 0


def test_interrupt_then_the_same_command_gives_the_same_run(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, corpus, checkpoint__interval=100)
    process = subprocess.Popen(command(recipe), stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: _steps_done(tmp_path) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "the same command resumes from there" in stderr and "Traceback" not in stderr
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1
    outcome = run_to_end(recipe)
    assert outcome.returncode == 0, outcome.stderr
    assert "resumed from" in outcome.stderr
    assert losses(tmp_path) == losses(undisturbed)


def _stop_after_one_step(recipe: Path) -> tuple[int, list[str]]:
    """Train in this process until a stop that is asked for at once. Exit code, and what it said."""
    import contextlib
    import io

    import torch

    from parallel.process import process_info
    from qwen_moe.config import load_config
    from qwen_moe.training import loop

    loop.StopRequest.agreed = lambda self: True  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = loop.train(load_config(recipe), process_info(), torch.device("cpu"))
    return code, said.getvalue().splitlines()


def test_a_stop_after_a_fall_back_keeps_what_the_same_command_goes_on_from(
    tmp_path: Path, corpus: Path, undisturbed: Path
) -> None:
    """The last checkpoint is damaged: the run falls back to the one before, is stopped, and goes on from what it wrote."""
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    recipe = write_recipe(tmp_path, corpus, checkpoint__keep=2, precision__compile="never", launch__nproc=1)
    (root / "step_00000012" / "train_state.json").write_text("{}")
    ((code, said),) = run_distributed(_stop_after_one_step, 1, recipe)
    assert code == 130 and "falling back to step_00000010" in said
    assert any("train_state.json has 2 bytes, expected" in line for line in said), said
    assert sorted(path.name for path in root.iterdir()) == [
        "step_00000010",
        "step_00000011",
        "step_00000012.abandoned",
    ]
    ((code, said),) = run_distributed(_stop_after_one_step, 1, recipe)
    assert code == 0 and any("resumed from" in line and "(step 11 of 12)" in line for line in said), said
    assert sorted(path.name for path in root.iterdir()) == ["step_00000011", "step_00000012"]


def _workers(launcher: int) -> list[psutil.Process]:
    """The processes that train: children of the elastic agent, which the command has started."""
    found = []
    for agent in psutil.Process(launcher).children():
        try:
            if "qwen_moe.training.elastic" in agent.cmdline():
                found += agent.children()
        except psutil.NoSuchProcess:
            continue
    return found


def _kill_workers_at_random_moments(recipe: Path, kills: int, seed: int, steps: int) -> int:
    """Start the run of ``steps`` steps; ``kills`` times, wait a random while after both workers are there, but no longer
    than this kill's share of the steps, and kill -9 one of them. How many were killed."""
    rng = random.Random(seed)
    process = subprocess.Popen(command(recipe), stderr=subprocess.DEVNULL)
    seen: set[int] = set()
    for kill in range(kills):
        _wait_for(lambda old=frozenset(seen): len({w.pid for w in _workers(process.pid)} - old) == 2, process)
        # From the start of the interpreter to well into training.
        end, most = time.monotonic() + rng.uniform(0, 10), steps * (kill + 1) // (kills + 2)
        while time.monotonic() < end and _steps_done(recipe.parent) < most:
            time.sleep(0.02)
        alive = [w for w in _workers(process.pid) if w.pid not in seen]
        assert len(alive) == 2, "the run ended before it was killed often enough"
        seen |= {w.pid for w in alive}
        rng.choice(alive).kill()
    assert process.wait(timeout=300) == 0
    return len(seen) // 2


def test_kill_minus_nine_of_a_worker_does_not_change_the_run(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, corpus)
    process = subprocess.Popen(command(recipe), stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: _steps_done(tmp_path) >= 6, process)
    _workers(process.pid)[0].kill()
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert "restarting from the last checkpoint" in stderr
    assert losses(tmp_path) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_kills_at_random_moments(tmp_path: Path, corpus: Path) -> None:
    longer = {"training__train_tokens": 300 * 8 * 32, "training__validation_interval": 50, "checkpoint__interval": 7}
    found = []
    for name, kills in (("undisturbed", 0), ("killed", 10)):
        folder = tmp_path / name
        folder.mkdir()
        assert (
            _kill_workers_at_random_moments(write_recipe(folder, corpus, **longer), kills, seed=1, steps=300) == kills
        )
        found.append(losses(folder))
    assert len(found[0]) == 306 and found[0] == found[1]


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="no C++ compiler on this machine")
def test_a_kill_does_not_change_a_compiled_run(tmp_path: Path, corpus: Path) -> None:
    """Kernels that are compiled again, or taken from the compiler's cache, give the same bits."""
    found = []
    for name, kills in (("undisturbed", 0), ("killed", 1)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, corpus, training__train_tokens=60 * 8 * 32, precision__compile="always")
        assert _kill_workers_at_random_moments(recipe, kills, seed=2, steps=60) == kills
        found.append(losses(folder))
    assert len(found[0]) == 75 and found[0] == found[1]


def test_a_killed_launcher_leaves_no_process_behind(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, corpus)
    process = subprocess.Popen(command(recipe), stderr=subprocess.DEVNULL)
    _wait_for(lambda: _steps_done(tmp_path) >= 2, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    outcome = run_to_end(recipe)
    assert outcome.returncode == 0, outcome.stderr
    assert losses(tmp_path) == losses(undisturbed)


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, corpus: Path) -> Iterator[Any]:
    """Run with overrides that must be refused; the message."""

    def check(*overrides: str, **changes: Any) -> str:
        assert main(["train", str(write_recipe(tmp_path, corpus, **changes)), *overrides]) == 2
        message = capfd.readouterr().err
        assert message.count("error: ") == 1 and "Traceback" not in message
        return message

    yield check


def test_bad_input_is_refused_before_any_process_starts(refused: Any, tmp_path: Path, corpus: Path) -> None:
    started = time.monotonic()
    assert "'learning_rate'" in refused("optimizer.learnin_rate=1")
    assert "num_experts_per_tok 9 is larger than num_experts 8" in refused("model.num_experts_per_tok=9")
    assert "global_batch_size 8 is not a multiple of micro_batch_size 2 x 3" in refused("launch.nproc=3")
    assert "does not exist" in refused(data__train=[{"prefix": str(tmp_path / "nothing")}])
    assert "tokenizer" in refused("model.vocab_size=299")
    assert "num_attention_heads 5" in refused("model.num_attention_heads=5")
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())
    assert time.monotonic() - started < 60


def test_a_run_with_other_settings_in_the_same_folder_is_refused(undisturbed: Path, corpus: Path) -> None:
    outcome = run_to_end(write_recipe(undisturbed, corpus), "optimizer.learning_rate=0.5")
    assert outcome.returncode == 2
    assert "optimizer.learning_rate was 0.01, is now 0.5" in outcome.stderr
    assert outcome.stderr.count("error: ") == 1 and "Traceback" not in outcome.stderr


def test_weights_of_another_run_can_be_the_start(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, corpus, optimizer__learning_rate=1e-4)
    outcome = run_to_end(recipe, f"checkpoint.load_from={undisturbed / 'run'}")
    assert outcome.returncode == 0, outcome.stderr
    assert losses(tmp_path)[0][1] == pytest.approx(losses(undisturbed)[-2][1], abs=0.3)


@pytest.mark.slow
def test_torchrun_can_start_the_command_itself(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    recipe = write_recipe(tmp_path, corpus)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outcome = subprocess.run(
        [*torchrun, "-m", "qwen_moe", "train", str(recipe), EXPORT[0]],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr
    assert losses(tmp_path) == losses(undisturbed)
    assert (tmp_path / "run" / "hf" / "config.json").exists()
