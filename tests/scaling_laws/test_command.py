"""`qwen-moe scaling` on synthetic runs with known laws, and on tables that are wrong."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import scaling_laws.recommend as laws
from qwen_moe.cli import main
from scaling_laws.fitting import _resamples, load_fit
from scaling_laws.recommend import Request
from scaling_laws.runs import read_runs
from scaling_laws.surface import WINDOW
from tests.scaling_laws.data import best_loss, optimum, synthetic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fit_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    runs = synthetic(folder / "runs.csv")
    assert main(["scaling", "fit", str(runs), "--output", str(folder / "fit"), "--samples", "40"]) == 0
    return folder / "fit"


def recommend(fit_dir: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["scaling", "recommend", str(fit_dir), "--seq-len", "1024", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_known_laws_are_found_beyond_the_runs(fit_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four times the largest model, ten times the compute."""
    n, d = 1.6e9, 6.4e10
    found = recommend(
        fit_dir, capsys, "--n-total", str(n), "--tokens", str(d), "--data-parallel", "8", "--micro-batch", "2"
    )
    rate, batch = optimum(n, d)
    assert found["learning_rate"] == pytest.approx(rate, rel=0.15)
    assert found["batch_size_tokens"] == pytest.approx(batch, rel=0.2)
    assert found["batch_size_sequences"] % 16 == 0
    assert found["predicted_loss"] == pytest.approx(best_loss(n, d), rel=0.01)
    assert 0 <= found["predicted_excess_loss"] < 0.003
    assert found["widest_batch_tokens"] > found["batch_size_tokens"] and not found["past_critical_batch"]
    assert found["extrapolation"]["n_total"] == pytest.approx(4) and found["extrapolation"]["tokens"] == pytest.approx(
        4
    )
    for key, truth in (("learning_rate", rate), ("batch_size_tokens", batch), ("predicted_loss", best_loss(n, d))):
        low, high = found["intervals"][key]
        assert 0.9 * low < truth < 1.1 * high, key
    optima = [sample.optimum(n, n, d) for sample in load_fit(fit_dir).surface_samples]
    for key, found_there in (
        ("learning_rate", [o[0][0] for o in optima]),
        ("batch_size_tokens", [o[1][0] for o in optima]),
    ):
        low, high = found["intervals"][key]
        assert 0.9 <= sum(low <= value <= high for value in found_there) / len(found_there) < 1, key


def test_a_refit_that_ran_away_counts_no_more_than_is_trusted(fit_dir: Path) -> None:
    fit = load_fit(fit_dir)
    request = Request(n_total=2e8, tokens=4e9, seq_len=1024)
    found = laws.recommend(fit, request)
    first, *others = fit.surface_samples
    wild = replace(first, learning_rate=[first.learning_rate[0] - 6, *first.learning_rate[1:]])
    with_wild = laws.recommend(replace(fit, surface_samples=[wild, *others]), request)
    added = with_wild["predicted_excess_loss"] - found["predicted_excess_loss"]
    assert 0.9 * WINDOW < added * len(fit.surface_samples) <= WINDOW
    assert with_wild["predicted_loss"] == pytest.approx(found["predicted_loss"] * (1 + added), rel=1e-4)


def test_a_batch_that_the_cluster_forces_is_flagged(fit_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = recommend(
        fit_dir, capsys, "--n-total", "2e8", "--tokens", "4e9", "--data-parallel", "4096", "--micro-batch", "4"
    )
    assert found["past_critical_batch"] and found["batch_size_sequences"] == 4096 * 4
    assert any("past the critical size" in note for note in found["warnings"])
    assert any("higher than predicted" in note for note in found["warnings"])


def test_compute_optimal_sizes(fit_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """N* = ((a A / b B) (C/6 / 1e19)^b)^(1/(a+b)) in units of 1e9, from setting the derivative to zero."""
    found = recommend(fit_dir, capsys, "--flops", "1e20")
    budget = 1e20 / 6 / 1e19
    expected = 1e9 * ((0.3 * 0.4) / (0.35 * 0.3) * budget**0.35) ** (1 / 0.65)
    assert found["n_total"] == pytest.approx(expected, rel=0.35)
    assert found["n_total"] * found["tokens"] * 6 == pytest.approx(1e20)
    best = found["shapes"][0]
    assert best["cost_of_half_size"] > 0 and best["cost_of_twice_size"] > 0


def test_far_requests_are_refused_unless_accepted(fit_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    far = ["scaling", "recommend", str(fit_dir), "--n-total", "1e12", "--tokens", "1e13", "--seq-len", "4096"]
    assert main(far) == 2
    assert "n_total is 2,500 times outside the runs (limit 30)" in capsys.readouterr().err
    assert main([*far, "--accept-extrapolation"]) == 0
    assert "note: extrapolation" in capsys.readouterr().out
    tiny = ["scaling", "recommend", str(fit_dir), "--n-total", "5e5", "--tokens", "4e9", "--seq-len", "64"]
    assert main(tiny) == 2
    assert "n_total is 100 times outside the runs (limit 30)" in capsys.readouterr().err


def test_a_group_that_is_drawn_twice_is_two_groups(tmp_path: Path) -> None:
    """Each with a level of its own, as in a cluster bootstrap: a resample has as many groups as the table."""
    frame = read_runs([synthetic(tmp_path / "runs.csv")]).frame
    (resampled,) = _resamples(frame, range(1), 3)
    sizes = resampled.groupby("group")["n_total"]
    assert sizes.ngroups == frame["group"].nunique() and (sizes.nunique() == 1).all()
    assert len(resampled[["n_total", "tokens"]].drop_duplicates()) < sizes.ngroups


def test_the_page_and_its_pictures(fit_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "report", str(fit_dir)]) == 0
    page = (fit_dir / "report.md").read_text()
    assert "learning rate = " in page and "largest N" in page and "largest compute" in page
    for name in ("surface", "loss", "isoflop", "held_out", "extrapolation", "exponents"):
        name += ".png"
        assert (fit_dir / name).read_bytes().startswith(b"\x89PNG") and name in page


def test_diverged_runs_push_the_optimum_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Censored: they have no loss, but the surface must be high where they were."""
    import pandas as pd

    from scaling_laws.runs import read_runs
    from scaling_laws.surface import WINDOW
    from scaling_laws.surface_fit import fit_surface

    frame = pd.read_csv(synthetic(tmp_path / "runs.csv"))
    edge = frame.groupby(["n_total", "tokens"])["learning_rate"].transform("median")
    kept = frame[frame["learning_rate"] <= edge].assign(diverged=False)  # the grid ends before the optimum is passed
    blown = frame[frame["learning_rate"] > 2.5 * edge].assign(diverged=True, loss=float("nan"))
    kept.to_csv(tmp_path / "kept.csv", index=False)
    pd.concat([kept, blown]).to_csv(tmp_path / "all.csv", index=False)
    without, with_them = (fit_surface(read_runs([tmp_path / f"{name}.csv"]).frame) for name in ("kept", "all"))
    n, d, rate = blown[["n_total", "tokens", "learning_rate"]].to_numpy().T
    batch = (blown["batch_size"] * blown["seq_len"]).to_numpy()
    assert (with_them.excess(n, n, d, rate, batch) >= 0.9 * WINDOW).mean() > 0.9
    assert (with_them.excess(n, n, d, rate, batch)).min() > (without.excess(n, n, d, rate, batch)).min()


GOOD = {
    "n_total": "1e8",
    "tokens": "2e9",
    "seq_len": "1024",
    "learning_rate": "1e-3",
    "batch_size": "64",
    "loss": "3.1",
}


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = list(rows[0])
    path.write_text("\n".join([",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]) + "\n")
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{k: v for k, v in GOOD.items() if k != "tokens"}], "has no column tokens"),
        ([GOOD, GOOD | {"loss": "-1"}, GOOD | {"loss": "nan"}], "runs.csv:3: loss is '-1', expected a positive number"),
        ([GOOD, GOOD | {"loss": "nan"}], "set diverged to true"),
        ([GOOD | {"n_total": "many"}], "runs.csv:2: n_total is 'many'"),
        ([GOOD | {"loss": "1e-300"}], "loss is '1e-300', expected at least 0.002"),
        ([GOOD | {"tokens": "1e300"}], "tokens is '1e300', expected at most 1e+18"),
        ([GOOD | {"learning_rate": "1e-300"}], "learning_rate is '1e-300', expected at least 1e-12"),
        ([GOOD | {"n_active": "2e8"}], "n_active 2e+08 is larger than n_total 1e+08"),
        ([GOOD | {"diverged": "true", "loss": ""}], "every run diverged"),
        ([GOOD], "1 finished run; at least 8 are needed"),
        ([GOOD | {"n_convention": "non_vocabulary"}, GOOD | {"n_convention": "with_vocabulary"}], "the same one of"),
        ([GOOD | {"n_convention": "embeddings"}], "n_convention is embeddings"),
        (
            [GOOD | {"batch_size": "65536", "tokens": "5e7"}],
            "runs.csv:2: one step of batch_size 65,536 sequences x seq_len 1024"
            " = 6.71e+07 tokens is more than the whole run of 5e+07 tokens; batch_size counts sequences",
        ),
        ([GOOD | {"batch_size": "262144"}], "half of the runs have fewer than 7.45 steps"),
        ([GOOD | {"n_total": "0.1", "tokens": "2"}], "median of n_total is 0.1: is it in millions or billions?"),
        ([GOOD | {"n_total": "5000"}], "4e+05 tokens per activated parameter, which is impossible"),
        ([GOOD | {"n_total": "1e12", "batch_size": "1"}], "0.002 tokens per activated parameter"),
        ([GOOD | {"tokens": "5e7"}], "with less than 1 token per activated parameter say nothing about longer ones"),
        (
            [GOOD | {"warmup_tokens": "1.7e9"}],
            "1 of 1 run is left out, because runs whose warm-up takes more than 80%",
        ),
        ([GOOD | {"tokens": "2000"}], "the median of tokens is 2000: is it in millions or billions?"),
        ([GOOD | {"diverged": "perhaps"}], "runs.csv:2: diverged is 'perhaps', expected true or false"),
        (
            [{"N" if k == "n_total" else "lr" if k == "learning_rate" else k: v for k, v in GOOD.items()}],
            "rename 'N' to n_total, 'lr' to learning_rate",
        ),
        (
            [{"tokens_per_step" if k == "batch_size" else k: v for k, v in GOOD.items()}],
            "batch_size is 'tokens_per_step' divided by the sequence length",
        ),
    ],
)
def test_bad_tables(
    rows: list[dict[str, str]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path / "runs.csv", rows)
    assert main(["scaling", "fit", str(path), "--output", str(tmp_path / "fit")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "fit").exists()


def test_suspicious_units_and_repeated_rows_are_told(tmp_path: Path) -> None:
    from scaling_laws.runs import read_runs

    rows = [GOOD | {"n_total": "50000", "learning_rate": f"{rate}e-4"} for rate in range(1, 9)]
    notes = read_runs([table(tmp_path / "runs.csv", [*rows, rows[0]])]).warnings
    assert any("is it in millions or billions" in note for note in notes)
    assert any("1 row repeats another" in note and "runs.csv:10" in note for note in notes)


@pytest.mark.parametrize("damage", ["digit", "flip", "cut", "list", "unsigned"])
def test_a_damaged_fit_is_not_read(damage: str, fit_dir: Path, tmp_path: Path) -> None:
    """One digit of a coefficient would be another recommendation in silence."""
    from scaling_laws.errors import InputError

    text = (fit_dir / "fit.json").read_text()
    values = json.loads(text)
    rate = repr(values["surface"]["learning_rate"][0])
    damaged = {
        "digit": text.replace(rate, rate[:-1] + str((int(rate[-1]) + 1) % 10)),
        "flip": text.replace('"ranges"', '"rangeS"'),
        "cut": text[: len(text) // 2],
        "list": "[1, 2]",
        "unsigned": json.dumps({key: value for key, value in values.items() if key != "sha256"}),
    }[damage]
    assert damaged != text
    (tmp_path / "fit.json").write_text(damaged)
    with pytest.raises(InputError, match=r"is damaged or from another version .*: fit again"):
        load_fit(tmp_path)


def test_a_batch_that_leaves_a_run_without_steps_is_refused(fit_dir: Path) -> None:
    """Accepted extrapolation or not: a fit of a table whose batches were tokens answers so."""
    from scaling_laws.errors import InputError

    fit = load_fit(fit_dir)
    assert fit.surface is not None
    batch = [fit.surface.batch[0] + 7.6, *fit.surface.batch[1:]]  # times 2,000
    wrong = replace(fit, surface=replace(fit.surface, batch=batch))
    request = Request(n_total=2e8, tokens=4e9, seq_len=1024, accept_extrapolation=True)
    with pytest.raises(InputError, match="check that the table's batch_size counts sequences"):
        laws.recommend(wrong, request)
    with pytest.raises(InputError, match="use fewer ranks, or train longer"):
        laws.recommend(fit, replace(request, data_parallel=100_000))
    rate = [fit.surface.learning_rate[0] + 9, *fit.surface.learning_rate[1:]]
    with pytest.raises(InputError, match="which no run can use"):
        laws.recommend(replace(fit, surface=replace(fit.surface, learning_rate=rate)), request)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recommend", "nowhere", "--seq-len", "1024", "--flops", "1e20"], "does not exist: run `qwen-moe scaling fit"),
        (["fit", "nowhere.csv", "--output", "x"], "nowhere.csv does not exist"),
        (["fit", "nowhere.csv", "--output", "x", "--samples", "-3"], "--samples -3"),
        (["recommend", "x", "--seq-len", "1024", "--flops", "1e20", "--n-total", "1e9"], "not both"),
        (["recommend", "x", "--seq-len", "1024", "--flops", "1e20", "--n-active", "1e9"], "not both"),
        (["recommend", "x", "--seq-len", "1k", "--flops", "1e20"], "'1k': expected a whole number (see qwen-moe"),
        (["recommend", "x", "--seq-len", "1024", "--n-total", "-1", "--tokens", "1e9"], "--n-total -1.0"),
        (
            ["recommend", "x", "--seq-len", "1024", "--n-total", "1e9", "--tokens", "1e19"],
            "--tokens 1e+19: expected a number",
        ),
        (["recommend", "x", "--seq-len", "1024", "--n-total", "nan", "--tokens", "1e9"], "argument --n-total: 'nan'"),
        (["recommend", "x", "--seq-len", "0", "--flops", "1e20"], "--seq-len 0: expected a number from 1"),
        (["recommend", "x", "--seq-len", "9", "--activated-share", "0.5"], "--activated-share is for --flops"),
        (["fit", "nowhere.csv", "--output", "x", "--seed", "-1"], "--seed -1: give 0 or more"),
        (["fit", "nowhere.csv", "--output", f"{__file__}/fit"], "test_command.py is a file: give a folder"),
        (["fit", "nowhere.csv", "--output", ""], "argument --output: '': expected a path"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_is_quick_and_without_torch() -> None:
    script = (
        "import sys; from qwen_moe.cli import build_parser\n"
        "try: build_parser().parse_args(['scaling', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("column", "message"), [("batch_size", "batch sizes"), ("learning_rate", "learning rates")])
def test_what_was_not_varied_cannot_be_recommended(
    column: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pandas as pd

    frame = pd.read_csv(synthetic(tmp_path / "runs.csv"))
    frame[column] = frame.groupby(["n_total", "tokens"])[column].transform("median")
    frame.drop_duplicates().to_csv(tmp_path / "runs.csv", index=False)
    assert main(["scaling", "fit", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "fit")]) == 2
    assert f"{message}" in capsys.readouterr().err


def test_one_duration_per_parameter_keeps_the_published_exponent(tmp_path: Path) -> None:
    import pandas as pd

    from scaling_laws.runs import read_runs
    from scaling_laws.surface import fit_step_law
    from scaling_laws.surface_fit import fit_surface

    frame = pd.read_csv(synthetic(tmp_path / "runs.csv"))
    frame["tokens"] = 20 * frame["n_total"]
    frame.to_csv(tmp_path / "runs.csv", index=False)
    runs = read_runs([tmp_path / "runs.csv"]).frame
    law = fit_step_law(runs)
    assert "tokens" in law.held and law.learning_rate[2] == 0.307
    law = fit_surface(runs)
    assert {"n_total", "tokens"} <= set(law.held)  # only their sum is told
    assert law.learning_rate[1] + law.learning_rate[2] == pytest.approx(-0.6, abs=0.05)  # runs keep lr* of N^-0.6
    assert 1e-5 < float(law.optimum(1e9, 1e9, 2e10)[0][0]) < 0.1
