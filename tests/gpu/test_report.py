"""The GPU report without a GPU: a dry run of every part, and that a part that fails, crashes or hangs hides no other."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.gpu import parts
from tests.gpu.parts import PARTS
from tests.gpu.report import LIMITS, MARK, ROOT, run_all, table, write
from tests.gpu.rows import Where

ROW = f'print(\'{MARK}\' + \'{{"what": "x", "outcome": "ok", "value": "1"}}\', flush=True)'


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code.replace("{{", "{").replace("}}", "}")]


def test_no_part_hides_another(tmp_path: Path) -> None:
    commands = {
        "good": python(ROW),
        "raises": python(f"{ROW}; raise RuntimeError('boom')"),
        "crashes": python(f"{ROW}; import os; os.abort()"),
        "hangs": python(f"{ROW}; import time; time.sleep(600)"),
        "silent": python("pass"),
        "last": python(ROW),
    }
    found_parts = run_all(commands, dict.fromkeys(commands, 60.0) | {"hangs": 3.0}, minutes=5)
    found = {name: [(row["outcome"], row["value"]) for row in part["rows"]] for name, part in found_parts.items()}
    assert found["good"] == found["last"] == [("ok", "1")]
    for name, says in (("raises", "RuntimeError: boom"), ("crashes", "exit code -6"), ("hangs", "did not end in 3 s")):
        assert found[name][0] == ("ok", "1") and found[name][1][0] == "failed" and says in found[name][1][1]
    assert found["silent"] == [("failed", "printed nothing")]
    report = {"device": "D", "date": "now", "command": "c", "seconds": 1.0, "parts": found_parts}
    report["counts"] = {"ok": 5, "failed": 4, "skipped": 0}
    write(report, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == table(report) and text.startswith("# D, now") and "| raises | the part itself | failed |" in text
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["parts"].keys() == commands.keys()


def test_it_ends_in_time_whatever_hangs() -> None:
    hanging = python("import time; time.sleep(600)")
    began = time.monotonic()
    found = run_all({"a": hanging, "b": hanging}, {"a": 600.0, "b": 600.0}, minutes=7 / 60)
    assert time.monotonic() - began < 20
    assert "did not end" in found["a"]["rows"][0]["value"] and "not begun" in found["b"]["rows"][0]["value"]


def test_every_part_has_a_limit() -> None:
    assert list(PARTS) == list(LIMITS)


@pytest.mark.parametrize("part", [part for part, module in PARTS.items() if module == parts.__name__])
def test_a_dry_run_on_the_cpu(part: str) -> None:
    rows = list(getattr(parts, part)(Where(torch.device("cpu"), tiny=True)))
    assert rows and [row for row in rows if row.outcome == "failed"] == []


STAND_IN = """
import dataclasses, json, torch
from tests.parallel.kernels import fake_te
fake_te.install()
from tests.gpu import parts_training
from tests.gpu.rows import Where
for part in ("parity", "training", "checkpoint", "optimizers", "benchmark"):
    for row in getattr(parts_training, part)(Where(torch.device("cpu"), tiny=True)):
        print("ROW " + json.dumps([part, row.what, row.outcome, row.value]), flush=True)
"""


@pytest.mark.slow
def test_a_dry_run_of_training_with_a_stand_in_for_transformer_engine() -> None:
    """Whole runs by torch's products and by `precision.kernels: te`, from the config to checkpoints and benchmarks."""
    outcome = subprocess.run([sys.executable, "-c", STAND_IN], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert outcome.returncode == 0, outcome.stderr
    lines = [line.removeprefix(MARK) for line in outcome.stdout.splitlines() if line.startswith(MARK)]
    rows = [json.loads(line) for line in lines]
    assert [row for row in rows if row[2] == "failed"] == []
    for part in ("parity", "training", "checkpoint"):
        ran = [what for name, what, result, _ in rows if name == part and "by te" in what and result == "ok"]
        assert len(ran) >= 2, part
    ran = [what for name, what, result, _ in rows if name == "benchmark" and result == "ok"]
    assert sum("fp8" in what and "te" in what for what in ran) >= 6 and sum("transformers" in what for what in ran) == 3
    refused = [value for _, what, result, value in rows if "mxfp8 by te" in what and result == "skipped"]
    assert refused and all("compute capability 10.0" in value for value in refused)


@pytest.mark.slow
def test_the_command_on_the_cpu(tmp_path: Path) -> None:
    """The command of `make test-gpu`: every line of every part that does not need CUDA runs, without Transformer Engine."""
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.gpu.report", "--device", "cpu", "--tiny", f"--output={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    rows = [(name, row) for name, part in report["parts"].items() for row in part["rows"]]
    assert [row for row in rows if row[1]["outcome"] == "failed"] == [], outcome.stderr
    assert outcome.returncode == 0 and report["counts"]["ok"] > 40
    assert all(any(name == part for name, _ in rows) for part in LIMITS)
    reasons = {row["what"]: row["value"] for _, row in rows if row["outcome"] == "skipped"}
    assert "needs CUDA" in reasons["no wait of the host in an MoE layer"]
    assert "cannot be imported" in reasons["fp8 delayed by te"]
