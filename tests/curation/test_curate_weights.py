"""Weights of domains: shares, repeats, and which documents are chosen."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("datatrove")

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.curation.library import Document
from qwen_moe.curation.recipe import WeightsSection
from qwen_moe.curation.weights import Count, Sample, Share, hash_of, plan, wanted_shares
from qwen_moe.data.tokenizer import read_tokenizer, train_tokenizer
from qwen_moe.errors import UserError


def counted(folder: Path, tokens: dict[str, list[int]], seed: int = 0, parts: int = 2) -> Path:
    """Counts as the step writes them, the documents dealt out to ``parts`` tasks."""
    for domain, lengths in tokens.items():
        rows = [(hash_of(seed, f"{domain}-{number}"), length) for number, length in enumerate(lengths)]
        (folder / domain).mkdir(parents=True)
        for part in range(parts):
            if rows[part::parts]:
                array = np.array(rows[part::parts], dtype=[("hash", "<u8"), ("tokens", "<u4")])
                np.save(folder / domain / f"{part:05d}.npy", array)
    return folder


def sampled(
    shares: dict[str, Share], tokens: dict[str, list[int]], folder: Path, seed: int = 0
) -> dict[str, list[int]]:
    """How often each document is in the output."""
    documents = [
        Document(text="x", id=f"{domain}-{number}", metadata={"domain": domain})
        for domain, lengths in tokens.items()
        for number in range(len(lengths))
    ]
    times = {domain: [0] * len(lengths) for domain, lengths in tokens.items()}
    ids = []
    for one in Sample(shares, seed, folder).run(iter(documents)):
        domain, number = one.id.split("#")[0].rsplit("-", 1)
        times[domain][int(number)] += 1
        ids.append(one.id)
    assert len(set(ids)) == len(ids)
    return times


lengths = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.dictionaries(st.sampled_from(["a", "b", "c"]), lengths, min_size=2),
    target=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
)
def test_output_is_the_plan_and_within_a_document_of_the_target(
    tokens: dict[str, list[int]], target: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    first = sorted(tokens)[0]
    section = WeightsSection(targets={first: target}, max_repeats=1e9, seed=seed)
    shares = plan(counted(folder / "counts", tokens, seed), section)
    times = sampled(shares, tokens, folder, seed)
    total = sum(map(sum, tokens.values()))
    for domain, share in shares.items():
        after = sum(count * length for count, length in zip(times[domain], tokens[domain], strict=True))
        assert (sum(times[domain]), after) == (share.documents_after, share.tokens_after)
        assert abs(after - share.wanted) <= max(tokens[domain]) / 2 + 1
        assert max(times[domain]) - min(times[domain]) <= 1  # no document is repeated before all are
    wanted = {first: target, **{name: (1 - target) * sum(tokens[name]) / (total - sum(tokens[first]))
                                for name in tokens if name != first}}  # fmt: skip
    assert {name: share.wanted / total for name, share in shares.items()} == pytest.approx(wanted, abs=1 / total)


def test_tokens_are_those_that_training_reads(tmp_path: Path) -> None:
    """Of each document its tokens and the one that ends it, over more documents than are counted at a time."""
    texts = [f"number {number} " * (number % 3) for number in range(300)]
    train_tokenizer(texts, 284, tmp_path / "tokenizer")
    documents = [
        Document(text=text, id=str(number), metadata={"domain": "ab"[number % 2]}) for number, text in enumerate(texts)
    ]
    passed = list(Count(tmp_path / "tokenizer", tmp_path / "counts", 3).run(iter(documents), rank=2))
    assert passed == documents
    tokenizer = read_tokenizer(tmp_path / "tokenizer")
    for part, domain in enumerate("ab"):
        rows = np.load(tmp_path / "counts" / domain / "00002.npy")
        expected = [len(tokenizer(text)["input_ids"]) + 1 for text in texts[part::2]]
        assert rows["tokens"].tolist() == expected and min(expected) == 1
        assert rows["hash"].tolist() == [hash_of(3, str(number)) for number in range(part, 300, 2)]


def test_without_targets_everything_is_kept_once(tmp_path: Path) -> None:
    tokens = {"a": [5, 6], "b": [7]}
    shares = plan(counted(tmp_path / "counts", tokens), WeightsSection())
    assert sampled(shares, tokens, tmp_path) == {"a": [1, 1], "b": [1]}


def test_the_choice_does_not_depend_on_tasks_and_does_on_the_seed(tmp_path: Path) -> None:
    tokens = {"a": [10] * 40, "b": [10] * 40}
    chosen = []
    for number, (parts, seed) in enumerate([(1, 0), (7, 0), (1, 1)]):
        folder = tmp_path / str(number)
        section = WeightsSection(targets={"a": 0.2, "b": 0.8}, seed=seed)
        shares = plan(counted(folder, tokens, seed, parts), section)
        chosen.append(sampled(shares, tokens, folder, seed))
    assert chosen[0] == chosen[1] != chosen[2]
    assert sum(chosen[0]["a"]) == 16 and sum(chosen[0]["b"]) == 64


def test_too_many_repeats_say_how_many_are_needed(tmp_path: Path) -> None:
    counts = counted(tmp_path, {"a": [100], "b": [900]})
    with pytest.raises(UserError, match=r"a has 100 tokens, and a share of 0.5 of 1,000 is 500: each of its documents "
                       r"would be needed 5.00 times, and max_repeats is 4 \(enough for tokens: 800\)"):  # fmt: skip
        plan(counts, WeightsSection(targets={"a": 0.5}))
    assert plan(counts, WeightsSection(targets={"a": 0.5}, tokens=800))["a"].copies == 4
    assert plan(counts, WeightsSection(targets={"a": 0.5}, max_repeats=5))["a"].tokens_after == 500


def test_targets_that_fit_no_domain() -> None:
    with pytest.raises(UserError, match=r"targets name z, and no document of that domain is left \(there are a, b\)"):
        wanted_shares({"a": 1, "b": 1}, {"z": 0.5})
    with pytest.raises(UserError, match="nothing is left for b: give each a share"):
        wanted_shares({"a": 1, "b": 1}, {"a": 1.0})
    assert wanted_shares({"a": 1, "b": 1}, {"a": 1.0, "b": 0}) == {"a": 1.0, "b": 0.0}
    assert wanted_shares({"a": 1, "b": 1}, {"a": 0.3, "b": 0.1}) == pytest.approx({"a": 0.75, "b": 0.25})
