"""Rows of whole examples: each example once an epoch, no label from another document, the same rows on any ranks."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.data import packing
from qwen_moe.data.examples import PackedExamples
from qwen_moe.data.packing import Share, draws, pack
from qwen_moe.data.rows import ExampleSet, OpenSet, Order
from qwen_moe.data.samples import IGNORE, rank_samples
from qwen_moe.errors import UserError
from qwen_moe.models.init import build_model
from tests.data.chat_data import Document, write_chat
from tests.small import VOCAB, small_model

ROW = 16


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    """Few rows to a window, so that small data have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROWS_PER_WINDOW", 3)
        yield


def counting(lengths: list[int], first: int = 10) -> list[Document]:
    """Documents whose tokens count up without repeating. The first half of each is not learned."""
    found, token = [], first
    for length in lengths:
        found.append((list(range(token, token + length)), [0] * (length - length // 2) + [1] * (length // 2)))
        token += length
    return found


def opened(folder: Path, *sets: list[Document], kind: str = "chat", **options: Any) -> PackedExamples:
    """Sets with ``weights`` or ``passes``, over two epochs."""
    weights = options.pop("weights", [None] * len(sets))
    passes = options.pop("passes", [1] * len(sets))
    given = []
    for number, (documents, weight, times) in enumerate(zip(sets, weights, passes, strict=True)):
        prefix = write_chat(folder / f"set{number}", documents, kind)
        given.append(ExampleSet(prefix=prefix, weight=weight, epochs=times))
    of_data = {name: options.pop(name) for name in ("vocab_size", "cache", "validation") if name in options}
    order = Order(**{"length": ROW, "epochs": 2, "seed": 5} | options)
    return PackedExamples(given, order, **{"vocab_size": 60_000, "cache": folder} | of_data)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that examples of hypothesis share: each writes its files anew."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


LENGTHS = st.lists(st.integers(2, ROW), min_size=1, max_size=30)
PAIRS = st.lists(st.tuples(st.integers(2, ROW // 2), st.integers(2, ROW // 2)), min_size=1, max_size=20)
QUICK = settings(max_examples=40, deadline=None)


def drawn_in_epoch(examples: PackedExamples, epoch: int) -> list[int]:
    """The examples of an epoch's rows, in order."""
    first = sum(examples.rows.per_epoch[:epoch])
    rows = range(first, first + examples.rows.per_epoch[epoch])
    per_example = 2 if examples.kind == "pairs" else 1
    found = [[one.example for one in examples.placed(row)] for row in rows]
    return [example for row in found for example in row[::per_example]]


def example_ids(examples: PackedExamples, rows: int) -> torch.Tensor:
    """The example of each token of the first rows, -1 for padding."""
    found = torch.full((rows, ROW), -1)
    for row in range(rows):
        for one in examples.placed(row):
            found[row, one.start : one.start + one.length] = one.example
    return found


@QUICK
@given(first=LENGTHS, second=LENGTHS, passes=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_every_example_comes_once_in_every_pass(
    folder: Path, first: list[int], second: list[int], passes: int, seed: int
) -> None:
    examples = opened(folder, counting(first), counting(second), passes=[1, passes], seed=seed)
    expected = Counter(range(len(first))) + Counter({len(first) + number: passes for number in range(len(second))})
    assert [Counter(drawn_in_epoch(examples, epoch)) for epoch in (0, 1)] == [expected, expected]
    assert examples.facts()["examples"] == 2 * expected.total()


@QUICK
@given(lengths=LENGTHS, data=st.data())
def test_labels_are_the_next_learned_token_of_the_same_document(
    folder: Path, lengths: list[int], data: st.DataObject
) -> None:
    documents = [
        (tokens, [0, *data.draw(st.lists(st.integers(0, 1), min_size=len(tokens) - 1, max_size=len(tokens) - 1))])
        for tokens, _ in counting(lengths)
    ]
    examples = opened(folder, documents)
    following = {a: b for tokens, _ in documents for a, b in itertools.pairwise(tokens)}
    learned = {t: bool(mask) for tokens, learn in documents for t, mask in zip(tokens, learn)}
    batch = examples.train_batch(0, len(examples.rows))
    used, of_example = batch["counted"], example_ids(examples, len(examples.rows))
    assert torch.equal(used, of_example >= 0)
    for token, label in zip(batch["input_ids"][used].tolist(), batch["labels"][used].tolist()):
        expected = following.get(token)
        assert label == (expected if expected is not None and learned[expected] else IGNORE)
    assert (batch["labels"][~used] == IGNORE).all()
    # What is learned is as much as unpacked, in number and with a weight for each example.
    counted = Counter(of_example[batch["labels"] >= 0].tolist())
    assert counted == Counter({n: 2 * sum(learn) for n, (_, learn) in enumerate(documents) if sum(learn)})
    weights = torch.tensor([1 / max(1, sum(learn)) for _, learn in documents] + [torch.nan], dtype=torch.float64)
    packed = weights[of_example][batch["labels"] >= 0].sum()
    assert packed.item() == pytest.approx(2 * sum(any(learn) for _, learn in documents), rel=1e-12)


@QUICK
@given(lengths=LENGTHS)
def test_positions_and_starts_are_those_of_documents_and_padding_is_the_last(folder: Path, lengths: list[int]) -> None:
    documents = counting(lengths)
    examples = opened(folder, documents)
    batch = examples.train_batch(0, len(examples.rows) + 1)
    for row in range(len(examples.rows)):
        start = 0
        for one in examples.placed(row):
            assert (
                one.start == start
                and batch["input_ids"][row, start : start + one.length].tolist() == documents[one.document][0]
            )
            assert batch["document_starts"][row, start : start + one.length].tolist() == [start] * one.length
            assert batch["position_ids"][row, start : start + one.length].tolist() == list(range(one.length))
            start += one.length
        assert batch["document_starts"][row, start:].tolist() == [start] * (ROW - start)
        assert batch["position_ids"][row, start:].tolist() == list(range(ROW - start))
        assert not batch["counted"][row, start:].any() and batch["counted"][row, :start].all()
    assert (batch["labels"][-1] == IGNORE).all() and not batch["counted"][-1].any()


@QUICK
@given(pairs=PAIRS)
def test_pairs_stay_together_the_chosen_first(folder: Path, pairs: list[tuple[int, int]]) -> None:
    examples = opened(folder, counting([length for pair in pairs for length in pair]), kind="pairs")
    for row in range(len(examples.rows)):
        placed = examples.placed(row)
        for chosen, rejected in zip(placed[::2], placed[1::2], strict=True):
            assert chosen.example == rejected.example and chosen.document == 2 * chosen.example
            assert rejected.document == chosen.document + 1 and rejected.start == chosen.start + chosen.length
    assert sorted(drawn_in_epoch(examples, 0)) == list(range(len(pairs)))


@QUICK
@given(lengths=LENGTHS, micro=st.integers(1, 3), ranks=st.integers(1, 4), accumulation=st.integers(1, 3))
def test_any_ranks_read_the_same_rows_by_step_alone(
    folder: Path, lengths: list[int], micro: int, ranks: int, accumulation: int
) -> None:
    size = micro * ranks * accumulation
    examples, other = (opened(folder, counting(lengths), rows_per_step=size) for _ in range(2))
    steps = len(examples.rows) // size
    whole = examples.train_batch(0, steps * size)
    assert steps * size == len(examples.rows)
    for step in reversed(range(steps)):
        for rank in range(ranks):
            for first, count in rank_samples(step, size, micro, rank, ranks):
                batch = other.train_batch(first, count)
                assert all(torch.equal(batch[name], whole[name][first : first + count]) for name in whole)


def test_an_epoch_begins_with_a_step_and_ends_with_empty_rows(tmp_path: Path) -> None:
    examples = opened(tmp_path, counting([4] * 21), rows_per_step=4)  # six rows, five full and one of one example
    assert examples.rows.per_epoch == [6, 6] and len(examples.rows) == 16
    learned = [int((examples.train_batch(row, 1)["labels"] >= 0).sum()) for row in range(16)]
    assert sum(learned[:6]) == sum(learned[8:14]) == 42
    assert learned[6:8] == learned[14:] == [0, 0]
    assert [one.example for row in range(8, 16) for one in examples.placed(row)] != list(range(21))
    wanted = opened(tmp_path, counting([4] * 21), rows_per_step=4, epochs=0, least_rows=17)
    assert len(wanted.rows) == 24
    assert torch.equal(wanted.train_batch(0, 16)["input_ids"], examples.train_batch(0, 16)["input_ids"])


def test_epochs_have_other_orders_which_do_not_depend_on_their_number(tmp_path: Path) -> None:
    documents = counting([4] * 50)
    two, three = opened(tmp_path, documents), opened(tmp_path, documents, epochs=3)
    assert drawn_in_epoch(two, 0) != drawn_in_epoch(two, 1) != list(range(50)) != drawn_in_epoch(two, 0)
    assert two.fingerprint == three.fingerprint and two.begins_as(len(three.rows), len(two.rows))
    count = len(two.rows)
    assert torch.equal(two.train_batch(0, count)["input_ids"], three.train_batch(0, count)["input_ids"])
    assert opened(tmp_path, documents, seed=6).fingerprint != two.fingerprint
    assert drawn_in_epoch(opened(tmp_path, documents, seed=6), 0) != drawn_in_epoch(two, 0)


@QUICK
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    numbers=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    epochs=st.integers(1, 4),
)
def test_weights_are_kept_to_one_example_and_passes_are_whole(
    sizes: list[int], numbers: list[int], epochs: int
) -> None:
    total, drawn = sum(numbers[: len(sizes)]), sum(sizes)
    weights = [Fraction(number, total) for number in numbers[: len(sizes)]]
    shares = [Share(size=size, weight=weight, drawn=drawn) for size, weight in zip(sizes, weights)]
    order = np.concatenate([draws(shares, 3, epoch) for epoch in range(epochs)])
    for number, (size, weight) in enumerate(zip(sizes, weights)):
        examples = order[order[:, 0] == number, 1].tolist()
        assert abs(len(examples) - weight * drawn * epochs) <= Fraction(1, 2)
        counts = Counter(examples)
        assert {counts[n] for n in range(size)} <= {len(examples) // size, len(examples) // size + 1}
        for first in range(0, len(examples) - size + 1, size):
            assert sorted(examples[first : first + size]) == list(range(size))


def test_sets_are_spread_over_an_epoch(tmp_path: Path) -> None:
    examples = opened(tmp_path, counting([4] * 30), counting([4] * 90, 1000), weights=[1.0, 2.0])
    drawn = np.array(drawn_in_epoch(examples, 0))
    assert len(drawn) == 120
    for first in range(0, 120, 24):  # two windows of three rows of four examples
        assert (drawn[first : first + 24] < 30).sum() == 8


@QUICK
@given(lengths=st.lists(st.integers(1, ROW), min_size=1, max_size=200))
def test_packing_wastes_no_more_than_best_fit_may(lengths: list[int]) -> None:
    """In each window, no two rows could be one; and best fit decreasing takes at most 11/9 of the optimum and a row."""
    found = pack(np.array(lengths), ROW, [1])
    assert sorted(found.members.tolist()) == list(range(len(lengths)))
    before = np.cumsum(lengths) - lengths
    by_window: dict[int, list[int]] = {}
    for row in range(len(found)):
        members = found.row(row)
        window = {int(before[n]) // (3 * ROW) for n in members}
        assert len(window) == 1, "a row's examples are of one window"
        assert members.tolist() == sorted(members.tolist())
        by_window.setdefault(window.pop(), []).append(sum(lengths[n] for n in members))
    for used in by_window.values():
        assert max(used) <= ROW
        assert all(a + b > ROW for a, b in itertools.combinations(used, 2))
        assert len(used) <= 11 / 9 * -(-sum(used) // ROW) + 1 + sum(length > ROW // 2 for length in lengths)


def test_the_longest_are_packed_first_and_the_rows_shuffled() -> None:
    """Shortest first, three of 3 tokens would share a row and leave no room beside the ones of 13."""
    assert len(pack(np.array([3, 13, 3, 13, 3, 13]), ROW, None)) == 3
    lengths = np.array([9, 3, 3] * 60)
    plain, shuffled = pack(lengths, ROW, None), pack(lengths, ROW, [1])
    rows = [[tuple(found.row(n).tolist()) for n in range(len(found))] for found in (plain, shuffled)]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]
    for first in range(0, len(rows[0]), 30):
        window = [min(row) for row in rows[1][first : first + 30]]
        assert window != sorted(window), "rows are in the order of their first examples"


def test_every_pass_has_an_order_of_its_own() -> None:
    shares = [Share(size=30), Share(size=30)]
    orders = [draws(shares, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    found = [tuple(order[order[:, 0] == number, 1].tolist()) for order in orders for number in (0, 1)]
    assert len(set(found)) == 8


def test_validation_rows_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    validation = write_chat(tmp_path / "v", counting([4, 8, 12, 8, 16], 5000))
    examples = opened(tmp_path, counting([4] * 9), validation=[validation])
    assert examples.validation_samples == 3
    batch = examples.validation_batch(0, 4)
    assert batch["input_ids"][:, 0].tolist() == [5000, 5004, 5032, 1]
    assert batch["input_ids"][0, 4] == 5012
    assert (batch["labels"][3] == IGNORE).all()
    assert batch["input_ids"].max() < 5000 + 48 and examples.train_batch(0, 9)["input_ids"].max() < 5000


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_a_model_gives_packed_rows_the_loss_of_examples_apart(tmp_path: Path, kind: str) -> None:
    rng = np.random.RandomState(0)
    sizes = [int(size) for size in rng.randint(2, 9, 20)]
    documents = [(rng.randint(0, VOCAB, n).tolist(), [0, *rng.randint(0, 2, n - 1).tolist()]) for n in sizes]
    examples = opened(tmp_path, documents, kind=kind, epochs=1)
    model = build_model(small_model(), 2, torch.float64)

    def losses(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        where = {name: batch[name] for name in ("position_ids", "document_starts") if name in batch}
        logits = model(batch["input_ids"], **where)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")

    packed = losses(batch := examples.train_batch(0, len(examples.rows)))
    for row in range(len(examples.rows)):
        for one in examples.placed(row):
            ids, learn = documents[one.document]
            labels = [token if mask else IGNORE for token, mask in zip(ids[1:], learn[1:])]
            alone = losses({"input_ids": torch.tensor([ids[:-1]]), "labels": torch.tensor([labels])})
            of_row = packed[row, one.start : one.start + one.length - 1]
            torch.testing.assert_close(of_row, alone[0], rtol=1e-10, atol=1e-10)
    assert (batch["labels"] >= 0).sum() == sum(sum(learn) for _, learn in documents)


def refused(folder: Path, *sets: list[Document], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        opened(folder, *sets, **options)
    return str(error.value)


def test_what_does_not_fit_is_refused_or_counted(tmp_path: Path) -> None:
    long = counting([4, 17, 4, 20])
    message = refused(tmp_path, long)
    assert "2 of 4 conversations" in message and "data.sequence_length 16 (the longest has 20 tokens)" in message
    assert "2 of 2 pairs" in refused(tmp_path, long, kind="pairs")
    examples = opened(tmp_path, long, longer="leave out")
    assert sorted(drawn_in_epoch(examples, 0)) == [0, 2] and examples.facts()["left_out"] == 2
    assert "no example of at most 3" in refused(tmp_path, long, longer="leave out", length=3)


def test_data_that_do_not_fit_each_other(tmp_path: Path) -> None:
    talks, more = counting([4] * 4), counting([5] * 4, 100)
    assert "set1 has no weight" in refused(tmp_path, talks, more, weights=[1.0, None])
    assert "must be positive" in refused(tmp_path, talks, weights=[0.0])
    assert "must be positive" in refused(tmp_path, talks, passes=[0])
    assert "give one of them" in refused(tmp_path, talks, weights=[1.0], passes=[2])
    assert "vocab_size is 5" in refused(tmp_path, talks, vocab_size=5)
    pairs = write_chat(tmp_path / "p", talks, "pairs")
    assert "different kinds" in refused(tmp_path, talks, validation=[pairs])
    other = write_chat(tmp_path / "o", talks, tokenizer="other")
    assert "one token id would mean two things" in refused(tmp_path, talks, validation=[other])
    text = write_chat(tmp_path / "x", talks, "documents")
    assert "x holds no conversations" in refused(tmp_path, talks, validation=[text])
    with pytest.raises(UserError, match=r"missing\.bin does not exist: give data that"):
        OpenSet(tmp_path / "missing", 8, "error")
    assert "which are no pairs" in refused(tmp_path, talks[:3], kind="pairs")
    opened(tmp_path, talks)
    column = tmp_path / "set0.learn.bin"
    column.write_bytes(b"\1" * 16)
    with pytest.raises(UserError, match=r"set0\.learn\.bin is not what was prepared"):
        PackedExamples(
            [ExampleSet(prefix=tmp_path / "set0")], Order(length=ROW, seed=1), vocab_size=100, cache=tmp_path
        )


def test_the_fingerprint_knows_what_is_learned_and_in_which_order(tmp_path: Path) -> None:
    documents = counting([4] * 9)
    first = opened(tmp_path, documents).fingerprint
    assert opened(tmp_path, documents, seed=6).fingerprint != first
    assert opened(tmp_path, documents, longer="leave out").fingerprint != first
    assert opened(tmp_path, [(ids, [0, 1, 1, 1]) for ids, _ in documents]).fingerprint != first
    assert opened(tmp_path, documents, length=32).fingerprint != first
    assert opened(tmp_path, documents, passes=[2]).fingerprint != first
    assert opened(tmp_path, documents).fingerprint == first
