"""Two `qwen-moe scaling fit` into one folder at once, and a fit whose table is not its own."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from qwen_moe.alone import alone
from qwen_moe.cli import main
from scaling_laws import fitting
from scaling_laws.fitting import Fit, load_fit, read_table
from scaling_laws.runs import RunTable
from tests.scaling_laws.data import synthetic


def nothing_fitted(table: RunTable, **asked: Any) -> Fit:
    """A fit in no time: what is in it does not matter here."""
    return Fit(
        convention=table.convention,
        runs=len(table.frame),
        groups=1,
        sizes=1,
        durations=1,
        ranges={},
        surface=None,
        step_law=None,
        surface_samples=[],
        loss_law=None,
        loss_samples=[],
        validation=[],
        extrapolation=[],
        granularity=1.0,
        laboratories=[],
        prior_removed=False,
    )


def test_two_fits_into_one_folder_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one waits before it writes its table and its fit. `.` is a folder like others."""
    (tmp_path / "given").mkdir()
    runs, folder = synthetic(tmp_path / "given" / "runs.csv"), tmp_path / "fit"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fitting, "fit_table", nothing_fitted)
    codes: list[int] = []
    second = threading.Thread(
        target=lambda: codes.append(main(["scaling", "fit", str(runs), "--output", ".", "--json"]))
    )
    with alone(folder):
        second.start()
        told, end = "", time.monotonic() + 60
        while "waiting for it" not in told and time.monotonic() < end:
            told += capsys.readouterr().err
            time.sleep(0.02)
        assert "waiting for it" in told and not list(folder.iterdir())
    second.join(60)
    assert codes == [0] and sorted(path.name for path in folder.iterdir()) == ["fit.json", "runs.csv"]
    read_table(load_fit(folder), folder)

    # A fit that was killed between its two files, or that an earlier version wrote at the same time as another.
    kept = (folder / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "runs.csv").write_text("".join(kept[:-1]))
    assert main(["scaling", "report", str(folder)]) == 2
    assert "runs.csv is not the table that" in capsys.readouterr().err and not list(folder.glob("*.png"))
