"""Tables in parameters, tokens and nats are told from others, and no column that the fit needs is overlooked."""

from pathlib import Path
from typing import Any

import pytest

from scaling_laws.errors import InputError
from scaling_laws.runs import read_runs
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
