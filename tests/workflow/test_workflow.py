"""`qwen-moe pipeline` from end to end: what is decided, going on after every kind of stop, inputs that change.

The small runs are `fake_train`'s, whose best learning rate and batch are known; everything else is the real thing.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.folder.run_folder import read_json
from launchers.local.lock import RunLock
from qwen_moe.cli import main
from qwen_moe.config import load_config
from qwen_moe.launch import folder as launch_folder
from qwen_moe.models.flops import count_parameters
from qwen_moe.workflow import command
from qwen_moe.workflow.state import State
from qwen_moe.workflow.steps import round_batch
from scaling_laws import fitting
from scaling_laws.fitting import fit_table
from tests.workflow import fake_train

FAKE = (sys.executable, str(Path(fake_train.__file__)))
STEPS = ("prepare", "ladder", "run", "collect", "fit", "recommend", "plan", "launch")
BUDGET = "1e12"


def write_recipe(folder: Path) -> None:
    rng = random.Random(0)
    words = ["router", "expert", "token", "gradient", "tensor", "pipeline", "batch", "loss"]
    documents = [" ".join(rng.choices(words, k=200)) for _ in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    values: dict[str, Any] = {
        "run_dir": "large",
        "model": {
            "family": "qwen3_moe",
            "vocab_size": 300,
            "hidden_size": 96,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
        },
        "data": {
            "prepare": {"input": ["text.jsonl"], "output": "tokens", "train_tokenizer": True, "vocab_size": 300},
            "sequence_length": 32,
            "split": "90,10,0",
        },
        "training": {"train_tokens": 2_000_000, "micro_batch_size": 8, "global_batch_size": 8},
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "wsd", "decay_tokens": 400_000, "min_learning_rate": 0.001},
        "checkpoint": {"export_hf": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the test holds a recipe and its text, and is where commands run."""
    monkeypatch.setattr(launch_folder, "TRAIN", FAKE)
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder where the pipeline went through, and what it printed. Intervals, which a fifth of the refits made, count for
    nothing here."""
    folder, out, err = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
    write_recipe(folder)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(launch_folder, "TRAIN", FAKE)
        patch.setattr(
            fitting, "fit_table", lambda table, samples, **rest: fit_table(table, samples=samples // 5, **rest)
        )
        patch.chdir(folder)
        assert pipeline("--yes") == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture
def finished(recipe: None, whole: tuple[Path, str, str], tmp_path: Path) -> None:
    """The folder of the test is a copy of one where the pipeline went through."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)


def pipeline(*options: str) -> int:
    return main(["pipeline", "recipe.yaml", "--output", "out", "--flops-budget", BUDGET, "--parallel", "2", *options])


def done(folder: Path) -> list[str]:
    return list(read_json(folder / "out" / "state.json")["steps"])


def test_from_recipe_to_recommended_recipe(
    finished: None, whole: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed, told = whole
    assert printed.split()[-1] == "out/pipeline.md" and done(tmp_path) == list(STEPS)
    assert "runs have to be trained" in told and "expected time here about" in told
    config = load_config(tmp_path / "out" / "recipe.yaml")
    size = float(count_parameters(config.model).non_vocabulary_total)
    rate, batch = fake_train.optimum(size, 2e6)
    assert config.optimizer.learning_rate == pytest.approx(rate, rel=0.25)
    assert config.tokens_per_step == pytest.approx(batch, rel=0.3)
    assert config.schedule.min_learning_rate == pytest.approx(0.1 * config.optimizer.learning_rate)
    found = read_json(tmp_path / "out" / "state.json")["steps"]["recommend"]["facts"]
    assert found["predicted_loss"] == pytest.approx(fake_train.best_loss(size, 2e6), rel=0.01)
    page = (tmp_path / "out" / "pipeline.md").read_text()
    for text in ("not yet", "Predicted loss", f"| {config.optimizer.learning_rate:.3g} |", "fit/surface.png"):
        assert (text in page) == (text != "not yet"), text
    for line in page.splitlines():
        if line.startswith("!["):
            assert (tmp_path / "out" / line.split("(")[1].rstrip(")")).stat().st_size > 10_000
    # Every command on the page can be given by hand.
    commands = [line.strip() for line in page.splitlines() if line.startswith("    qwen-moe ")]
    assert [c.split()[1] for c in commands] == ["data", "scaling", "launch", "scaling", "scaling", "scaling", "scaling"]
    capsys.readouterr()
    assert main(commands[3].split()[1:]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == []
    advice = page.split("`qwen-moe scaling next ")[1].split("`")[0]
    assert main(["scaling", "next", *advice.split(), "--count", "1"]) == 0
    assert "runs so far" in capsys.readouterr().out
    # Again: nothing is done twice.
    before = read_json(tmp_path / "out" / "state.json")
    assert pipeline() == 0
    assert capsys.readouterr().err.count("done before") == len(STEPS)
    assert read_json(tmp_path / "out" / "state.json") == before


def test_the_plan_keeps_the_precision_of_the_small_runs(finished: None, tmp_path: Path) -> None:
    """The fastest layout on these GPUs is in FP8, which the small runs did not use."""
    assert pipeline("--yes", "--gpus", "8", "--network", "ib200", "--until", "plan") == 0
    (command,) = read_json(tmp_path / "out" / "state.json")["steps"]["plan"]["commands"]
    assert command.endswith("--network ib200 --precision bf16 --write")
    assert load_config(tmp_path / "out" / "recipe.yaml").precision.compute == "bf16"


def test_nobody_to_ask_is_an_error_and_not_a_hang(
    recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert pipeline() == 2
    message = capsys.readouterr().err
    assert "add --yes" in message and "--until ladder" in message and "FLOPs" in message
    assert done(tmp_path) == ["prepare", "ladder"] and not (tmp_path / "out" / "ladder" / "runs").exists()
    assert "| run | train the small runs | not yet |" in (tmp_path / "out" / "pipeline.md").read_text()
    assert pipeline("--until", "ladder") == 0


class Terminal:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


@pytest.mark.slow
def test_the_answer_decides(recipe: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    assert pipeline() == 0 and done(tmp_path) == ["prepare", "ladder"]
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert pipeline("--until", "run") == 0 and done(tmp_path) == ["prepare", "ladder", "run"]


def test_what_another_pipeline_finished_while_this_one_began_is_not_done_again(
    finished: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state is read under the lock: one that is read before it would be written over the other's."""
    state = tmp_path / "out" / "state.json"
    whole_state = state.read_text()
    state.write_text('{"steps": {}}')

    def lock(folder: Path) -> RunLock:
        found = RunLock(folder)
        state.write_text(whole_state)
        return found

    monkeypatch.setattr(command, "RunLock", lock)
    assert pipeline() == 0
    assert capsys.readouterr().err.count("done before") == len(STEPS) and state.read_text() == whole_state


def test_changed_inputs_are_named(finished: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Of the ladder, whose runs are worth something: refused, until asked for.
    assert pipeline("model.num_experts=8", "--yes") == 2
    message = capsys.readouterr().err
    assert "model.num_experts was 4, is now 8" in message and "--redo ladder" in message
    assert main(["pipeline", "recipe.yaml", "--output", "out", "--flops-budget", "9e12"]) == 2
    assert "--flops-budget was 1000000000000.0, is now 9000000000000.0" in capsys.readouterr().err
    # Of what is cheap: done again, with what depends on it, and no more.
    runs = tmp_path / "out" / "runs.csv"
    runs.write_text(runs.read_text().replace("\nrun_000,", "\nrun_xyz,"))
    assert pipeline("--yes") == 0
    message = capsys.readouterr().err
    assert "fit: fit the laws again, because out/runs.csv has changed" in message
    assert "run: done before" in message and "collect: done before" in message
    assert pipeline("--redo", "ladder", "--yes", "--until", "ladder") == 0
    assert (tmp_path / "out" / "ladder.old-1" / "runs").is_dir() and not (tmp_path / "out" / "ladder" / "runs").exists()
    assert done(tmp_path) == ["prepare", "ladder"]


@pytest.mark.slow
def test_failed_runs_stop_it_and_the_same_command_mends_it(
    recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline("--until", "ladder") == 0
    runs = tmp_path / "out" / "ladder" / "runs"
    runs.mkdir()
    (runs / "fail").write_text("2")
    assert pipeline("--yes") == 2
    message = capsys.readouterr().err
    assert "runs of the ladder are not done" in message or "no run of" in message
    (runs / "fail").unlink()
    assert pipeline("--yes", "--until", "collect") == 0 and done(tmp_path) == list(STEPS[:4])


@pytest.mark.slow
def test_a_kill_in_every_step_changes_nothing(recipe: None, tmp_path: Path) -> None:
    """The process dies with SIGKILL when a step's work is done and not yet recorded, the worst moment; in each step once."""
    state = tmp_path / "out" / "state.json"
    for number, step in enumerate(STEPS):
        script = f"""
import os, signal, sys
from qwen_moe.cli import main
from qwen_moe.launch import folder
from qwen_moe.workflow.state import State
folder.TRAIN = {FAKE!r}
recorded = State.finish
def finish(self, step, *rest):
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    recorded(self, step, *rest)
State.finish = finish
main(["pipeline", "recipe.yaml", "--output", "out", "--flops-budget", {BUDGET!r}, "--parallel", "2", "--yes"])
"""
        metrics = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "ladder").glob("runs/*/metrics.jsonl")}
        killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert list((read_json(state) or {"steps": {}})["steps"]) == list(STEPS[:number])
        assert all(path.stat().st_mtime_ns == at for path, at in metrics.items()), "no small run was made twice"
    assert pipeline("--yes") == 0 and done(tmp_path) == list(STEPS)
    assert (tmp_path / "out" / "ladder.old-1").is_dir(), "the ladder that was not recorded was made again"
    assert load_config(tmp_path / "out" / "recipe.yaml").optimizer.learning_rate != 0.01


@pytest.mark.slow
def test_an_interrupt_of_the_small_runs_stops_in_order(recipe: None, tmp_path: Path) -> None:
    script = f"""
import sys
from qwen_moe.cli import main
from qwen_moe.launch import folder
folder.TRAIN = (sys.executable, "-c", "import time; time.sleep(60)")
sys.exit(main(["pipeline", "recipe.yaml", "--output", "out", "--flops-budget", {BUDGET!r}, "--yes"]))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "out" / "ladder" / "logs").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped in step run" in errors and "Traceback" not in errors
    assert done(tmp_path) == ["prepare", "ladder"]
    assert pipeline("--yes", "--until", "run") == 0


def test_mistakes_are_refused(recipe: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main(["pipeline", "recipe.yaml", "--output", "out", *arguments]) == 2
        return capsys.readouterr().err

    assert "multiple of --gpus-per-node 8" in refused("--gpus", "12")
    assert "--submit needs --gpus" in refused("--submit")
    assert "give --flops-budget" in refused()
    nothing = ("data.prepare=null", "data.train=[{prefix: nothing}]", "--flops-budget", BUDGET)
    assert "nothing.bin does not exist" in refused(*nothing)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert main(["pipeline", "recipe.yaml", "--output", "full"]) == 2
    assert "contains thesis.tex and no state.json" in capsys.readouterr().err


def test_batches_that_many_layouts_divide() -> None:
    assert [round_batch(n) for n in (1, 3, 7, 1037, 1000, 1504, 96, 2047)] == [1, 3, 7, 1024, 1024, 1536, 96, 2048]
    for n in range(1, 3000):
        assert abs(round_batch(n) / n - 1) <= 0.0601
        assert abs(round_batch(n, 8) / n - 1) <= 0.2501
    # 7 and 13 sequences would leave 8 GPUs of a small model without a layout.
    assert [round_batch(n, 8) for n in (1, 3, 5, 7, 13, 100, 1037)] == [1, 3, 4, 8, 16, 96, 1024]


def test_inputs_that_earlier_versions_counted_do_not_make_a_step_again(tmp_path: Path) -> None:
    """They counted all of a section, also what tells no two runs apart."""
    state = State(tmp_path)
    before = {"seed": 1, "training.recompute": "none", "optimizer.provider": "torch", "data.sequence_length": 8}
    state.finish("ladder", before, {}, [], 1.0)
    assert state.changes("ladder", {"seed": 1, "data.sequence_length": 8}) == []
    assert state.changes("ladder", {"seed": 2}) == ["seed was 1, is now 2", "data.sequence_length was 8, is now None"]
