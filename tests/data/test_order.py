"""Whether two orders begin alike, against the tokens themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen_moe.data.batches import TokenBatches
from qwen_moe.data.index_cache import IndexCache
from qwen_moe.data.order import begin_alike
from tests.data.test_batches import batches, counting_documents, process_group, write_tokens

__all__ = ["process_group"]


def tokens_alike(one: TokenBatches, other: TokenBatches, samples: int) -> bool:
    return torch.equal(one.train_batch(0, samples)["input_ids"], other.train_batch(0, samples)["input_ids"])


# 40 of 50 documents are for training: 1,600 tokens, 99 samples of 16 in a pass.
@pytest.mark.parametrize(
    ("short", "long"), [(10, 20), (20, 10), (20, 90), (20, 150), (99, 110), (110, 190), (150, 290)]
)
@pytest.mark.parametrize("samples", [1, 7, 10])
def test_it_says_what_the_tokens_say(short: int, long: int, samples: int, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    one, other = (batches(tmp_path, prefix, train_samples=count) for count in (short, long))
    assert one.begins_as(long, samples) == tokens_alike(one, other, samples)


@pytest.mark.parametrize("long", [40, 90, 150, 400])
def test_it_says_so_of_blends(long: int, tmp_path: Path) -> None:
    first = write_tokens(tmp_path / "a", counting_documents(10, 50, 40))
    second = write_tokens(tmp_path / "b", counting_documents(20_000, 30, 40))
    one, other = (batches(tmp_path, first, second, weights=(3.0, 1.0), train_samples=n) for n in (20, long))
    assert one.begins_as(long, 20) == tokens_alike(one, other, 20)


def test_both_answers_are_met(tmp_path: Path) -> None:
    """Within one pass the order does not depend on the length; a second pass shuffles the documents of both together."""
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    loader = batches(tmp_path, prefix, train_samples=20)
    assert loader.begins_as(90, 20) and not loader.begins_as(190, 20)
    assert loader.begins_as(190, 0) and not loader.begins_as(10, 1000)


def test_a_fingerprint_is_known_by_its_length(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "d", counting_documents(10, 50, 40))
    short, long = batches(tmp_path, prefix, train_samples=20), batches(tmp_path, prefix, train_samples=90)
    assert long.is_of_this_data(short.fingerprint, 20) and not long.is_of_this_data(short.fingerprint)
    assert not long.is_of_this_data(short.fingerprint, 21)


class Arrays:
    """A dataset of 4 samples in 3 documents; the last sample begins in document 2."""

    def __init__(self, **changes: list[Any]) -> None:
        self.shuffle_index = np.array([1, 0, 3, 2])
        self.sample_index = np.array([[0, 0], [0, 5], [1, 2], [2, 0], [2, 5]])
        self.document_index = np.array([7, 4, 9])
        for name, value in changes.items():
            setattr(self, name, np.array(value))

    def __len__(self) -> int:
        return len(self.shuffle_index)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, 4),
        ({"shuffle_index": [1, 0, 2, 3]}, 2),
        ({"sample_index": [[0, 0], [0, 5], [1, 2], [2, 0], [2, 6]]}, 2),
        ({"sample_index": [[0, 0], [0, 6], [1, 2], [2, 0], [2, 5]]}, 0),
        ({"document_index": [7, 4, 8]}, 2),
        ({"document_index": [6, 4, 9]}, 0),
        ({"shuffle_index": [1, 0, 3]}, 3),
    ],
)
def test_each_array_counts(changes: dict[str, list[Any]], alike: int) -> None:
    assert [begin_alike(Arrays(), Arrays(**changes), n) for n in range(5)] == [n <= alike for n in range(5)]


def test_index_arrays_that_are_sealed_again_are_still_whole(tmp_path: Path) -> None:
    """Each start of a run seals them; the seal is none of the files it speaks of."""
    cache = IndexCache(tmp_path, ["a"])
    (tmp_path / "array.npy").write_bytes(b"1")
    for _ in range(3):
        cache.seal()
        assert cache.clear_unless_whole()
    assert not IndexCache(tmp_path, ["b"]).clear_unless_whole()


class Blend:
    """Four samples, of two datasets in turn."""

    def __init__(self, **changes: Any) -> None:
        self.dataset_index, self.dataset_sample_index = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
        self.datasets = [Arrays(), Arrays()]
        for name, value in changes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.dataset_index)


@pytest.mark.parametrize(
    ("changes", "alike"),
    [
        ({}, 4),
        ({"dataset_index": np.array([0, 1, 1, 0])}, 2),
        ({"dataset_sample_index": np.array([0, 0, 2, 1])}, 2),
        ({"datasets": [Arrays(), Arrays(document_index=[6, 4, 9])]}, 1),
        ({"datasets": [Arrays(shuffle_index=[1, 2, 3, 0]), Arrays()]}, 2),
    ],
)
def test_blends_must_agree_in_every_array(changes: dict[str, Any], alike: int) -> None:
    assert [begin_alike(Blend(), Blend(**changes), n) for n in range(5)] == [n <= alike for n in range(5)]
