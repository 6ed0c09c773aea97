"""Classifiers of hashed words: planted scores and labels are learned, the same by the same seed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen_moe.alone import alone
from qwen_moe.curation.scores.annotate import open_annotator
from qwen_moe.curation.scores.classifier import Classifier, Network, Shape
from qwen_moe.curation.scores.documents import Document
from qwen_moe.curation.scores.features import Hasher
from qwen_moe.curation.scores.settings import DomainSettings, ScoreSettings
from qwen_moe.curation.scores.train import _Step, correlation
from qwen_moe.errors import UserError
from tests.curation.scoring import content, planted, read, score, write

SMALL = ("--buckets", 4096, "--hidden", 8, "--epochs", 15)
LINEAR = (*SMALL, "--hidden", 0, "--learning-rate", 0.2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("planted") / "scores" / "a.jsonl", list(planted())).parent


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    folder = corpus.parent / "classifier"
    assert score("--train-classifier", folder, "--input", corpus, *SMALL) == 0
    return folder


@pytest.mark.parametrize("options", [LINEAR, SMALL], ids=["linear", "two layers"])
def test_planted_scores_are_learned(
    corpus: Path, tmp_path: Path, options: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--train-classifier", tmp_path / "new", "--input", corpus, *options, "--json")
    assert score(*arguments) == 0
    said = capsys.readouterr()
    figures = json.loads(said.out)
    assert "note:" not in said.err
    assert figures["names"] == ["length", "planted"] and figures["held_out"] > 50
    assert figures["trained_on"] + figures["chosen_by"] + figures["held_out"] == len(planted())
    one = figures["scores"]["planted"]
    assert one["correlation"] > 0.95 and one["error"] < one["error_of_mean"] / 3
    # The figures are those of documents that were not trained on: of fresh ones they are alike.
    annotator = open_annotator(ScoreSettings(scorer=f"classifier:{tmp_path / 'new'}"))
    fresh = [Document(" ".join(sorted(row["text"].split())), row["id"], {}) for row in planted()]
    found = torch.tensor([row["scores"]["planted"] for row in annotator.annotate(fresh)], dtype=torch.float64)
    wanted = torch.tensor([row["metadata"]["scores"]["planted"] for row in planted()], dtype=torch.float64)
    assert correlation(found, wanted) > 0.85


def test_noise_is_not_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores without a cause have no correlation: what is measured was not trained on."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(len(planted()), generator=generator).tolist()
    rows = [row | {"metadata": {"scores": {"noise": value}}} for row, value in zip(planted(), noise, strict=True)]
    write(tmp_path / "noise.jsonl", rows)
    arguments = ("--input", tmp_path / "noise.jsonl", *SMALL, "--json")
    assert score("--train-classifier", tmp_path / "new", *arguments) == 0
    said = capsys.readouterr()
    assert abs(json.loads(said.out)["scores"]["noise"]["correlation"]) < 0.3
    assert "the classifier is no nearer to noise than their mean is: keep or drop nothing by it" in said.err


def test_the_seed_decides_everything(corpus: Path, trained: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        assert score("--train-classifier", tmp_path / name, "--input", corpus, *SMALL, "--seed", seed) == 0
    assert content(tmp_path / "same") == content(trained) != content(tmp_path / "other")


def test_two_processes_do_not_write_one_classifier(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(tmp_path / "new"):
        assert score("--train-classifier", tmp_path / "new", "--input", corpus, *SMALL) == 2
    assert "new is being written by process" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_order_of_documents_decides_nothing(corpus: Path, trained: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", list(planted())[::-1])
    assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "a.jsonl", *SMALL) == 0
    assert content(tmp_path / "new") == content(trained)


def test_it_scores_a_corpus(corpus: Path, trained: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"text": row["text"]} for row in planted()[:300]])
    assert score("--input", source, "--scorer", f"classifier:{trained}", "--output", tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    classifier = Classifier.load(trained)
    expected = classifier.of_texts([row["text"] for row in planted()[:300]])
    found = torch.tensor([[row["metadata"]["scores"][name] for name in classifier.shape.names] for row in rows])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_one_document_by_itself_has_the_same_scores(trained: Path) -> None:
    classifier = Classifier.load(trained)
    texts = [row["text"] for row in planted()[:20]] + [""]
    together = classifier.of_texts(texts)
    for place, text in enumerate(texts):
        torch.testing.assert_close(classifier.of_texts([text])[0], together[place], rtol=1e-6, atol=0)


def test_labels_in_metadata_are_learned(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--input", corpus, "--target", "label", *SMALL, "--json")
    assert score("--train-classifier", tmp_path / "new", *arguments) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["names"] == ["dry", "wet"]
    assert figures["accuracy"] > 0.85 > figures["most_frequent"] and min(figures["recall"].values()) > 0.7
    found = open_annotator(DomainSettings(classifier=tmp_path / "new")).annotate(
        [Document("stone stone stone", "1"), Document("water water water", "2")]
    )
    assert [row["domain"] for row in found] == ["dry", "wet"] and all(row["domain_probability"] > 0.5 for row in found)


def test_rules_are_learned(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n- {domain: alphabet, text: '^(alpha|beta|gamma)'}\n- {domain: things, text: '.'}\n")
    arguments = ("--input", corpus, "--domains", rules, *SMALL, "--json")
    assert score("--train-classifier", tmp_path / "new", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["names"] == ["alphabet", "things"]


def test_figures_of_a_classifier_are_printed(trained: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained.with_name("again")
    assert score("--train-classifier", folder, "--input", corpus, *SMALL) == 0
    said = capsys.readouterr()
    assert "planted: correlation 0.9" in said.out and "documents per second" in said.err
    assert json.loads((folder / "classifier.json").read_text())["figures"]["scores"]["planted"]["correlation"] > 0.95


def test_a_step_is_that_of_sparse_adam() -> None:
    """Rows of the table change as torch's SparseAdam changes them, with the same decay."""
    shape = Shape(kind="scores", names=("a", "b"), buckets=16, hidden=3, means=(0, 0), deviations=(1, 1))
    ours, theirs = (Network(shape).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    step = _Step(ours, 0.1, 5)
    others = [parameter for name, parameter in theirs.named_parameters() if name != "words.weight"]
    optimizers = [torch.optim.SparseAdam([theirs.words.weight], lr=0.1), torch.optim.Adam(others, lr=0.1)]
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        buckets, offsets = torch.randint(12, (9,), generator=generator), torch.tensor([0, 2, 5])
        weights = torch.rand(9, generator=generator, dtype=torch.float64)
        targets = torch.rand(3, 2, generator=generator)
        step((buckets, offsets, weights), targets, "scores")
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - number / 5)
        table, hidden = theirs.words.weight, theirs.bias
        bags = F.embedding_bag(buckets, table, offsets, mode="sum", per_sample_weights=weights, sparse=True)
        (theirs.output(F.relu(bags + hidden)) - targets).square().sum().div(3).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=1e-10)


def test_features_are_words_and_pairs() -> None:
    hasher = Hasher(1 << 30, 100)
    once, cased = hasher("Water stone water."), hasher("water  STONE\nwater .")
    assert np.array_equal(once.buckets, cased.buckets) and np.array_equal(once.weights, cased.weights)
    # water, stone, "." and three pairs; only water is there twice.
    assert len(once.buckets) == 6 and len(set(once.weights.tolist())) == 2
    assert float((once.weights**2).sum()) == pytest.approx(1, abs=1e-6)
    ratio = float(once.weights.max() / once.weights.min())
    assert ratio == pytest.approx(1 + np.log(2), abs=1e-6)
    assert len(Hasher(1 << 30, 100)("水石水").buckets) == 2 + 2  # two letters, two pairs
    assert len(Hasher(1 << 30, 2)("alpha beta gamma").buckets) == 3 and not len(hasher("").buckets)
    assert set(hasher("beta alpha").buckets) != set(hasher("alpha beta").buckets)


def test_few_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", list(planted())[:20] + [{"text": "none"}] * 5)
    assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "a.jsonl", *SMALL) == 2
    assert "20 documents have scores in the metadata, which the classifier is to learn, and 5 have not" in (
        capsys.readouterr().err
    )
    same = [row | {"metadata": {"scores": {"same": 1.0}}} for row in planted()[:200]]
    write(tmp_path / "b.jsonl", same)
    assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "b.jsonl", *SMALL) == 2
    assert "all documents have the same score in same" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def refused(path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], *options: str) -> str:
    write(path / "a.jsonl", rows)
    assert score("--train-classifier", path / "new", "--input", path / "a.jsonl", *options, *SMALL) == 2
    assert not (path / "new").exists()
    return capsys.readouterr().err


def test_scores_of_which_nothing_can_be_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"document {n}" for n in range(100)]
    others = [{"text": text, "scores": {f"d{n}": n}} for n, text in enumerate(texts)]
    assert "no dimension is scored in more than half of 100 scored documents ('d0', the most frequent, in 1)" in (
        refused(tmp_path, others, capsys)
    )
    halves = [{"text": text, "scores": {"ab"[n % 2]: n}} for n, text in enumerate(texts)]
    assert "('a', the most frequent, in 50)" in refused(tmp_path, halves, capsys)
    large = [{"text": text, "scores": {"q": 1e308 * (-1) ** n}} for n, text in enumerate(texts)]
    assert "the scores in q are too large to be learned" in refused(tmp_path, large, capsys)
    copies = [{"text": "same", "scores": {"q": n}} for n in range(100)]
    assert "with copies of a text in one part: give more different texts" in refused(tmp_path, copies, capsys)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([1], r"line 2: the class label is [1], expected text or a whole number"),
        ({"a": 1}, "line 2: the class label is {'a': 1}, expected text"),
        (1.5, "line 2: the class label is 1.5, expected text"),
        ("", "line 2: the class label: '' is not a name: give up to 64 letters"),
        ("a/b", "line 2: the class label: 'a/b' is not a name"),
        ("../a", "line 2: the class label: '../a' is not a name"),
        ("a\nb", "line 2: the class label: 'a\\nb' is not a name"),
    ],
)
def test_a_class_must_be_the_name_of_a_domain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label: Any, message: str
) -> None:
    rows = [{"text": f"document {n}", "label": label if n == 1 else "c"} for n in range(100)]
    assert message in refused(tmp_path, rows, capsys, "--target", "label")


def test_classes_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"document {n}", "label": "c"} for n in range(100)] + [{"text": " "}]
    assert "0 documents have a class in metadata.lable, which the classifier is to learn, and 100 have not" in (
        refused(tmp_path, rows, capsys, "--target", "lable")
    )
    assert "all documents are of the class 'c'" in refused(tmp_path, rows, capsys, "--target", "label")


def test_what_is_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.jsonl", [*planted()[:200], {"text": " "}])
    assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "a.jsonl", *SMALL) == 0
    assert "left out: 1 " in capsys.readouterr().err


def test_scores_that_are_no_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("high", None, True):
        rows = list(planted())[:100] + [
            {"text": "x", "id": "odd", "metadata": {"scores": {"planted": wrong, "length": 1}}}
        ]
        write(tmp_path / "a.jsonl", rows)
        assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "a.jsonl", *SMALL) == 2
        assert f"line 101: the score planted is {wrong!r}, expected a finite number" in capsys.readouterr().err
    text = json.dumps({"text": "x", "metadata": {"scores": {"planted": float("nan"), "length": 1}}})
    write(tmp_path / "a.jsonl", [*list(planted())[:100], text])
    assert score("--train-classifier", tmp_path / "new", "--input", tmp_path / "a.jsonl", *SMALL) == 2
    assert "line 101: the score planted is nan, expected a finite number" in capsys.readouterr().err


def _edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "classifier.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "classifier.json").unlink(), "does not exist: give a folder that"),
        (lambda folder: (folder / "classifier.safetensors").unlink(), "is missing: train"),
        (lambda folder: (folder / "classifier.safetensors").write_bytes(b"x"), "is not the file that classifier.json"),
        (_edited("buckets", 8192), "does not fit classifier.json"),
        (_edited("format", 2), "is not a classifier of format 1"),
        (_edited("names", ["one"]), "does not fit|must be those of"),
        (_edited("hidden", "many"), "hidden = 'many'"),
    ],
)
def test_damaged_classifiers(trained: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=message):
        Classifier.load(tmp_path / "copy")


def test_a_classifier_of_something_else(trained: Path) -> None:
    with pytest.raises(UserError, match=r"predicts scores \(length, planted\), and classes are asked for"):
        open_annotator(DomainSettings(classifier=trained))
