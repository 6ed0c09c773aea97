"""The next runs: what they would teach is what a fit with them knows, they help, and the price says when to stop."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qwen_moe.cli import main
from qwen_moe.config import load_config
from qwen_moe.models.flops import count_parameters
from scaling_laws.ladder import STEP
from scaling_laws.next_runs import Prices, _Design, _Known, _Package, excess_after, next_runs
from scaling_laws.runs import read_runs
from scaling_laws.surface_fit import _LOSS, Posterior, _solved, posterior
from tests.scaling_laws.data import LAWS, best_loss, optimum, synthetic

DEMO = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")
SIZES = [(n, n) for n in (5e7, 1e8, 2e8, 4e8)]
RATIOS = (10.0, 40.0, 160.0)
TARGET = (4e9, 4e9, 2e11)


def table(path: Path, rows: list[dict[str, float]]) -> pd.DataFrame:
    pd.DataFrame(rows).to_csv(path, index=False)
    return read_runs([path]).frame


def observed(n: float, d: float, rate: float, batch: float, rng: np.random.Generator) -> dict[str, float]:
    """A run whose loss follows `LAWS`, with a bowl as in published sweeps and 0.15% of noise."""
    best_rate, best_batch = optimum(n, d)
    u, v = np.log(rate / best_rate), np.log(batch / best_batch)
    loss = best_loss(n, d) * np.exp(0.0082 * u**2 + (-0.04 * u + 0.082 * v) ** 2 + rng.normal(0, 1.5e-3))
    return {"n_total": n, "tokens": d, "seq_len": 1, "learning_rate": rate, "batch_size": batch, "loss": loss}


def scattered(count: int, seed: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        n = SIZES[rng.integers(len(SIZES))][0]
        d = RATIOS[rng.integers(len(RATIOS))] * n
        rate, batch = optimum(n, d)
        rows.append(observed(n, d, rate * np.exp(rng.uniform(-1.5, 1.5)), batch * np.exp(rng.uniform(-1.5, 1.5)), rng))
    return rows


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Posterior:
    return posterior(table(tmp_path_factory.mktemp("few") / "runs.csv", scattered(16, 0)))


def test_without_misfit_the_uncertainty_is_that_of_the_fit(tmp_path: Path) -> None:
    """The fit profiles the groups' offsets out; here they are parameters. Both give the laws the same covariance."""
    frame = table(tmp_path / "runs.csv", scattered(16, 0))
    frame.loc[3, ["diverged", "learning_rate"]] = [True, frame.loc[3, "learning_rate"] * 30]
    problem, solution = _solved(frame, None, None)
    fit = problem.root @ np.linalg.inv(solution.jacobian.T @ solution.jacobian) @ problem.root.T
    found = posterior(frame, misfit=(0.0, 0.0)).covariance[:_LOSS, :_LOSS]
    np.testing.assert_allclose(found, fit, rtol=1e-8, atol=1e-10)
    wider = posterior(frame).covariance[:_LOSS, :_LOSS]
    assert np.diag(wider)[:8].sum() > np.diag(found)[:8].sum()


def test_what_a_run_would_teach_is_what_is_known_with_it(tmp_path: Path) -> None:
    """Runs that lie exactly on the fit change nothing but the uncertainty: fitted again with them, each parameter is as
    uncertain as was promised. One group is known, one is new and of a known size, one is of a new size."""
    rows = scattered(40, 1)
    before = posterior(table(tmp_path / "runs.csv", rows))
    count = len(before.parameters)
    for size, tokens, new_group, new_size in (
        (2e8, 8e9, False, False),
        (2e8, 3e9, True, False),
        (1.6e9, 6.4e10, True, True),
    ):
        assert ((size, size, tokens) not in before.groups) == new_group and (
            (size, size) not in before.sizes
        ) == new_size
        steps = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 0.0))
        known = _Known(before.covariance, before.groups, before.sizes)
        promised = _Design(before, TARGET).learn(known, _Package((size, size), tokens, steps)).covariance
        rate, batch = (float(x[0]) for x in before.surface.optimum(size, size, tokens))
        more = []
        for u, v in np.exp(STEP * np.array(steps)):
            height = float(before.surface.excess(size, size, tokens, rate * u, batch * v)[0])
            loss = level_of(before, size, tokens) * (1 + height)
            more.append(
                {"n_total": size, "tokens": tokens, "seq_len": 1, "learning_rate": rate * u, "batch_size": batch * v,
                 "loss": loss}
            )  # fmt: skip
        after = posterior(table(tmp_path / "more.csv", [*rows, *more])).covariance
        told, expected = (
            np.sqrt(np.diag(one)[:count] / np.diag(before.covariance)[:count]) for one in (after, promised)
        )
        assert expected.min() < 0.9
        np.testing.assert_allclose(told, expected, rtol=0.02)


def level_of(known: Posterior, n: float, d: float) -> float:
    log_e, log_a, log_b, a, b, _ = known.parameters[-6:]
    return float(np.exp(log_e) + np.exp(log_a) / (n / 1e9) ** a + np.exp(log_b) / (d / 1e10) ** b)


def test_advised_runs_bring_the_recommendation_nearer_to_the_truth(tmp_path: Path) -> None:
    """Three rounds from 12 random runs, with eight seeds: what the recommendation at the target really loses falls to about
    what was promised."""
    truth = np.log(optimum(TARGET[0], TARGET[2]))
    lost: list[list[float]] = []
    promised: list[float] = []
    for seed in range(8):
        rng = np.random.default_rng([seed, 7])
        rows, excess = scattered(12, seed), []
        for turn in range(4):
            known = posterior(table(tmp_path / "runs.csv", rows))
            u, v = np.log(np.array(known.surface.optimum(*TARGET))[:, 0]) - truth
            excess.append(float(0.0082 * u**2 + (-0.04 * u + 0.082 * v) ** 2))
            advice = next_runs(known, TARGET, SIZES, RATIOS, count=6)
            if turn == 3:
                promised.append(advice.excess)
                break
            assert not advice.stop and 0 < len(advice.runs) <= 6 and advice.excess_after < advice.excess
            rows += [observed(run.n_total, run.tokens, run.learning_rate, run.batch_tokens, rng) for run in advice.runs]
        lost.append(excess)
    first, last = np.mean(lost, axis=0)[[0, -1]]
    assert last < 0.5 * first and last < 3 * np.mean(promised)


def test_the_worth_is_the_tokens_that_would_make_up_for_the_excess(few: Posterior) -> None:
    advice = next_runs(few, TARGET, SIZES, RATIOS, count=3)
    exponent = few.token_exponent(*TARGET)
    step = 1e-4
    numeric = -np.log(level_of(few, TARGET[0], TARGET[2] * np.exp(step)) / level_of(few, TARGET[0], TARGET[2])) / step
    assert exponent == pytest.approx(numeric, rel=1e-3)
    flops = 6 * TARGET[1] * TARGET[2]
    assert advice.target_cost == flops and advice.cost == sum(run.flops for run in advice.runs)
    assert advice.excess_worth == pytest.approx(advice.excess / exponent * flops)
    assert advice.worth == pytest.approx((advice.excess - advice.excess_after) / exponent * flops)
    _, _, _, big_b, b = LAWS["loss"]
    true = b * big_b / (TARGET[2] / 1e10) ** b / best_loss(TARGET[0], TARGET[2])
    assert exponent == pytest.approx(true, rel=0.5)


def test_prices_decide_which_runs_and_when_to_stop(few: Posterior) -> None:
    free, dear, too_dear = (
        next_runs(few, TARGET, SIZES, RATIOS, count=6, prices=Prices(run=price)) for price in (1.0, 300.0, 1e8)
    )
    assert not free.stop and not dear.stop
    assert sum(run.flops for run in dear.runs) < sum(run.flops for run in free.runs)
    assert too_dear.stop and too_dear.runs and too_dear.cost > too_dear.worth
    limited = next_runs(few, TARGET, SIZES, RATIOS, count=6, flops=2e18)
    assert 0 < sum(run.flops for run in limited.runs) <= 2e18 and limited.excess_after > free.excess_after
    assert not next_runs(few, TARGET, SIZES, RATIOS, flops=1.0).runs


def test_the_excess_after_a_run_is_that_of_the_advice_to_make_it(few: Posterior) -> None:
    advice = next_runs(few, TARGET, SIZES, RATIOS, count=1)
    far = replace(advice.runs[0], learning_rate=1e3 * advice.runs[0].learning_rate)
    assert excess_after(few, TARGET, [advice.runs[0], far]) == pytest.approx([advice.excess_after, advice.excess])
    assert advice.excess_after < advice.excess


def test_no_run_is_advised_twice(few: Posterior) -> None:
    runs = next_runs(few, TARGET, SIZES[:1], RATIOS[:1], count=20).runs
    points = {(run.learning_rate, run.batch_tokens) for run in runs}
    assert len(points) == len(runs) > 5


def test_no_batch_is_smaller_than_a_sequence(few: Posterior) -> None:
    """The smallest advised batch without a limit, made a sequence's length: those below it are not advised any more."""
    free = next_runs(few, TARGET, SIZES, RATIOS, count=20)
    batches = sorted(run.batch_tokens for run in free.runs)
    sequence = batches[len(batches) // 2]
    assert batches[0] < 0.8 * sequence
    limited = next_runs(few, TARGET, SIZES, RATIOS, count=20, sequence=sequence)
    assert len(limited.runs) == 20 and min(run.batch_tokens for run in limited.runs) >= 0.9 * sequence
    assert not next_runs(few, TARGET, SIZES, RATIOS, sequence=1e12).runs


def test_cheap_runs_of_one_small_size_do_not_tell_the_target(tmp_path: Path) -> None:
    """A thousand runs of the smallest size leave the uncertainty of how sizes deviate from the laws."""
    rng = np.random.default_rng(0)
    n, d = 5e7, 2e9
    rate, batch = optimum(n, d)
    rows = scattered(12, 0)
    for _ in range(1000):
        rows.append(observed(n, d, rate * np.exp(rng.uniform(-1, 1)), batch * np.exp(rng.uniform(-1, 1)), rng))
    advice = next_runs(posterior(table(tmp_path / "runs.csv", rows)), TARGET, SIZES, RATIOS, count=6)
    assert {run.n_total for run in advice.runs} - {n}


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic(tmp_path_factory.mktemp("next") / "runs.csv", noise=1.5e-3)


def test_the_command_writes_recipes_that_load(
    runs_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["scaling", "next", DEMO, "training.train_tokens=1e10", "--runs", str(runs_csv), "--count", "4"]
    output = tmp_path / "more"
    assert main([*arguments, "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((output / "ladder.csv").open()))
    assert len(rows) == len(facts["runs"]) <= 4 and facts["runs_so_far"] == 432 and not facts["stop"]
    for row, run in zip(rows, facts["runs"], strict=True):
        config = load_config(output / row["recipe"])
        assert count_parameters(config.model).non_vocabulary_total == run["n_total"] == float(row["n_total"])
        assert config.optimizer.learning_rate == pytest.approx(run["learning_rate"])
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "these runs are next" in said and "more tokens to make up for it" in said
    assert main([*arguments, "--tokens-per-parameter", "30", "--json"]) == 0
    durations = {run["tokens"] / run["n_active"] for run in json.loads(capsys.readouterr().out)["runs"]}
    assert durations and all(ratio == pytest.approx(30) for ratio in durations)
    prices = ["--price", "2", "--run-speed", "1", "--target-speed", "1e15"]
    assert main([*arguments, *prices, "--output", str(tmp_path / "none")]) == 0
    said = capsys.readouterr().out
    assert "stop: these are the most useful runs for their price" in said and "at 2 a GPU-hour" in said
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--price", "2"], "give --run-speed and --target-speed"),
        (["--run-speed", "1e12"], "give both --run-speed and --target-speed"),
        (["--flops-budget", "10"], "pays for no run: the cheapest takes"),
        (["--tokens-per-parameter", "0.9"], "'0.9': expected a number, 1 or more"),
        (
            [
                "--tokens-per-parameter",
                "1",
                "--count",
                "9",
                "data.sequence_length=65536",
                "training.train_tokens=1e10",
                "model.max_position_embeddings=65536",
            ],
            "less than one sequence of 65536 tokens",
        ),
        (["--count", "0"], "expected a whole number, 1 or more"),
        (["--without-laboratory", "Nobody"], "expected one of Step Law"),
        (["--output", "FULL"], "is not empty"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, runs_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    given = [str(tmp_path / "full") if option == "FULL" else option for option in options]
    try:
        code: Any = main(["scaling", "next", DEMO, "--runs", str(runs_csv), *given])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("dpo_demo", "objective.kind dpo are nats per pair"), ("sft_demo", "give training.train_tokens instead"),
     ("grpo_demo", "objective.kind grpo are per token"), ("long_context_demo", "reads recipes of one stage")],
)  # fmt: skip
def test_large_runs_of_which_small_ones_tell_nothing(
    recipe: str, message: str, runs_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (["next", recipe, "--runs", str(runs_csv)], ["ladder", recipe, "--flops-budget", "1e15"]):
        assert main(["scaling", *verb, "--output", str(tmp_path / "more")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "more").exists()


def test_a_table_without_learning_rates_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    pd.DataFrame({"n_total": [1e8] * 9, "tokens": [1e9] * 9, "loss": [3.0] * 9}).to_csv(path, index=False)
    assert main(["scaling", "next", DEMO, "--runs", str(path)]) == 2
    assert "add these columns" in capsys.readouterr().err
