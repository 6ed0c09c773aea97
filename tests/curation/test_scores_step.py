"""Scores and domains as steps of datatrove pipelines, and what their settings refuse."""

import functools
import json
from pathlib import Path
from typing import Any

import dill
import pytest
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from pydantic import ValidationError

from qwen_moe.curation.scores import annotate
from qwen_moe.curation.scores.annotate import open_annotator
from qwen_moe.curation.scores.domains import DomainStep
from qwen_moe.curation.scores.settings import DomainSettings, ScoreSettings
from qwen_moe.curation.scores.step import ScoreStep
from qwen_moe.errors import UserError
from qwen_moe.generation import session as session_module
from tests.curation.scoring import document, read, score, write

RULES: dict[str, Any] = {
    "rules": [
        {"domain": "code", "path": r"\.py$"},
        {"domain": "german", "metadata": {"language": "^de"}, "text": "stone"},
        {"domain": "stones", "text": r"\bstone\b"},
    ]
}


def documents(count: int) -> list[Document]:
    return [Document(**document(number)) for number in range(count)]


def take(folder: Path, data: Any, rank: int = 0, world_size: int = 1) -> Any:
    """The documents of a task."""
    for line in (folder / f"{rank}.jsonl").read_text().splitlines():
        yield Document(**json.loads(line))


def keep(folder: Path, data: Any, rank: int = 0, world_size: int = 1) -> Any:
    """Write them. (datatrove's own readers and writers of JSON lines need orjson.)"""
    write(folder / f"{rank}.jsonl", [{"text": one.text, "id": one.id, "metadata": one.metadata} for one in data])
    yield from ()


def test_a_step_scores_blocks_and_keeps_every_document(scorer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ScoreSettings(
        scorer=scorer, dimensions=("quality",), document_tokens=100, batch_documents=4, dtype="fp64"
    )
    opened: list[Path] = []
    original = session_module.Session

    def counted(given: Any, split: bool) -> Any:
        opened.append(given.checkpoint)
        return original(given, split)

    monkeypatch.setattr(session_module, "Session", counted)
    annotate.open_cached.cache_clear()
    annotate.open_model.cache_clear()
    step = ScoreStep(settings)
    found = list(step.run(iter(documents(10)), 0, 1))
    annotate.open_model.cache_clear()
    expected = open_annotator(settings).annotate(documents(10))
    assert [one.id for one in found] == [f"d{n}" for n in range(10)]
    for one, row in zip(found, expected, strict=True):
        assert one.metadata["scores"] == pytest.approx(row["scores"], abs=1e-12)
    # Another task of this process, and another step with the same model, share it.
    domains = DomainSettings(model=scorer, domains={"a": "", "b": ""}, document_tokens=50, dtype="fp64")
    both = DomainStep(domains).run(ScoreStep(settings).run(iter(documents(9)), 1, 2), 1, 2)
    assert [one.metadata["domain"] in ("a", "b") for one in both] == [True] * 9
    assert opened == [scorer, scorer]  # the second is what is compared with
    assert step.stats["documents"].total == 10


def test_documents_pass_in_order_before_the_input_ends(scorer: Path) -> None:
    """A block is handed on before the next is read: nothing is collected."""
    taken: list[str] = []

    def source() -> Any:
        for one in documents(9):
            taken.append(one.id)
            yield one

    found = DomainStep(DomainSettings(rules=RULES["rules"], batch_documents=3)).run(source())
    next(found)
    assert len(taken) == 3


def test_in_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The executor's tasks, in this process; to others, steps travel as dill writes them."""
    module = f"own_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text("def length(text, metadata):\n    return len(text)\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for part in range(2):
        write(tmp_path / "in" / f"{part}.jsonl", [document(number) for number in range(part * 5, part * 5 + 5)])
    steps = [ScoreStep(ScoreSettings(scorer=f"{module}:length")), DomainStep(DomainSettings(**RULES, otherwise="rest"))]
    pipeline = [
        functools.partial(take, tmp_path / "in"),
        *dill.loads(dill.dumps(steps)),
        functools.partial(keep, tmp_path / "out"),
    ]
    LocalPipelineExecutor(pipeline, tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
    rows = read(tmp_path / "out")
    assert len(rows) == 10
    for row in rows:
        assert row["metadata"]["scores"] == {"length": len(row["text"])}
        stone, german = "stone" in row["text"], row["metadata"].get("language") == "de"
        assert row["metadata"]["domain"] == ("german" if stone and german else "stones" if stone else "rest")


def test_rules() -> None:
    given = [
        Document("stone", "1", metadata={"file_path": "a/b.py"}),
        Document("stone", "x.py", metadata={"domain": "kept"}),
        Document("water", "2", metadata={"domain": "kept"}),
        Document("stones", "3"),
        Document("millstone", "4", metadata={"language": "deu"}),
    ]
    found = list(DomainStep(DomainSettings(**RULES)).run(iter(given)))
    assert [one.metadata.get("domain") for one in found] == ["code", "code", "kept", None, "german"]


@pytest.mark.parametrize("on_failure", ["error", "skip"])
def test_a_function_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_failure: str) -> None:
    module = f"own_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text("def f(text, metadata):\n    return float(text)\n")
    monkeypatch.chdir(tmp_path)
    step = ScoreStep(ScoreSettings(scorer=f"{module}:f", on_failure=on_failure))
    given = [Document("1.5", "a"), Document("x", "b"), Document("2", "c", metadata={"score_error": "before"})]
    if on_failure == "error":
        with pytest.raises(UserError, match=rf"1 of 3 documents failed, the first that of b: .*{module}.py, line 2"):
            list(step.run(iter(given)))
        return
    found = list(step.run(iter(given)))
    assert [one.metadata.get("scores") for one in found] == [{"f": 1.5}, None, {"f": 2.0}]
    assert ["score_error" in one.metadata for one in found] == [False, True, False]
    assert step.stats["failed"].total == 1 and step.stats["documents"].total == 3


def test_domains_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [document(number) for number in range(10)])
    (tmp_path / "domains.yaml").write_text(json.dumps(RULES | {"otherwise": "rest"}))
    assert score("--input", "in.jsonl", "--domains", "domains.yaml", "--output", "out") == 0
    found = [row["metadata"]["domain"] for row in read(tmp_path / "out")]
    assert set(found) == {"german", "stones", "rest"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["domains"] == {name: found.count(name) for name in sorted(set(found))}
    assert f"german {found.count('german')} ({found.count('german') / 10:.1%})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "domains come from nothing: give one of rules, classifier, model"),
        (RULES | {"classifier": "x"}, "domains come from rules and classifier"),
        ({"model": "x", "domains": {"one": ""}}, "give at least two"),
        ({"rules": [{"domain": "a/b", "text": "x"}]}, "'a/b' is not a name"),
        ({"rules": [{"domain": "a"}]}, "the rule of domain a has no condition"),
        ({"rules": [{"domain": "a", "text": "("}]}, r"'\(' is not a regular expression"),
        ({"classifier": "x", "otherwise": "a"}, "otherwise is for rules"),
        (RULES | {"domains": {"a": "", "b": ""}}, "domains are what a model chooses among"),
    ],
)
def test_domain_settings_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DomainSettings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scorer": ""}, "at least 1 character"),
        ({"scorer": "hf", "dimensions": ("fun",)}, "dimension 'fun' is not known: give one of educational"),
        ({"scorer": "hf", "dimensions": ("quality", "quality")}, "name each once"),
        ({"scorer": "hf", "prompts": {"fun": " "}}, "the prompt of fun is empty"),
        ({"scorer": "hf", "prompts": {"fun": {}}}, "the prompt of fun is empty"),
        ({"scorer": "a:b", "dimensions": ("quality",)}, "has dimensions of its own"),
        ({"scorer": "hf", "document_tokens": 0}, "greater than 0"),
        ({"scorer": "hf", "unknown": 1}, "Extra inputs"),
    ],
)
def test_score_settings_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScoreSettings(**values)
