"""Batches: the right tokens, each once, the same for any number of ranks and after any resume."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from qwen_moe.config import DataConfig, Dataset
from qwen_moe.data.batches import TokenBatches
from qwen_moe.data.content import check_prefix
from qwen_moe.data.inputs import tell_of_data
from qwen_moe.data.lengths import long_samples
from qwen_moe.data.megatron import IndexedDatasetBuilder
from qwen_moe.data.samples import rank_samples
from qwen_moe.errors import UserError
from tests.data.chat_data import write_chat
from tests.small import exact_run, model_values

SEQ, END = 16, 3


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """megatron-core's blends ask for the rank."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_tokens(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for tokens in documents:
        builder.add_item(torch.tensor(tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def counting_documents(first: int, count: int, length: int) -> list[list[int]]:
    """Documents whose tokens count up without repeating, each closed by END."""
    starts = range(first, first + count * length, length)
    return [[*range(start, start + length - 1), END] for start in starts]


def batches(tmp_path: Path, *prefixes: Path, weights: tuple[float, ...] = (), **changes: Any) -> TokenBatches:
    train = [Dataset(prefix=p, weight=w) for p, w in zip(prefixes, weights or (1.0,) * len(prefixes))]
    samples = {"train_samples": 20, "validation_samples": 8, "vocab_size": 60_000, "end_of_document": END}
    samples |= {key: changes.pop(key) for key in list(changes) if key in samples}
    config = DataConfig(**{"train": tuple(train), "sequence_length": SEQ, "split": "80,20,0"} | changes)
    return TokenBatches(config, train, cache=tmp_path / "cache", **samples)


def test_samples_are_stretches_of_the_documents_and_labels_the_next_token(tmp_path: Path) -> None:
    documents = counting_documents(10, 50, 40)
    loader = batches(tmp_path, write_tokens(tmp_path / "d", documents))
    following = {a: b for tokens in documents for a, b in itertools.pairwise(tokens)}
    starts = {tokens[0] for tokens in documents}
    batch = loader.train_batch(0, 20)
    assert batch["input_ids"].shape == batch["labels"].shape == (20, SEQ)
    for inputs, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
        assert inputs[1:] == labels[:-1]
        for token, label in zip(inputs, labels):
            assert label in starts if token == END else label == following[token]
    seen = Counter(t for row in batch["input_ids"].tolist() for t in row if t != END)
    assert max(seen.values()) == 1, "a token was read twice in one epoch"


def test_validation_and_training_share_no_document(tmp_path: Path) -> None:
    loader = batches(tmp_path, write_tokens(tmp_path / "d", counting_documents(10, 50, 40)), train_samples=97)
    train = set(loader.train_batch(0, 97)["input_ids"].flatten().tolist()) - {END}
    validation = set(loader.validation_batch(0, 8)["input_ids"].flatten().tolist()) - {END}
    assert train and validation and not train & validation


@pytest.mark.parametrize(("split", "documents"), [("98,1,1", 60), ("93,3,4", 20)])
def test_a_split_without_a_document_between_its_edges_has_no_validation(
    tmp_path: Path, split: str, documents: int
) -> None:
    """1% of 60 documents rounds to one, but from 58.8 to 59.4 there is none, and megatron-core would not end."""
    prefix = write_tokens(tmp_path / "d", counting_documents(10, documents, 40))
    assert batches(tmp_path, prefix, split=split, train_samples=5).validation_samples == 0


def test_documents_of_the_test_are_not_trained_on_where_there_is_no_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = counting_documents(10, 20, 40)
    loader = batches(tmp_path, write_tokens(tmp_path / "d", documents), split="90,0,10", train_samples=44)
    read = set(loader.train_batch(0, 44)["input_ids"].flatten().tolist()) - {END}
    held = {token for tokens in documents[18:] for token in tokens} - {END}
    assert not read & held and len(read) > 600
    monkeypatch.setattr("qwen_moe.data.batches.used_split", lambda split, documents: "1,0,0")  # as it once was
    assert not loader.is_of_this_data(batches(tmp_path, tmp_path / "d", split="90,0,10", train_samples=44).fingerprint)


def test_data_with_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    few = write_tokens(tmp_path / "d", counting_documents(10, 20, 40))
    with pytest.raises(
        UserError, match=r"data.split '1,99,0' leaves nothing of .*d to train on, which has 20 documents"
    ):
        batches(tmp_path, few, split="1,99,0")
    with pytest.raises(UserError, match="e has no tokens: give data with text"):
        batches(tmp_path, few, write_tokens(tmp_path / "e", [[], []]))
    with pytest.raises(UserError, match="e has no tokens: give validation data"):
        batches(tmp_path, few, validation=(Dataset(prefix=tmp_path / "e"),))


def test_a_run_says_what_is_likely_a_mistake_in_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_tokens(tmp_path / "d", counting_documents(10, 20, 40))

    def told(split: str, times: int = 1, **data: Any) -> str:
        values = {"train": [{"prefix": str(few)}] * times, "sequence_length": SEQ, "split": split} | data
        tell_of_data(exact_run(model_values(), SEQ, data=values, training__train_tokens=128))
        return capsys.readouterr().err

    assert told("80,20,0") == told("1,0,0") == told("99,1,0", validation=[{"prefix": str(few)}]) == ""
    assert "d, which has 20 documents: give it a larger share" in told("99,1,0")
    assert "data.train names" in told("80,20,0", times=2)


def test_samples_past_the_validation_data_count_nothing(tmp_path: Path) -> None:
    loader = batches(tmp_path, write_tokens(tmp_path / "d", counting_documents(10, 10, 40)), validation_samples=100)
    assert loader.validation_samples == (2 * 40 - 1) // SEQ
    labels = loader.validation_batch(loader.validation_samples - 1, 3)["labels"]
    assert (labels[0] != -100).all() and (labels[1:] == -100).all()


def test_a_blend_keeps_its_weights(tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a", counting_documents(10, 300, 40))
    second = write_tokens(tmp_path / "b", counting_documents(20_000, 300, 40))
    loader = batches(tmp_path, first, second, weights=(3.0, 1.0), train_samples=400)
    tokens = loader.train_batch(0, 400)["input_ids"]
    share = (tokens < 20_000)[tokens != END].float().mean().item()
    assert share == pytest.approx(0.75, abs=0.01)


@given(micro=st.integers(1, 4), ranks=st.integers(1, 6), accumulation=st.integers(1, 4), step=st.integers(0, 1000))
def test_the_ranks_together_read_the_global_batch(micro: int, ranks: int, accumulation: int, step: int) -> None:
    size = micro * ranks * accumulation
    read = [
        n
        for r in range(ranks)
        for first, count in rank_samples(step, size, micro, r, ranks)
        for n in range(first, first + count)
    ]
    assert sorted(read) == list(range(step * size, (step + 1) * size))


def test_a_new_object_gives_the_same_sample_for_the_same_number(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    first, second = batches(tmp_path, prefix), batches(tmp_path, prefix)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.train_batch(7, 5)["input_ids"], second.train_batch(7, 5)["input_ids"])
    assert torch.equal(first.train_batch(7, 5)["input_ids"][2:3], second.train_batch(9, 1)["input_ids"])


def test_more_tokens_than_there_are_means_more_epochs(tmp_path: Path) -> None:
    loader = batches(tmp_path, write_tokens(tmp_path / "d", counting_documents(10, 10, 40)), train_samples=60)
    assert loader.epochs > 2
    tokens = loader.train_batch(0, 60)["input_ids"]
    assert max(Counter(tokens[tokens != END].tolist()).values()) in (3, 4)


def test_document_boundaries(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 200, 7))
    loader = batches(tmp_path, prefix, respect_document_boundaries=True)
    batch = loader.train_batch(0, 10)
    for tokens, positions, starts in zip(
        *(batch[k].tolist() for k in ("input_ids", "position_ids", "document_starts"))
    ):
        start = 0
        for index, (token, got_position, got_start) in enumerate(zip(tokens, positions, starts)):
            assert (got_position, got_start) == (index - start, start)
            start = index + 1 if token == END else start


def test_masking_the_end_of_a_document_leaves_out_what_follows_it(tmp_path: Path) -> None:
    """After <|endoftext|> comes another document's first token, which nothing could predict."""
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 200, 7))
    batch = batches(tmp_path, prefix, mask_end_of_document=True).train_batch(0, 10)
    assert torch.equal(batch["labels"] == -100, batch["input_ids"] == END)


@pytest.mark.parametrize(
    "key", ["seed", "sequence_length", "split", "train_samples", "mask_end_of_document", "content"]
)
def test_the_fingerprint_knows_what_decides_the_samples(tmp_path: Path, key: str) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    before = batches(tmp_path, prefix).fingerprint
    changes = {
        "seed": 9,
        "sequence_length": 8,
        "split": "70,30,0",
        "train_samples": 21,
        "mask_end_of_document": True,
    }
    if key == "content":
        write_tokens(prefix, counting_documents(10, 51, 40))
        assert batches(tmp_path, prefix).fingerprint != before
    else:
        assert batches(tmp_path, prefix, **{key: changes[key]}).fingerprint != before


def test_data_made_anew_does_not_meet_old_indices(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    batches(tmp_path, prefix)
    write_tokens(prefix, counting_documents(5_000, 30, 33))
    tokens = batches(tmp_path, prefix).train_batch(0, 20)["input_ids"]
    assert tokens[tokens != END].min() >= 5_000


@pytest.mark.parametrize("documents", [counting_documents(10, 1, 40), counting_documents(10, 2, 40), [[5, END]]])
def test_tiny_corpora_work(tmp_path: Path, documents: list[list[int]]) -> None:
    loader = batches(tmp_path, write_tokens(tmp_path / "d", documents), train_samples=5)
    assert loader.train_batch(0, 5)["input_ids"].shape == (5, SEQ)
    assert loader.validation_samples == 0


def refused(tmp_path: Path, prefix: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        batches(tmp_path, prefix, **changes)
    return str(error.value)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    assert check_prefix(prefix) == (50, 2000)
    data, index = (tmp_path / "d.bin").read_bytes(), (tmp_path / "d.idx").read_bytes()
    (tmp_path / "d.bin").write_bytes(data[:-10])
    text = refused(tmp_path, prefix)
    assert "3990 bytes, expected 4000" in text and "d.bin" in text
    (tmp_path / "d.bin").write_bytes(data)
    for broken in (index[:-4], index[:10], b"", b"x" * 100):
        (tmp_path / "d.idx").write_bytes(broken)
        assert "d.idx" in refused(tmp_path, prefix)
    (tmp_path / "d.idx").unlink()
    assert "does not exist" in refused(tmp_path, prefix)


def test_a_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    loader = batches(tmp_path, prefix, vocab_size=500)
    with pytest.raises(UserError, match="vocab_size is 500"):
        loader.train_batch(0, 20)


@pytest.mark.parametrize("split", ["0,1,0", "a,b", "1,2,3,4", "-1,2,0"])
def test_impossible_splits(tmp_path: Path, split: str) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    with pytest.raises(ValueError, match=re.escape(split)):  # the config refuses it before anything is opened
        batches(tmp_path, prefix, split=split)


@pytest.mark.parametrize(("kind", "what"), [("chat", "holds conversations"), ("pairs", "holds pairs of answers")])
def test_conversations_are_not_read_as_text(tmp_path: Path, kind: str, what: str) -> None:
    prefix = write_chat(tmp_path / "d", [([5, 6, 7], [0, 1, 1])] * 8, kind)
    assert what in refused(tmp_path, prefix) and what in refused(tmp_path, prefix, split="1,0,0")
    text = write_tokens(tmp_path / "t", counting_documents(10, 50, 40))
    assert what in refused(tmp_path, text, validation=(Dataset(prefix=prefix),))


def test_boundaries_need_an_end_of_document_token(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    assert "data.tokenizer" in refused(tmp_path, prefix, respect_document_boundaries=True, end_of_document=None)


def index_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.npy"))


def test_damaged_index_arrays_are_made_again(tmp_path: Path) -> None:
    """One that is cut off, as a kill leaves it, one with another number in it, and one that is missing or too many."""
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    expected = batches(tmp_path, prefix).train_batch(0, 20)["input_ids"]
    files = index_files(tmp_path)
    assert len(files) >= 3
    for path in files:
        whole = path.read_bytes()
        for damaged in (whole[:-5], whole[:20], b"", whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):
            path.write_bytes(damaged)
            assert torch.equal(batches(tmp_path, prefix).train_batch(0, 20)["input_ids"], expected)
            assert path.read_bytes() == whole
        path.unlink()
        assert torch.equal(batches(tmp_path, prefix).train_batch(0, 20)["input_ids"], expected)
    times = [path.stat().st_mtime_ns for path in files]
    batches(tmp_path, prefix)
    assert [path.stat().st_mtime_ns for path in files] == times, "arrays that are whole are not made again"


def test_a_start_that_was_killed_while_it_wrote_indices_is_no_obstacle(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    expected = batches(tmp_path, prefix).train_batch(0, 20)["input_ids"]
    (folder,) = {path.parent for path in index_files(tmp_path)}
    for left in range(len(index_files(tmp_path)) + 1):
        for seal in folder.glob("sealed*"):
            seal.unlink()
        for number, path in enumerate(index_files(tmp_path)):
            if number == left:
                path.write_bytes(path.read_bytes()[:100])
            elif number > left:
                path.unlink()
        assert torch.equal(batches(tmp_path, prefix).train_batch(0, 20)["input_ids"], expected)
    for content in ("", "{}", "[]", '{"contents": 1, "files": 5}'):
        (folder / "sealed.json").write_text(content)
        assert torch.equal(batches(tmp_path, prefix).train_batch(0, 20)["input_ids"], expected)


def test_checkpoints_of_earlier_versions_know_their_data(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    loader = batches(tmp_path, prefix)
    earlier = hashlib.sha256((tmp_path / "d.idx").read_bytes() + b"4000").hexdigest()
    parts = [SEQ, 1234, "80,20,0", 20, False, False, False, (earlier, 1.0)]
    assert loader.is_of_this_data(hashlib.sha256(repr(parts).encode()).hexdigest()[:32])
    assert loader.is_of_this_data(loader.fingerprint) and not loader.is_of_this_data("0" * 32)


def test_the_same_size_with_other_tokens_is_other_data(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    before = batches(tmp_path, prefix).fingerprint
    write_tokens(prefix, counting_documents(11, 50, 40))
    assert not batches(tmp_path, prefix).is_of_this_data(before)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """50 documents of 40 tokens, counting from 10, and 100 of 8 tokens, counting from 20,000."""
    return write_tokens(tmp_path / "d", counting_documents(10, 50, 40) + counting_documents(20_000, 100, 8))


def are_long(loader: TokenBatches, count: int) -> list[bool]:
    """Of the first samples: whether all tokens are of long documents. No sample has tokens of both kinds."""
    rows = loader.train_batch(0, count)["input_ids"]
    long = [{token < 20_000 for token in row if token != END} for row in rows.tolist()]
    assert all(len(kinds) == 1 for kinds in long)
    return [kinds == {True} for kinds in long]


@pytest.mark.parametrize("share", [0.4, 0.75, 0.1, 1.0])
def test_the_share_of_sequences_from_long_documents_is_exact(tmp_path: Path, mixed: Path, share: float) -> None:
    found = are_long(batches(tmp_path, mixed, split="1,0,0", train_samples=200, long_share=share), 200)
    assert sum(found) == round(200 * share)
    for first in range(0, 200, 20):
        assert abs(sum(found[first : first + 20]) - 20 * share) <= 1


@pytest.mark.parametrize(("share", "samples", "expected"), [(0.29, 100, 29), (0.7, 10, 7), (0.3, 9, 2), (1.0, 7, 7)])
def test_a_share_is_the_decimal_number_that_was_written(share: float, samples: int, expected: int) -> None:
    """0.29 x 100 is 28.999999999999996 in binary."""
    assert long_samples(share, samples) == expected


def test_a_mix_reads_every_long_token_once_and_leaves_validation_as_it_is(tmp_path: Path, mixed: Path) -> None:
    loader = batches(tmp_path, mixed, split="80,20,0", train_samples=100, long_share=0.5)
    plain = batches(tmp_path, mixed, split="80,20,0", train_samples=100)
    assert loader.fingerprint != plain.fingerprint
    assert torch.equal(loader.validation_batch(0, 8)["input_ids"], plain.validation_batch(0, 8)["input_ids"])
    rows = loader.train_batch(0, 100)["input_ids"]
    seen = Counter(token for row in rows.tolist() for token in row if token != END and token < 20_000)
    assert max(seen.values()) == 1 and len(seen) > 700
    again = batches(tmp_path, mixed, split="80,20,0", train_samples=100, long_share=0.5)
    assert torch.equal(again.train_batch(0, 100)["input_ids"], rows)
    assert again.begins_as(90, 60) and not again.begins_as(1000, 60)


def test_a_mix_of_a_blend_takes_what_each_has(tmp_path: Path, mixed: Path) -> None:
    """Only the first has long documents, both have short ones; validation data of their own."""
    short = write_tokens(tmp_path / "s", counting_documents(40_000, 100, 8))
    options: dict[str, Any] = {"validation": (Dataset(prefix=short),), "long_share": 0.5, "train_samples": 80}
    loader = batches(tmp_path, mixed, short, weights=(1.0, 3.0), **options)
    rows = loader.train_batch(0, 80)["input_ids"]
    kinds = [row[row != END].min().item() // 20_000 for row in rows]
    assert kinds.count(0) == 40
    tokens = rows[rows >= 20_000]
    assert (tokens >= 40_000).float().mean().item() == pytest.approx(0.75, abs=0.05)
    assert loader.validation_batch(0, 4)["input_ids"].max() >= 40_000


def test_a_mix_without_long_or_short_documents_is_refused(tmp_path: Path, mixed: Path) -> None:
    message = refused(tmp_path, mixed, sequence_length=41, long_share=0.5)
    assert "data.long_share 0.5" in message and "at least data.sequence_length 41" in message
    assert "the longest training document" in message and "has 40:" in message
    # The only longer document is kept for validation.
    documents = counting_documents(10, 9, 10) + counting_documents(500, 1, 40)
    message = refused(tmp_path, write_tokens(tmp_path / "e", documents), split="90,10,0", long_share=0.5)
    assert "has 10:" in message
    message = refused(tmp_path, mixed, sequence_length=4, long_share=0.5)
    assert "the shortest training document" in message and "has 8:" in message and "set long_share to 1" in message
