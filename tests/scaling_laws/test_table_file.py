"""Files of tables: what is read, and what would be read wrongly and is refused."""

import json
from pathlib import Path

import pytest

from scaling_laws.errors import InputError
from scaling_laws.runs import read_runs
from tests.scaling_laws.test_command import GOOD

HEADER = ",".join(GOOD)
VALUES = ",".join(GOOD.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER},tokens\n{VALUES},1e9\n", "the column tokens is given twice (columns 2 and 7)"),
        (f"{HEADER}\n{VALUES}\n".replace(",", ";"), "separated by semicolons, expected commas"),
        (f"{HEADER}\n{VALUES}\n".replace(",", "\t"), "separated by tabs, expected commas"),
        (f"{HEADER}\n{VALUES}\n".replace(",", "|"), "separated by bars, expected commas"),
        (f"{HEADER}\n{VALUES}\n".replace(",", "  "), "separated by spaces, expected commas"),
        (f"# mine, of May\n{HEADER}\n{VALUES}\n", "its first line begins with #"),
        (f"# {HEADER}\n{VALUES}\n", "its first line begins with #"),
        (json.dumps([GOOD, GOOD]), "runs.csv is JSON, expected CSV or JSONL"),
        (f"{HEADER}\n{VALUES},7\n", "runs.csv:2: the row has 7 cells and the header 6 columns"),
        (f"{HEADER}\n{VALUES}\n1e8,2e9\n", "runs.csv:3: the row has 2 cells"),
        (f"{HEADER}\n" + VALUES.replace("1e8", '"100,000,000"'), "write 100000000, without thousands separators"),
        (f"{HEADER}\n" + VALUES.replace("3.1", '"3,1"'), "loss is '3,1', expected a positive number (a decimal point"),
        (f"{HEADER}\n{VALUES}\n" + "1" * 200_000, "is not a CSV table"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_runs([path])
    assert message in str(error.value) and "None" not in str(error.value)


def test_a_spreadsheets_file_is_read_the_same(tmp_path: Path) -> None:
    """Excel puts a byte order mark first and ends lines in CR LF; people put spaces after commas."""
    path = tmp_path / "runs.csv"
    path.write_bytes(
        b"\xef\xbb\xbf" + HEADER.replace(",", ", ").encode() + b"\r\n" + VALUES.encode() + b"\r\n,,,,,\r\n"
    )
    row = read_runs([path]).frame.iloc[0]
    assert (row["n_total"], row["n_active"], row["batch_tokens"], row["loss"]) == (1e8, 1e8, 65536, 3.1)
    path.write_text(f"\n  \n{HEADER}\n\n{VALUES}\n")
    assert read_runs([path]).frame.iloc[0]["source"].endswith(":5")
    with pytest.raises(ValueError, match="is a folder, expected a CSV or JSONL table"):
        read_runs([tmp_path])
    path.write_bytes(HEADER.encode("utf-16"))
    with pytest.raises(ValueError, match="save the table as CSV UTF-8"):
        read_runs([path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"loss": 3.1, "loss": 3.2}', "'loss' is given twice"),
        (json.dumps(GOOD | {"loss": True}), "loss is True, expected a positive number"),
        (json.dumps(GOOD | {"loss": [3]}), "loss is [3], expected a positive number"),
        ("[" * 100_000, "runs.jsonl:1: not a row of a table"),
        ('{"n_total": ' + "9" * 5000 + "}", "a number has thousands of digits"),
        (json.dumps([GOOD]), "a row must be an object of column: value, with a line for each"),
        (json.dumps(GOOD | {"tokens": 0}).replace(": 0", ": " + "9" * 400), "expected a positive number"),
    ],
)
def test_what_is_no_number_in_jsonl(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as error:
        read_runs([path])
    assert message in str(error.value)


def test_jsonl_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    sparse = GOOD | {"loss": 3.2, "num_experts": 8, "top_k": 2, "n_active": 4e7}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(sparse) + "\n")
    frame = read_runs([path]).frame
    assert frame["loss"].tolist() == [3.1, 3.2] and frame["batch_tokens"].tolist() == [65536, 65536]
