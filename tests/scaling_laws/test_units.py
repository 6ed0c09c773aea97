"""Tables in parameters, tokens and nats are told from others, and no column that the fit needs is overlooked."""

from pathlib import Path
from typing import Any

import pytest

from scaling_laws.errors import InputError
from scaling_laws.fitting import fit_table
from scaling_laws.runs import LIMITS, OPTIONAL_NUMBERS, OPTIONAL_POSITIVE, POSITIVE, read_runs
from tests.scaling_laws.test_command import GOOD, table


def test_small_models_are_no_mistake_of_units(tmp_path: Path) -> None:
    """Where batch sizes show that the tokens are tokens, and the parameters fit them."""
    small = GOOD | {"n_total": "15000", "n_active": "5500", "tokens": "150000", "seq_len": "128", "batch_size": "3"}
    rows = [small | {"learning_rate": f"{rate}e-3"} for rate in range(1, 9)]
    assert read_runs([table(tmp_path / "runs.csv", rows)]).warnings == []
    without = [{k: v for k, v in row.items() if k not in ("learning_rate", "batch_size", "seq_len")} for row in rows]
    without = [row | {"loss": f"{3 + place / 10}"} for place, row in enumerate(without)]
    notes = read_runs([table(tmp_path / "losses.csv", without)]).warnings
    assert sum("is it in millions or billions" in note for note in notes) == 2


def grid(**changes: Any) -> list[dict[str, str]]:
    return [GOOD | {"learning_rate": f"{rate}e-3"} | changes for rate in range(1, 9)]


def renamed(**names: str) -> list[dict[str, str]]:
    """Rows of an MoE, of which some columns have another name."""
    rows = grid(n_active="4e7", diverged="false", warmup_tokens="1e8")
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (renamed(n_active="active_params"), "the column 'active_params' is not read: rename it to n_active, or remove it"),
        (renamed(n_active="N_Active"), "the column 'N_Active' is not read: rename it to n_active"),
        (renamed(diverged="divergd"), "the column 'divergd' is not read: rename it to diverged"),
        (renamed(warmup_tokens="warm-up tokens"), "the column 'warm-up tokens' is not read: rename it to warmup_tokens"),
        (renamed(learning_rate="learning rate", batch_size="Batch Size"), "'learning rate' to learning_rate, 'Batch Size'"),
        (renamed(tokens="tokens (B)"), "rename 'tokens (B)' to tokens"),
        (renamed(loss="bpb"), "'bpb' is in bits, and loss in nats per token"),
        (renamed(loss="PPL"), "'PPL' is in perplexities, and loss in nats per token"),
        (grid(num_experts="8", top_k="2"), "n_active is empty, and num_experts is 8: give the parameters that one token"),
        (grid(num_experts="0"), "num_experts is '0', expected a positive number (leave it empty where it does not apply)"),
        (grid(tokens="2B"), "tokens is '2B', expected a positive number (write 2e+09, without a unit)"),
        (grid(n_total="100 M"), "n_total is '100 M', expected a positive number (write 1e+08, without a unit)"),
        (grid(vocab_size="256")[1:] + grid(vocab_size="300"), "vocab_size is 256 ("),
    ],
)  # fmt: skip
def test_what_would_be_overlooked_or_compared_wrongly_is_refused(
    rows: list[dict[str, str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as refused:
        read_runs([table(tmp_path / "runs.csv", rows)])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (grid(loss="33"), "the median of loss is 33"),
        (grid(batch_size="30000"), "half of the runs have fewer than 65.1 steps, as if batch_size were in tokens"),
        (grid(seq_len="512")[1:] + grid(), "seq_len is 512, 1024: longer sequences lower the loss by themselves"),
    ],
)
def test_what_may_be_wrong_is_told(rows: list[dict[str, str]], note: str, tmp_path: Path) -> None:
    assert any(note in told for told in read_runs([table(tmp_path / "runs.csv", rows)]).warnings)


def test_columns_of_other_programs_do_no_harm(tmp_path: Path) -> None:
    rows = grid(n_active="4e7", diverged="false", run="a", cluster="b", val_loss="3", top_p="1", vocab_size="256")
    assert read_runs([table(tmp_path / "runs.csv", rows)]).warnings == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (grid(unique_tokens="1e300"), "unique_tokens is '1e300', expected at most 1e+18"),
        (grid(unique_tokens="1e-300"), "unique_tokens is '1e-300', expected at least 1"),
        (grid(granularity="1e300"), "granularity is '1e300', expected at most 1e+06"),
        (grid(beta2="7"), "beta2 is '7', expected at most 1"),
        (grid(vocab_size="0.5"), "vocab_size is '0.5', expected at least 2"),
        (grid(seed="-3"), "seed is '-3', expected 0 or more (leave it empty where it does not apply)"),
        (grid(n_active="4e7", num_experts="4", top_k="16"), "top_k 16 is larger than num_experts 4"),
        (
            grid(n_active="1e8", num_experts="16", top_k="4"),
            "n_active is n_total, 1e+08, and num_experts 16 is larger than",
        ),
        (grid(loss=""), "loss is empty (set diverged to true for a run that blew up)"),
    ],
)
def test_what_no_run_has_is_refused_in_every_column(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        read_runs([table(tmp_path / "runs.csv", rows)])
    assert message in str(refused.value)


def test_every_column_of_numbers_has_limits() -> None:
    assert set(LIMITS) == {*POSITIVE, *OPTIONAL_POSITIVE, *OPTIONAL_NUMBERS}


def test_rows_without_a_vocabulary_among_others_are_told(tmp_path: Path) -> None:
    rows = [*grid(vocab_size="256")[1:], *grid(vocab_size="")[:1]]
    assert any(
        "1 of 8 rows has no vocab_size" in note for note in read_runs([table(tmp_path / "runs.csv", rows)]).warnings
    )


@pytest.mark.parametrize(("power", "told"), [(-0.05, False), (0.05, True)])
def test_losses_that_rise_with_compute_are_told(power: float, told: bool, tmp_path: Path) -> None:
    """As an accuracy does, or runs of different data."""
    rows = []
    for n, d in ((2e8, 4e9), (4e8, 4e9), (2e8, 2e10), (4e8, 2e10)):
        for rate in (1e-3, 2e-3, 4e-3):
            loss = 3 * (n * d / 1e18) ** power + 0.01 * abs(rate - 2e-3)
            rows.append(GOOD | {"n_total": f"{n}", "tokens": f"{d}", "learning_rate": f"{rate}", "loss": f"{loss}"})
    notes = read_runs([table(tmp_path / "runs.csv", rows)]).warnings
    assert any("losses rise with compute" in note for note in notes) == told


def test_losses_that_do_not_differ_are_refused(tmp_path: Path) -> None:
    rows = [GOOD | {"n_total": f"{n}e8", "tokens": f"{d}e9"} for n in (1, 2, 4) for d in (2, 4, 8)]
    tuned = [row | {"learning_rate": rate} for row in rows for rate in ("1e-3", "2e-3")]
    plain = [{k: v for k, v in row.items() if k not in ("learning_rate", "batch_size", "seq_len")} for row in rows]
    for given, message in ((tuned, "all 18 finished runs have the same loss, 3.1"), (plain, "all losses are 3.1")):
        with pytest.raises(InputError, match=message):
            fit_table(read_runs([table(tmp_path / "runs.csv", given)]), samples=0, seed=0, progress=lambda steps: steps)
