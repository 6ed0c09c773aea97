"""The ladder: within budget, worth its cost, and made of recipes that load; its surface is found again from its runs."""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from qwen_moe.alone import alone
from qwen_moe.cli import main
from qwen_moe.config import load_config
from qwen_moe.errors import UserError
from qwen_moe.models.flops import count_parameters
from qwen_moe.scaling.ladder import LEAST_DURATION, MOVED, _batch, _too_far, far_text, write_ladder
from qwen_moe.training.schedule import learning_rate
from scaling_laws.early import LEAST_TOKENS
from scaling_laws.errors import InputError
from scaling_laws.laboratories import laboratories_law, laboratory_prior
from scaling_laws.ladder import Design, design_ladder
from scaling_laws.runs import read_runs
from scaling_laws.surface import deepseek_law, step_law_as_published
from scaling_laws.surface_fit import MISFIT, fit_surface
from tests.scaling_laws.data import best_loss, synthetic

DEMO = str(Path(__file__).parents[2] / "recipes" / "demo.yaml")
SIZES = [(n, n) for n in (1e7, 3e7, 1e8, 3e8)]


def test_every_group_helps_and_more_money_helps_more() -> None:
    target = (1e10, 1e10, 1e12)
    poor, rich = (design_ladder(target, SIZES, [20, 80], budget) for budget in (1e20, 5e21))
    for design, budget in ((poor, 1e20), (rich, 5e21)):
        assert design.flops <= budget
        assert all(a > b for a, b in zip(design.excess, design.excess[1:]))
    assert rich.excess[-1] < poor.excess[-1] and rich.excess[0] == poor.excess[0]


def test_sizes_that_deviate_from_the_laws_leave_the_target_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of three sizes, however many, do not tell how these sizes deviate. If they did not deviate, the same runs would
    tell the optimum of a hundred times larger target much better."""
    target, budget = (1e10, 1e10, 1e12), 1e24
    few, many = (design_ladder(target, SIZES[:3], ratios, budget) for ratios in ([20, 40], [20, 40, 80, 160]))
    assert len(many.runs) > 1.5 * len(few.runs) and 0.8 * few.excess[-1] < many.excess[-1] < few.excess[-1]
    monkeypatch.setattr("scaling_laws.ladder.MISFIT", (1e-6, 1e-6))
    assert design_ladder(target, SIZES[:3], [20, 40], budget).excess[-1] < 0.5 * few.excess[-1]


def test_a_branch_costs_its_decay_alone() -> None:
    design = design_ladder((1e10, 1e10, 1e12), SIZES, [20, 40, 80], 1e21, decay_share=0.2)
    branches = [run for run in design.runs if run.trunk is not None]
    assert branches and design.flops <= 1e21
    for run in branches:
        assert run.flops == pytest.approx(0.2 * 6 * run.n_active * run.tokens)
        trunk = design.runs[run.trunk]
        assert trunk.trunk is None and trunk.flops == 6 * trunk.n_active * trunk.tokens > run.flops


@pytest.mark.slow
def test_the_runs_of_a_ladder_give_the_precision_that_it_promises(tmp_path: Path) -> None:
    """Synthetic losses at the ladder's own points, 40 times, where sizes deviate from the published law as much as is
    expected: the spread of what is found at the target is the promised one."""
    target = (4e9, 4e9, 8e10)
    design = design_ladder(target, SIZES, [20, 80, 160], 3e20)
    law = laboratories_law()
    truth = np.log(np.array([float(x[0]) for x in law.optimum(*target)]))
    misses = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = []
        own = {size: rng.normal(0, MISFIT) for size in sorted({run.n_total for run in design.runs})}
        for run in design.runs:
            rate, batch = (float(x[0]) for x in law.optimum(run.n_total, run.n_active, run.tokens))
            u, v = np.log([run.learning_rate / rate, run.batch_tokens / batch]) - own[run.n_total]
            height = 0.0082 * u**2 + (-0.04 * u + 0.082 * v) ** 2
            loss = best_loss(run.n_total, run.tokens) * np.exp(height + rng.normal(0, 1.5e-3))
            rows.append((run.n_total, run.tokens, 1, run.learning_rate, run.batch_tokens, loss))
        path = tmp_path / "runs.csv"
        columns = ["n_total", "tokens", "seq_len", "learning_rate", "batch_size", "loss"]
        pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
        found = fit_surface(read_runs([path]).frame).optimum(*target)
        misses.append(np.log([float(found[0][0]), float(found[1][0])]) - truth)
    spread = np.array(misses).std(0)
    assert spread == pytest.approx(np.array(design.deviation), rel=0.6)
    assert abs(np.array(misses).mean(0)).max() < 2 * max(design.deviation)


def ladder_of_demo(output: Path) -> list[str]:
    return ["scaling", "ladder", DEMO, "training.train_tokens=1e10", "--flops-budget", "2e16", "--output", str(output)]


def test_recipes_are_written_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "ladder"
    arguments = ladder_of_demo(output)
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((output / "ladder.csv").open()))
    assert facts["runs"] == len(rows) and sum(float(row["flops"]) for row in rows) == pytest.approx(facts["flops"])
    assert facts["noise"] == 0.0015  # without --fit
    assert facts["flops"] <= 2e16 and facts["expected_excess_after"] < 0.5 * facts["expected_excess_before"]
    folders = set()
    for row in rows:
        config = load_config(output / row["recipe"])
        assert float(row["n_total"]) == count_parameters(config.model).non_vocabulary_total
        assert config.training.global_batch_size == int(row["batch_size"])
        assert config.optimizer.learning_rate == pytest.approx(float(row["learning_rate"]))
        assert config.model.num_experts == 16 and config.balance.scope == "global_batch"
        folders.add(config.run_dir)
    assert len(folders) == len(rows)
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err


def test_runs_that_share_a_trunk_cost_less_and_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo decays over its last quarter: shorter runs branch off where their own last quarter begins."""
    output = tmp_path / "ladder"
    tokens = ["training.train_tokens=1e10", "schedule.decay_tokens=2.5e9"]
    assert main(["scaling", "ladder", DEMO, *tokens, "--flops-budget", "2e16", "--output", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["recipe"]: row for row in csv.DictReader((output / "ladder.csv").open())}
    branches = [row for row in rows.values() if row["after"]]
    assert facts["branches"] == len(branches) > 0 and facts["flops"] <= 2.01e16
    for row in branches:
        config, trunk = (load_config(output / name) for name in (row["recipe"], row["after"]))
        assert config.checkpoint.branch_from is not None
        step = int(config.checkpoint.branch_from.name.removeprefix("step_"))
        assert config.checkpoint.branch_from.parent == trunk.run_dir / "checkpoints"
        assert step in trunk.checkpoint.keep_steps and config.data.order_tokens == trunk.training.train_tokens
        for done in (0, step // 2, step - 1):
            assert learning_rate(config, done) == pytest.approx(learning_rate(trunk, done), rel=1e-12)
        assert learning_rate(config, config.train_steps - 1) < 0.3 * config.optimizer.learning_rate
        assert float(row["flops"]) < 0.35 * 6 * float(row["n_active"]) * float(row["tokens"])
        assert rows[row["after"]]["after"] == "" and float(rows[row["after"]]["tokens"]) > float(row["tokens"])


def test_a_cross_has_five_runs_a_group_and_the_given_durations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five runs differ from the middle one in one setting each, by the same factor up and down."""
    output = tmp_path / "ladder"
    arguments = ladder_of_demo(output)
    assert main([*arguments, "--pattern", "cross", "--tokens-per-parameter", "20", "60", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["expected_excess_after"] < 0.5 * facts["expected_excess_before"]
    rows = pd.read_csv(output / "ladder.csv")
    assert {round(ratio) for ratio in rows["tokens"] / rows["n_active"]} == {20, 60}
    for _, group in rows.groupby("group"):
        middle, *others = group[["learning_rate", "batch_size"]].to_numpy()
        assert len(others) == 4
        changed = [(rate != middle[0], batch != middle[1]) for rate, batch in others]
        assert sorted(changed) == [(False, True)] * 2 + [(True, False)] * 2
        low, high = sorted(rate for rate, batch in others if batch == middle[1])
        assert low * high == pytest.approx(middle[0] ** 2)


def test_a_ladder_is_of_runs_that_the_fit_will_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And it begins from the fit that was given, or not at all."""
    assert LEAST_DURATION == LEAST_TOKENS
    arguments = ["scaling", "ladder", DEMO, "--flops-budget", "2e16", "--output", str(tmp_path / "x")]
    assert main([*arguments, "--tokens-per-parameter", "0.5", "20"]) == 2
    assert "'0.5': expected a number, 1 or more" in capsys.readouterr().err
    losses = tmp_path / "losses.csv"
    frame = pd.read_csv(synthetic(tmp_path / "runs.csv")).drop(columns=["learning_rate", "batch_size", "seq_len"])
    frame.to_csv(losses, index=False)
    assert main(["scaling", "fit", str(losses), "--output", str(tmp_path / "fit"), "--samples", "0"]) == 0
    assert main([*arguments, "--fit", str(tmp_path / "fit")]) == 2
    assert "its runs have no learning_rate and batch_size" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_commands_that_are_shown_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a path has a space."""
    output = tmp_path / "my ladder"
    assert main([*ladder_of_demo(output), "--pattern", "cross"]) == 0
    said = capsys.readouterr().out
    assert f"`qwen-moe launch '{output}' --local`" in said and f"`qwen-moe scaling collect '{output}' --output" in said
    assert main(["scaling", "collect", str(output), "--output", str(tmp_path / "runs.csv")]) == 2
    assert f"`qwen-moe launch '{output}' --local` runs them" in capsys.readouterr().err


def test_one_duration_is_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scaling", "ladder", DEMO, "--flops-budget", "2e16", "--output", str(tmp_path / "x")]
    assert main([*arguments, "--tokens-per-parameter", "20", "20"]) == 2
    assert "--tokens-per-parameter 20: a ladder needs two durations" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tokens, told", [(1e5, r"tokens is 1,000 times .*, below them; .*smaller"), (1e11, r"\(limit 30\); .*a larger")]
)
def test_what_brings_runs_nearer_to_a_large_run_that_is_far(tokens: float, told: str) -> None:
    """A target below the runs gets farther away the larger the budget is."""
    runs = [SimpleNamespace(n_total=1e6, n_active=1e6, tokens=1e8)]
    assert re.search(told, far_text(_too_far(runs, (1e6, 1e6, tokens))))


def test_a_batch_of_the_ladder_has_few_micro_batches() -> None:
    """Each micro-batch is one pass of the model: a prime number of sequences must not become that many passes of one."""
    assert _batch(19.3, 16) == (20, 10) and _batch(37.0, 16) == (36, 12) and _batch(4.9, 16) == (5, 5)
    assert _batch(0.2, 16) == (1, 1) and _batch(3.0, 2) == (3, 1)  # two passes of two would be a third more
    for wanted in np.geomspace(1, 3000, 400):
        batch, micro = _batch(wanted, 16)
        assert batch % micro == 0 and 1 <= micro <= 16
        assert abs(batch - wanted) <= max(0.5, MOVED * wanted)
        assert wanted < 16 or batch / micro <= np.ceil(round(wanted) / 16) + 1


def test_a_budget_too_small_says_what_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "ladder", DEMO, "--flops-budget", "1e12", "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "at least 3 and 2 are needed" in error and not (tmp_path / "x").exists()


def test_a_grid_is_around_the_mean_of_the_laboratories() -> None:
    """Also far below the sizes of Step Law's sweep, whose exponent of N alone gives learning rates ten times too high there
    (benchmarks/ladder found 2e-3 to 7e-3 best for 6e4 parameters)."""
    small = (6e4, 6e4)
    design = design_ladder((4e6, 4e6, 4e8), [small, (3e5, 3e5), (1e6, 1e6)], [20, 80], 1e16)
    runs = [run for run in design.runs if run.n_total == small[0] and run.tokens == 20 * small[1]]
    assert len(runs) == 9
    rate = np.exp(np.mean(np.log([run.learning_rate for run in runs])))
    expected = laboratory_prior().learning_rate[0] @ [1.0, np.log(small[0] / 1e9), np.log(20 * small[1] / 1e10), 0.0]
    assert rate == pytest.approx(np.exp(expected))
    assert 4e-3 < rate < 0.02 < float(step_law_as_published().optimum(*small, 20 * small[1])[0][0])


def test_the_published_law_is_step_laws() -> None:
    rate, batch = step_law_as_published().optimum(1e9, 1e9, 1e11)
    assert float(rate[0]) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert float(batch[0]) == pytest.approx(0.58 * 1e11**0.571)


def test_deepseeks_law_is_the_published_one() -> None:
    """arXiv 2401.02954, equation 1, in compute: 0.3118 C^-0.1250 and 0.2920 C^0.3271, with C = 6 N_active D."""
    rate, batch = deepseek_law().optimum(8e9, 2e9, 1e11)
    compute = 6 * 2e9 * 1e11
    assert float(rate[0]) == pytest.approx(0.3118 * compute**-0.1250)
    assert float(batch[0]) == pytest.approx(0.2920 * compute**0.3271)


def test_a_ladder_is_not_written_into_that_of_another_process(tmp_path: Path) -> None:
    write_ladder(tmp_path / "ladder", {"a.yaml": "seed: 1\n"}, [{"recipe": "a.yaml"}])
    with pytest.raises(UserError, match="is not empty"):  # it came after `check_new` of this process
        write_ladder(tmp_path / "ladder", {"a.yaml": "seed: 2\n"}, [{"recipe": "a.yaml"}])
    assert (tmp_path / "ladder" / "a.yaml").read_text() == "seed: 1\n"
    refused = pytest.raises(UserError, match=r"other is being written by process \d+")
    with alone(tmp_path / "other"), refused:
        write_ladder(tmp_path / "other", {"a.yaml": "seed: 2\n"}, [{"recipe": "a.yaml"}])
    assert not (tmp_path / "other").exists()


def test_the_least_budget_that_an_error_names_pays_for_three_sizes_and_two_durations() -> None:
    def design(budget: float) -> Design:
        return design_ladder((1e10, 1e10, 1e12), SIZES, [20, 80], budget)

    with pytest.raises(InputError, match=r"are needed, about (\S+) FLOPs") as refused:
        design(1e18)
    least = float(str(refused.value).split("about ")[1].split()[0])
    assert least > 1e19  # a grid of the third size alone
    with pytest.raises(InputError):
        design(0.9 * least)
    runs = design(1.1 * least).runs
    assert len({(run.n_total, run.n_active) for run in runs}) == 3
    assert len({round(run.tokens / run.n_active) for run in runs}) == 2
