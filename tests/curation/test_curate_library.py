"""Filters and deduplication decide as the library's own classes do, with the same settings."""

import json
import os
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from pydoc_data.topics import topics

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import ngrams, simplify_text

from qwen_moe.curation.execute import Executor, Stage
from qwen_moe.curation.filters import LanguageFilter, LengthFilter, SymbolFilter, build_filters
from qwen_moe.curation.language import detect
from qwen_moe.curation.recipe import FilterSection
from qwen_moe.curation.words import SimpleWords
from tests.curation.curations import curate, documents, recipe, sentences


def corpus() -> list[Document]:
    """Help topics, cut and repeated, so that every filter keeps some and drops some."""
    rng = random.Random(0)
    texts = [text for text in topics.values() if len(text) > 400][:60]
    texts += [text[:300] + "\n" + text[:300] * rng.randrange(1, 4) for text in texts[:20]]
    texts += [sentences(seed, 10) for seed in range(10)] + [
        "{ " + sentences(3, 9),
        "lorem ipsum. " * 40,
        "#" * 300,
        "a b",
        ("word " * 50 + "\n") * 4,
    ]
    return [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


def decide(filter: Any, document: Document) -> tuple[bool, str | None, str]:
    result = filter.filter(document)
    kept, reason = result if isinstance(result, tuple) else (result, None)
    return bool(kept), reason, document.text


@pytest.mark.parametrize(
    ("kind", "cls", "settings"),
    [
        ("gopher_quality", GopherQualityFilter, {"min_doc_words": 30, "max_non_alpha_words_ratio": 0.7}),
        ("gopher_repetition", GopherRepetitionFilter, {"top_n_grams": [[2, 0.1], [3, 0.1]]}),
        ("c4_quality", C4QualityFilter, {"min_num_sentences": 3}),
        ("c4_paragraphs", C4ParagraphFilter, {}),
        ("fineweb_quality", FineWebQualityFilter, {"line_punct_thr": 0.2, "stop_chars": [".", "!"]}),
    ],
)
def test_decisions_are_the_library_s(kind: str, cls: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    """With the settings as the recipe writes them, against the class called directly."""
    pipeline = build_filters([FilterSection.model_validate({kind: settings})], "simple", tmp_path)
    ours = next(step for step in pipeline if isinstance(step, cls))
    direct = {key: tuple(map(tuple, v)) if key.endswith("grams") else tuple(v) if isinstance(v, list) else v
              for key, v in settings.items()}  # fmt: skip
    if kind != "c4_paragraphs":
        direct["language"] = SimpleWords()
    theirs = cls(**direct)
    found = [decide(ours, deepcopy(one)) for one in corpus()]
    assert found == [decide(theirs, deepcopy(one)) for one in corpus()]
    assert {kept for kept, *_ in found} == {True, False}


def similar_texts() -> list[str]:
    rng = random.Random(1)
    texts = []
    for seed in range(30):
        words = sentences(seed, 20).split(" ")
        texts.append(" ".join(words))
        for share in (0.01, 0.03, 0.1, 0.3):
            texts.append(" ".join(f"other{rng.randrange(10**6)}" if rng.random() < share else word for word in words))
    rng.shuffle(texts)
    return texts


def test_minhash_drops_what_the_library_s_own_pipeline_drops(tmp_path: Path) -> None:
    """Its four stages on its own executor with its own readers' order, against the step of a curation."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(similar_texts()):
        (folder / f"{number:03d}.txt").write_text(text)
    minhash = {"num_buckets": 10, "hashes_per_bucket": 6, "seed": 5, "n_grams": 4}
    path = recipe(
        tmp_path, input=[str(folder)], filters=None, weights=None, deduplication={"exact": False, "minhash": minhash}
    )
    assert curate(path, "--until", "deduplication") == 0

    config = MinhashConfig(**minhash, hash_config=HashConfig(precision=64, hash_fc="sha1"))  # type: ignore[arg-type]
    parts = [
        [Document(text=row["text"], id=row["id"]) for row in documents_of(tmp_path / "run/1-read/kept", rank)]
        for rank in range(3)
    ]
    kept: list[str] = []

    def read(data: Any, rank: int, world_size: int) -> Any:
        yield from deepcopy(parts[rank])

    def collect(data: Any, rank: int, world_size: int) -> Any:
        for one in data:
            kept.append(one.id)
            yield one

    work = {name: str(tmp_path / "theirs" / name) for name in ("sigs", "buckets", "clusters")}
    stages: list[tuple[list[Any], int]] = [
        ([read, MinhashDedupSignature(work["sigs"], config, language=SimpleWords())], 3),
        ([MinhashDedupBuckets(work["sigs"], work["buckets"], config=config)], 10),
        ([MinhashDedupCluster(work["buckets"], work["clusters"], config)], 1),
        ([read, MinhashDedupFilter(work["clusters"]), collect], 3),
    ]
    for number, (pipeline, tasks) in enumerate(stages):
        for rank in range(tasks):
            LocalPipelineExecutor(deepcopy(pipeline) if number != 3 else pipeline, tasks=tasks, workers=1,
                                  logging_dir=str(tmp_path / f"logs{number}"))._run_for_rank(rank, 1)  # fmt: skip
    ours = [row["id"] for row in documents(tmp_path / "run/5-deduplication/kept")]
    assert sorted(ours) == sorted(kept)
    assert 30 <= len(ours) < 100


def documents_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"{rank:05d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_one_document_of_each_cluster_is_kept_and_similar_to_the_dropped(tmp_path: Path) -> None:
    """Against the Jaccard similarity itself: dropped documents are similar to a document of their cluster."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(similar_texts()):
        (folder / f"{number:03d}.txt").write_text(text)
    (folder / "equal.txt").write_text(similar_texts()[7])
    path = recipe(tmp_path, input=[str(folder)], filters=None, weights=None,
                  deduplication={"minhash": {"num_buckets": 14, "hashes_per_bucket": 8}})  # fmt: skip
    assert curate(path, "--until", "deduplication") == 0
    run = tmp_path / "run"
    texts = {row["id"]: row["text"] for row in documents(run / "1-read/kept")}
    dropped = {row["id"] for row in documents(run / "5-deduplication/dropped")}
    kept = {row["id"] for row in documents(run / "5-deduplication/kept")}
    assert dropped | kept == set(texts) and not dropped & kept
    clusters = [json.loads(line) for line in (run / "5-deduplication/clusters.jsonl").read_text().splitlines()]
    assert {one["kind"] for one in clusters} == {"exact", "minhash"}
    assert sorted(name for one in clusters for name in one["dropped"]) == sorted(dropped)

    def shingles(text: str) -> set[tuple[str, ...]]:
        return set(ngrams(SimpleWords().word_tokenize(simplify_text(text)), 5))

    for one in clusters:
        if one["kind"] == "exact":
            assert all(texts[name] == texts[one["kept"]] for name in one["dropped"])
            continue
        members = [one["kept"], *one["dropped"]]
        sets = {name: shingles(texts[name]) for name in members}
        for name in members:
            best = max(
                len(sets[name] & sets[other]) / len(sets[name] | sets[other]) for other in members if other != name
            )
            assert best > 0.3
    assert not (run / "5-deduplication/work").exists()


def test_words_and_sentences() -> None:
    words = SimpleWords()
    assert words.word_tokenize("It's well-known: 3.5 of 10...") == [
        "It's",
        "well-known",
        ":",
        "3",
        ".",
        "5",
        "of",
        "10",
        "...",
    ]
    assert words.word_tokenize("你好 world") == ["你", "好", "world"]
    text = 'He said "no." Then 3.5 more! And\na title\n\nLast one'
    assert words.sent_tokenize(text) == ['He said "no."', "Then 3.5 more!", "And", "a title", "Last one"]
    assert words.sent_tokenize("你好。再见！") == ["你好。", "再见！"]
    assert [text[a:b].strip() for a, b in words.span_tokenize(text)] == words.sent_tokenize(text)
    assert words.sent_tokenize("") == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is the house that Jack built, and it was not for sale.", "en"),
        ("Das ist nicht das Haus, in dem der Hund und die Katze wohnen.", "de"),
        ("C'est la maison dans laquelle le chien et le chat ne sont pas.", "fr"),
        ("Esta es la casa en la que el perro y el gato no están con los niños.", "es"),
        ("Questa è la casa in cui il cane e il gatto non sono con i bambini della donna.", "it"),
        ("Het is niet het huis van de man die met een hond op de bank zit.", "nl"),
        ("这是一个很好的例子，说明了如何工作。", "zh"),
        ("これはとても良い例です。", "ja"),
        ("Это очень хороший пример того, как это работает.", "ru"),
        ("12345 67890", ""),
    ],
)
def test_languages(text: str, language: str) -> None:
    found, score = detect(text)
    assert found == language
    assert (score > 0.5) == bool(language)


def test_limits_of_our_filters() -> None:
    def of(filter: Any, text: str) -> Any:
        return filter.filter(Document(text=text, id="1"))

    length = LengthFilter(min_characters=4, max_characters=9, min_words=2, max_words=3)
    assert [of(length, text) for text in ("a b", "ab b", "a b c d", "a bcd efg", "abcd efg hi", "abcdef")] == [
        (False, "too_few_characters"), True, (False, "too_many_words"), True, (False, "too_many_characters"),
        (False, "too_few_words"),
    ]  # fmt: skip
    symbols = SymbolFilter(max_symbols=0.25, max_digits=0.5)
    assert [of(symbols, text) for text in ("abc.", "ab..", "ab12", "a123", " ")] == [
        True, (False, "too_many_symbols"), True, (False, "too_many_digits"), (False, "empty"),
    ]  # fmt: skip
    english = LanguageFilter(["en"], min_score=0.9)
    assert of(english, "the of and to in is that") is True
    assert of(english, "der die und das") == (False, "language_de")
    assert of(english, "name name name name name name name name the") == (False, "language_score")


def test_there_are_no_more_workers_than_the_container_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.threads.cgroup_cpus", lambda root: 1.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert (Executor(0).workers, Executor(3).workers) == (1, 3)


def test_the_executor_runs_tasks_in_processes(tmp_path: Path) -> None:
    def note(data: Any, rank: int, world_size: int) -> Any:
        (Path(folder) / f"{rank}").write_text(str(os.getpid()))
        yield from ()

    folder = str(tmp_path)
    stage = Stage("note", [note], 4, tmp_path)
    Executor(2).run(stage)
    pids = {int((tmp_path / str(rank)).read_text()) for rank in range(4)}
    assert os.getpid() not in pids and len(pids) <= 2
    (tmp_path / "1").unlink()
    Executor(2).run(stage)  # its tasks are done
    assert not (tmp_path / "1").exists()
