"""Tables in parameters and tokens are told from tables in millions."""

from pathlib import Path

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
