"""Judgments of pairs by several criteria: from rows to a column, and from there to the batches of a reward model."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_moe.config.objective import RewardConfig
from qwen_moe.data.chat import Chat
from qwen_moe.data.content import verify_content
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.manifest import PREFERENCES, column_path
from qwen_moe.data.rows import ExampleSet, Order
from qwen_moe.errors import UserError
from qwen_moe.objectives.reward import RewardModel
from tests.data.chat_data import write_chat
from tests.data.test_prepare_chat import chat, prepared, talk, write

CRITERIA = ("concise", "helpful")
# What rows say; and by (concise, helpful, preference) what was judged.
JUDGED: list[tuple[Any, tuple[int, int, int]]] = [
    ({"helpful": 1, "concise": -1}, (-1, 1, 0)),
    (None, (0, 0, 1)),
    ({"helpful": 0}, (0, 0, 0)),
    ({"concise": 1}, (1, 0, 0)),
    ({}, (0, 0, 0)),
    ({"preference": -1, "helpful": -1}, (0, -1, -1)),
]


def a_pair(number: int, judged: Any) -> dict[str, Any]:
    row = {"prompt": f"alpha {number}", "chosen": "beta " * (number + 1), "rejected": "gamma"}
    return row if judged is None else row | {"preferences": judged}


ROWS = [a_pair(number, judged) for number, (judged, _) in enumerate(JUDGED)]


def opened(folder: Path, **options: Any) -> PackedExamples:
    sets = [ExampleSet(prefix=folder / "out")]
    return PackedExamples(sets, Order(**{"length": 96, "seed": 3} | options), vocab_size=60_000, cache=folder)


def test_the_column_is_what_the_rows_say(tokenizer: Path, tmp_path: Path) -> None:
    found = prepared(tokenizer, tmp_path, ROWS)
    assert found.criteria == {"concise": 2, "helpful": 2, "preference": 2}
    column = np.fromfile(column_path(tmp_path / "out", PREFERENCES), np.int8).reshape(-1, 3)
    assert column.tolist() == [list(judged) for _, judged in JUDGED]


def test_batches_hold_them_at_the_last_learned_token_of_each_answer(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, ROWS)
    examples, template = opened(tmp_path), Chat(tokenizer)
    examples.judge_by(CRITERIA)
    batch = examples.train_batch(0, len(examples.rows))
    seen = torch.zeros_like(batch["preferences"])
    for row in range(len(examples.rows)):
        for one in examples.placed(row):
            answer, ids = one.document % 2, batch["input_ids"][row]
            encoded = template.encode(template.read(ROWS[one.example])[answer])
            last = one.start + int(np.flatnonzero(encoded.learn)[-1])
            assert int(ids[last]) == template.end and last < one.start + one.length
            sign = 1 if answer == 0 else -1
            seen[row, last] = sign * torch.tensor(JUDGED[one.example][1][:2])
    assert torch.equal(batch["preferences"], seen) and seen.any()
    # The objective counts pairs that were judged by one of its criteria.
    reward = RewardModel(RewardConfig(criteria=CRITERIA, weights=(1.0, 1.0)))
    assert int(reward.count(batch)) == sum(any(judged[:2]) for _, judged in JUDGED)


def test_without_criteria_batches_have_no_judgments(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, ROWS)
    assert "preferences" not in opened(tmp_path).train_batch(0, 1)


def test_pairs_of_earlier_versions_were_chosen_by_preference(tmp_path: Path) -> None:
    pair = [([10, 11, 1], [0, 1, 1]), ([10, 12, 13, 1, 14], [0, 1, 1, 1, 0])]
    write_chat(tmp_path / "out", pair, "pairs")
    examples = opened(tmp_path, length=10)
    examples.judge_by(["preference"])
    assert examples.train_batch(0, 1)["preferences"][0, :, 0].tolist() == [0, 0, 1, 0, 0, 0, -1, 0, 0, 0]


def test_a_damaged_column_is_noticed(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, ROWS)
    path = column_path(tmp_path / "out", PREFERENCES)
    path.write_bytes(bytes([1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match="preferences"):
        verify_content(tmp_path / "out")


def test_other_judgments_are_other_data(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    prepared(tokenizer, tmp_path / "a", ROWS)
    prepared(tokenizer, tmp_path / "b", [ROWS[0] | {"preferences": {"helpful": -1, "concise": -1}}, *ROWS[1:]])
    assert opened(tmp_path / "a").fingerprint != opened(tmp_path / "b").fingerprint


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ([1], "preferences is [1], expected an object"),
        ({"helpful": 2}, "'helpful' is 2, expected 1"),
        ({"helpful": True}, "'helpful' is True, expected 1"),
        ({"helpful": 0.5}, "'helpful' is 0.5, expected 1"),
        ({" ": 1}, "is not the name of a criterion"),
    ],
)
def test_a_row_that_judges_otherwise_is_named(
    tokenizer: Path, tmp_path: Path, judged: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(tokenizer, write(tmp_path / "in.jsonl", [a_pair(0, judged)]), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and "1 bad preferences" in error and not column_path(tmp_path / "out", PREFERENCES).exists()


def test_what_cannot_be_judged_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    prepared(tokenizer, tmp_path, ROWS)
    with pytest.raises(UserError, match=r"no pair was judged by harmless: .* can name concise, helpful, preference"):
        opened(tmp_path).judge_by(["helpful", "harmless"])
    (tmp_path / "chat").mkdir()
    prepared(tokenizer, tmp_path / "chat", [talk(random.Random(1))])
    with pytest.raises(UserError, match="learns from pairs"):
        opened(tmp_path / "chat", length=512).judge_by(["helpful"])
