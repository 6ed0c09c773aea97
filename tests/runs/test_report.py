"""`qwen-moe report`, metrics that survive crashes, and the room that checkpoints need."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.checkpoint import preflight
from qwen_moe.cli import main
from qwen_moe.errors import UserError
from qwen_moe.runs import report
from qwen_moe.runs.recorder import MetricsLog
from qwen_moe.runs.records import read_lines
from tests.training.test_step import make_config


def record(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": 5.0 - step / 10,
        "learning_rate": 0.01,
        "step_seconds": 0.5,
        "tokens_per_second": 200.0,
        "model_flops_per_second": 2e9,
        "share_of_peak": 0.25,
        "memory_bytes": 10**9,
        "expert_imbalance_mean": 0.5,
        "expert_imbalance_max": 0.8,
        "balance_loss": 1.1,
        "expert_counts": [[3, 5], [4, 4]],
    }


def write_run(folder: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, [record(1), record(2), {"step": 2, "validation_loss": 4.5}])
    assert main(["report", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["loss"] == 4.8 and facts["validation_loss"] == 4.5 and facts["tokens_per_second"] == 200.0
    assert facts["share_of_peak"] == 0.25
    for path in facts["pictures"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
    assert main(["report", str(tmp_path)]) == 0
    assert "validation loss   4.5000" in capsys.readouterr().out


def test_steps_that_had_nothing_to_learn_from_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that answers all samples of a query alike; such a step has no speed."""
    records = [record(step) | {"reward": 0.5, "used_answers": 0.25} for step in range(1, 21)]
    silent = {"used_answers": 0.0, "tokens_per_second": 2.0, "model_flops_per_second": 2e7, "share_of_peak": 0.0025}
    for index in (3, *range(10, 20)):
        records[index] |= silent
    write_run(tmp_path, records)
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "  not learned       in 11 of 20 steps: all answers to each query had the same reward\n" in said
    assert "training loss" not in said  # a policy's is near 0 from the first step to the last
    assert "  speed             200 tokens/s, 2.0 GFLOP/s of the model, 25% of" in said
    write_run(tmp_path, [one | silent for one in records])
    assert main(["report", str(tmp_path)]) == 0
    assert "  not learned       in 20 of 20 steps" in capsys.readouterr().out


def test_a_full_disk_leaves_the_report_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(run_dir: Path) -> list[Path]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_run(tmp_path, [record(1)])
    monkeypatch.setattr(report, "draw", full)
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "training loss     4.9000" in said.out and said.err.count("\n") == 1
    assert f"no pictures in {tmp_path}: " in said.err and "free some space" in said.err


def test_a_run_on_pairs_says_whether_it_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last step of an epoch may have three pairs, so its loss says little."""
    write_run(tmp_path, [record(step) | {"accuracy": 0.0 if step == 1 else 0.5 + step / 50} for step in range(1, 21)])
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "  accuracy          the chosen answer is preferred in 86% of pairs, in the last quarter of steps (50% by"
        in said
    )


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_a_run(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_resumed_log_drops_what_will_be_done_again_and_the_cut_line(tmp_path: Path) -> None:
    write_run(tmp_path, [record(1), record(2), {"step": 2, "validation_loss": 1.0}, record(3)], '{"step": 4, "lo')
    log = MetricsLog(tmp_path / "metrics.jsonl", resumed_step=2)
    log.write(record(3))
    log.close()
    assert [r["step"] for r in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3]


def test_room_for_checkpoints_is_asked_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(checkpoint__keep=4)
    each = preflight.checkpoint_bytes(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * each))
    preflight.check_disk_space(config, tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * each - 1))
    with pytest.raises(UserError, match=r"room for 5 .* checkpoint.keep \(now 4\)"):
        preflight.check_disk_space(config, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "metrics.jsonl:2 is damaged (it is not JSON): remove the line"),
        ("[1]", "it is not an object but list"),
        ('{"loss": 1.0}', "its step is None"),
        ('{"step": true, "loss": 1.0}', "its step is True"),
        ('{"step": -3}', "its step is -3"),
        ('{"step": 2, "loss": "2.5"}', "its loss is '2.5'"),
        ('{"step": 2, "validation_loss": null}', "its validation_loss is None"),
        ('{"step": 2, "expert_counts": [[1], [1, 2]]}', "expert_counts are not rows of equal length"),
        ('{"step": 2, "expert_counts": 7}', "expert_counts are not rows of equal length"),
        ('{"step": 2, "expert_counts": []}', "expert_counts are not rows of equal length"),
        ('{"step": 2, "expert_counts": [[]]}', "expert_counts are not rows of equal length"),
        ('{"step": 2, "reward": "high"}', "its reward is 'high'"),
        ('{"step": 2, "used_answers": null}', "its used_answers is None"),
        ('{"step": 2, "held_out_reward": [1]}', "its held_out_reward is [1]"),
        ('{"step": 2, "expert_imbalance_mean": "x"}', "its expert_imbalance_mean is 'x'"),
        ('{"step": 2, "stage": ["a"]}', "its stage is ['a']"),
        ('{"step": 2, "stage": "a", "sequence_length": "x"}', "its sequence_length is 'x'"),
        ('{"step": 2, "reward": 0.5}', "the record of step 2 lacks used_answers"),
        (json.dumps(record(2) | {"model_flops_per_second": 0}), "the record of step 2 has no step or speed"),
        (json.dumps(record(2) | {"step_seconds": 0.0}), "the record of step 2 has no step or speed"),
        ('{"step": 2, "loss": 2.5}', "the record of step 2 lacks tokens"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, [record(1)], line + "\n" + json.dumps(record(3)) + "\n")
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    assert main(["report", str(tmp_path)]) == 2
    assert "byte 0 is not UTF-8" in capsys.readouterr().err


def test_a_report_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Speeds are of the last stage, whose steps have other tokens; borders and every length's curve are drawn."""
    short, long = {"stage": "short", "sequence_length": 16}, {"stage": "long", "sequence_length": 64}
    records = [record(step) | short for step in (1, 2, 3)]
    records += [{"step": 3, "validation_loss": 4.5, "validation_loss_16": 4.5}]
    faster = {"step_seconds": 2.0, "tokens_per_second": 400.0}
    records += [record(step) | long | faster | {"tokens": 300 + 800 * (step - 3)} for step in (4, 5)]
    records += [{"step": 5, "validation_loss": 4.0, "validation_loss_16": 4.6, "validation_loss_64": 4.0}]
    write_run(tmp_path, records)
    assert main(["report", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens_per_second"] == 400.0 and facts["tokens"] == 1900 and facts["validation_loss"] == 4.0
    assert facts["stages"] == [
        {"name": "short", "first_step": 1, "last_step": 3, "tokens": 300, "sequence_length": 16,
         "validation_losses": {"16": 4.5}},
        {"name": "long", "first_step": 4, "last_step": 5, "tokens": 1900, "sequence_length": 64,
         "validation_losses": {"16": 4.6, "64": 4.0}},
    ]  # fmt: skip
    assert main(["report", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "stage             long: steps 4 to 5 of 64 tokens; validation loss 4.6000 at 16, 4.0000 at 64" in text
    write_run(tmp_path, records[:-1])
    assert main(["report", str(tmp_path)]) == 0
    write_run(tmp_path, [*records[:-1], {"step": 5, "validation_loss_64": "low"}])
    assert main(["report", str(tmp_path)]) == 2
    assert "validation_loss_64 is 'low'" in capsys.readouterr().err


def test_the_picture_has_a_curve_for_each_length_and_a_line_for_each_border(tmp_path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from qwen_moe.runs.report import _draw_borders, _draw_validation

    steps = [record(step) | {"stage": "a" if step < 3 else "b", "sequence_length": 16} for step in range(1, 6)]
    checks = [{"step": step, "validation_loss_16": 4.0, "validation_loss_64": 3.0} for step in (3, 5)]
    figure, (upper, lower) = plt.subplots(2, 1)
    _draw_validation(upper, [*steps, *checks], {r["step"]: r["tokens"] / 1e6 for r in steps})
    assert [line.get_label() for line in upper.lines] == [
        "validation at 16 tokens (last 4.000)",
        "validation at 64 tokens (last 3.000)",
    ]
    _draw_borders(upper, lower, steps)
    assert lower.lines[-1].get_xdata()[0] == pytest.approx(200 / 1e6)
    assert [text.get_text() for text in upper.texts] == ["a\n16 tokens", "b\n16 tokens"]
    plt.close(figure)
