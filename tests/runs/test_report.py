"""`qwen-moe report`, metrics that survive crashes, and the room that checkpoints need."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.checkpoint import preflight
from qwen_moe.cli import main
from qwen_moe.errors import UserError
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
