"""YAML and JSON that people wrote: nothing is taken in silence for something else."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.documents import json_object, yaml_mapping, yaml_value
from qwen_moe.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "file: 'a' is given twice, in lines 1 and 3: keep one"),
        ("optimizer:\n  beta1: 1\n  beta2: 0\n  beta1: 2\n", "'beta1' is given twice, in lines 2 and 4"),
        ("a: {b: 1, b: 2}\n", "'b' is given twice, in lines 1 and 1"),
        ("a:\n  - {c: 1, 'c': 2}\n", "'c' is given twice"),
        ("? [1, 2]\n: 3\n", "a key is a list or a mapping, in line 1"),
        ("1: 2\n", "the key 1 is not a name"),
        ("a: {null: 2}\n", "the key None is not a name"),
        ("a: &x [*x]\n", "make it contain itself"),
        ("[" * 20_000, "nested too deeply"),
        ("a: [1\n", "is not valid YAML"),
        ("a: \udcc3\udcbc", "has a byte that is not text here (character 4): set PYTHONUTF8=1"),
        ("a: \0\n", "is not valid YAML"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("- 1\n", "must be a mapping of names to values, found list"),
        ("", "must be a mapping of names to values, found NoneType"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        yaml_mapping(text, "file")
    assert message in str(error.value) and str(error.value).startswith("file")


def test_a_few_lines_that_stand_for_billions_of_values_are_refused() -> None:
    lines = ["a0: &a0 [1]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(UserError, match="more than a million values"):
        yaml_mapping("\n".join(lines), "file")


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", "010"), ("1:30", "1:30"), ("2026-01-31", "2026-01-31"), ("12", 12), ("-3", -3), ("1_000", 1000), ("2.5", 2.5),
     ("1.0e-3", 1e-3), (".5", 0.5), ("0x10", "0x10"), ("yes", True), ("~", None)],
)  # fmt: skip
def test_numbers_are_those_that_a_reader_sees(text: str, value: object) -> None:
    """YAML 1.1 reads 010 as 8, 1:30 as 90 and 2026-01-31 as a date."""
    assert yaml_value(text, "value") == value


PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text() | st.floats(allow_nan=False)


@given(st.recursive(PLAIN, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(min_size=1), v, max_size=4)))
def test_what_is_written_is_read_back(values: object) -> None:
    """Of everything that PyYAML writes; a merge key is not a name."""
    if "<<" in repr(values):
        return
    assert yaml_value(yaml.safe_dump(values), "file") == values


def test_a_merged_section_may_be_overridden() -> None:
    assert yaml_mapping("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n", "file")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "file is not valid JSON: 'c' is given twice"),
        ("[1]", "file must hold a JSON object, found list"),
        ("{" * 3, "is not valid JSON"),
        ('{"a":' * 100_000, "file is not valid JSON"),
    ],
)
def test_json(text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        json_object(text, "file")
    assert message in str(error.value)
