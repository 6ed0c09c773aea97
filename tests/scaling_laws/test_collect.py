"""`scaling collect` on folders made by hand: what is in the table, what is not and why, and that `fit` reads it."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_moe.cli import main
from scaling_laws.runs import read_runs
from tests.scaling_laws.run_folders import STEPS, VOCABULARY, write_recipe, write_run

FALLING = np.linspace(5.0, 3.0, STEPS)


def collect(capsys: pytest.CaptureFixture[str], output: Path, *arguments: str) -> tuple[dict, list[dict[str, str]]]:
    capsys.readouterr()
    assert main(["scaling", "collect", *arguments, "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    return facts, list(csv.DictReader(output.open()))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["scaling", "collect", *arguments]) == 2
    return capsys.readouterr().err


def test_every_way_a_run_can_have_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = tmp_path / "ladder"
    recipes = {name: write_recipe(ladder, name) for name in ("good", "nan", "high", "half", "crashed", "none", "other")}
    write_run(recipes["good"], FALLING)
    write_run(recipes["nan"], FALLING[:300], kind="bad step", message="step 301: the loss is nan")
    write_run(recipes["high"], np.linspace(5.0, math.log(VOCABULARY) + 0.1, STEPS))
    write_run(recipes["half"], FALLING[:500])
    write_run(recipes["crashed"], FALLING[:10], kind="disk", message="no space left")
    write_run(recipes["other"], FALLING)
    write_recipe(ladder, "other", optimizer__learning_rate=0.5)
    facts, rows = collect(capsys, tmp_path / "runs.csv", str(ladder))
    assert {row["run"]: row["diverged"] for row in rows} == {"good": "False", "high": "True", "nan": "True"}
    left_out = {entry["run"]: (entry["state"], entry["why"]) for entry in facts["left_out"]}
    assert left_out["half"] == ("unfinished", "step 500 of 1,000")
    assert left_out["crashed"] == ("unfinished", "step 10 of 1,000; no space left")
    assert left_out["none"] == ("missing", "no step was taken")
    assert left_out["other"][0] == "other settings" and "learning_rate was 0.003, is now 0.5" in left_out["other"][1]
    assert facts["diverged"] == 2 and len(left_out) == 4
    frame = read_runs([tmp_path / "runs.csv"]).frame
    assert frame["diverged"].sum() == 2 and not frame.loc[frame["diverged"], "loss"].notna().any()
    # The same to people, with the reasons; and of run folders without their recipes.
    assert main(["scaling", "collect", str(ladder), "--output", str(tmp_path / "x.csv")]) == 0
    shown = capsys.readouterr().out
    assert "nan: diverged: step 301: the loss is nan" in shown and "none: missing: no step was taken" in shown
    _, direct = collect(capsys, tmp_path / "direct.csv", *(str(ladder / "runs" / n) for n in ("good", "nan")))
    assert [row["loss"] for row in direct] == [rows[0]["loss"], ""]


def test_the_table_says_what_was_run_and_the_loss_is_the_mean_of_the_last_fiftieth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(write_recipe(tmp_path / "ladder", "one", schedule__warmup_tokens=2560), FALLING, validation=3.21)
    _, (row,) = collect(capsys, tmp_path / "runs.csv", str(tmp_path / "ladder"))
    assert float(row["loss"]) == pytest.approx(np.mean(FALLING[-20:]), rel=1e-12)
    assert float(row["loss_stderr"]) == pytest.approx(np.std(FALLING[-20:], ddof=1) / math.sqrt(20), rel=1e-9)
    # q, k, v, o of 64 x 64; two norms; their heads' norms; router; eight experts of three 64 x 32; the last norm.
    layer = 4 * 64 * 64 + 2 * 64 + 2 * 16 + 8 * 64
    assert int(row["n_total"]) == 2 * (layer + 8 * 3 * 64 * 32) + 64
    assert int(row["n_active"]) == 2 * (layer + 2 * 3 * 64 * 32) + 64
    expected = {"tokens": 256_000, "seq_len": 32, "batch_size": 8, "learning_rate": 3e-3, "num_experts": 8, "top_k": 2}
    assert {key: float(row[key]) for key in expected} == expected
    assert float(row["warmup_tokens"]) == 2560 and row["schedule"] == "cosine"
    _, (row,) = collect(capsys, tmp_path / "runs.csv", str(tmp_path / "ladder"), "--loss", "validation")
    assert float(row["loss"]) == 3.21


def test_short_runs_average_ten_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [5.0] * 10 + [3.0] * 10
    write_run(write_recipe(tmp_path / "ladder", "one", training__train_tokens=20 * 256), losses)
    _, (row,) = collect(capsys, tmp_path / "runs.csv", str(tmp_path / "ladder"))
    assert float(row["loss"]) == 3.0


def test_a_mean_over_much_of_a_short_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last ten steps of 199 are more than a twentieth of the run."""
    for steps, told in ((199, 1), (200, 0)):
        folder = tmp_path / str(steps)
        write_run(write_recipe(folder, "one", training__train_tokens=steps * 256), FALLING[:steps], validation=3.0)
        facts, _ = collect(capsys, tmp_path / "runs.csv", str(folder))
        assert sum("makes large batches look worse" in note for note in facts["notes"]) == told, facts
        facts, _ = collect(capsys, tmp_path / "runs.csv", str(folder), "--loss", "validation")
        assert facts["notes"] == []


def test_a_run_whose_loss_is_that_of_guessing_diverged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last step alone may be below: the table has the mean, or the validation loss."""
    for name, validation in (("high", 3.0), ("no_number", math.nan)):
        losses = [*FALLING[:-20], *[9.0] * 19, 3.0] if name == "high" else FALLING
        write_run(write_recipe(tmp_path / name, name), losses, validation=validation)
    _, (row,) = collect_with_a_good_one(tmp_path, capsys, "high")
    assert (row["diverged"], row["loss"]) == ("True", "")
    _, (row,) = collect_with_a_good_one(tmp_path, capsys, "no_number", "--loss", "validation")
    assert (row["diverged"], row["loss"]) == ("True", "")


def collect_with_a_good_one(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, *arguments: str
) -> tuple[dict, list[dict[str, str]]]:
    """The rows of ``name``, beside a run that is in order, without which a table is refused."""
    if not (folder / "good").exists():
        write_run(write_recipe(folder / "good", "good"), FALLING, validation=3.0)
    facts, rows = collect(capsys, folder / "runs.csv", str(folder / name), str(folder / "good"), *arguments)
    return facts, [row for row in rows if row["run"] == name]


def test_tables_of_different_vocabularies_are_not_fitted_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (VOCABULARY, 300):
        write_run(write_recipe(tmp_path / str(size), "one", model__vocab_size=size), FALLING)
        collect(capsys, tmp_path / f"{size}.csv", str(tmp_path / str(size)))
    both = [str(tmp_path / f"{size}.csv") for size in (VOCABULARY, 300)]
    assert "vocab_size is 256" in refused_by_fit(capsys, *both, "--output", str(tmp_path / "fit"))


def refused_by_fit(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["scaling", "fit", *arguments]) == 2
    return capsys.readouterr().err


def test_losses_of_small_batches_are_called_uncertain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for name, spread in (("noisy", 0.2), ("quiet", 0.01)):
        write_run(write_recipe(tmp_path / name, name), FALLING + rng.normal(0, spread, STEPS))
        facts, _ = collect(capsys, tmp_path / "runs.csv", str(tmp_path / name))
        told = [note for note in facts["notes"] if "--loss validation" in note]
        assert len(told) == (name == "noisy"), facts["notes"]


def test_what_cannot_be_compared_or_used_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder, output = tmp_path / "ladder", ["--output", str(tmp_path / "runs.csv")]
    assert "is not a folder" in refused(capsys, str(ladder), *output)
    one = write_recipe(ladder, "one")
    assert "no run of" in refused(capsys, str(ladder), *output) and not (tmp_path / "runs.csv").exists()
    run = write_run(one, FALLING)
    lines = (run / "metrics.jsonl").read_text().splitlines()  # a validation halfway is not one after the last step
    lines.insert(STEPS // 2, json.dumps({"step": STEPS // 2, "validation_loss": 3.9}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "no validation loss" in refused(capsys, str(ladder), *output, "--loss", "validation")
    write_run(write_recipe(ladder, "two", model__vocab_size=300), FALLING)
    assert "different vocabularies" in refused(capsys, str(ladder), *output)
    shutil.rmtree(ladder / "runs" / "two")
    (run / "metrics.jsonl").write_text('{"step": 1, "lo\n{"step": 2, "loss": 3.0}\n')
    assert "is damaged" in refused(capsys, str(ladder), *output)


def test_a_run_that_is_named_twice_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ladder = tmp_path / "ladder"
    write_run(write_recipe(ladder, "good"), FALLING)
    _, rows = collect(capsys, tmp_path / "runs.csv", str(ladder), str(ladder), str(ladder / "runs" / "good"))
    assert len(rows) == 1


def test_runs_of_other_data_and_losses_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other data are told, because their losses may be comparable; a loss per pair is none per token."""
    write_run(write_recipe(tmp_path / "one", "run_000"), FALLING)
    write_run(write_recipe(tmp_path / "two", "run_000", data__train=[{"prefix": "/elsewhere"}]), FALLING)
    write_run(write_recipe(tmp_path / "three", "dpo", objective__kind="dpo"), FALLING / 10)
    folders = [str(tmp_path / name) for name in ("one", "two", "three")]
    facts, rows = collect(capsys, tmp_path / "runs.csv", *folders)
    assert len(rows) == 2 and any("not all runs trained on the same data" in note for note in facts["notes"])
    (left_out,) = facts["left_out"]
    assert left_out["state"] == "objective" and "the loss of dpo is in nats per pair" in left_out["why"]
    facts, _ = collect(capsys, tmp_path / "runs.csv", folders[0])
    assert facts["notes"] == []


def test_if_all_runs_diverged_running_them_again_is_not_proposed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder = tmp_path / "ladder"
    write_run(write_recipe(ladder, "nan"), FALLING[:300], kind="bad step", message="step 301: the loss is nan")
    told = refused(capsys, str(ladder), "--output", str(tmp_path / "runs.csv"))
    assert "those that ended diverged (nan: step 301: the loss is nan); run some with lower learning rates" in told
