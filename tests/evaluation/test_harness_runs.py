"""Tasks on the checkpoints of a run, which are compared and drawn; the tasks of this package; test texts; wrong input."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf
from qwen_moe.cli import main
from qwen_moe.evaluation.harness import checked
from qwen_moe.runs.task_scores import read
from tests.evaluation.harness_models import CHOICE, documents, model_folder, write_tasks

pytest.importorskip("lm_eval")
RECIPE = """
model: {family: qwen2_moe, vocab_size: 300, hidden_size: 16, intermediate_size: 20, num_hidden_layers: 2,
  num_attention_heads: 4, num_key_value_heads: 2, num_experts: 6, num_experts_per_tok: 2, moe_intermediate_size: 8,
  shared_expert_intermediate_size: 12}
data: {train: [{prefix: data/some}, {prefix: data/more}], sequence_length: 32}
training: {micro_batch_size: 1, global_batch_size: 1, train_tokens: 224}
optimizer: {learning_rate: 0.01}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A run with checkpoints of steps 3 and 7, the model of the latter, and the YAML files of tasks."""
    folder = tmp_path_factory.mktemp("runs")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(f"run_dir: {run}\n{RECIPE}")
    for step, seed in ((3, 5), (7, 6)):
        hf = model_folder(folder / f"model{step}", seed)
        checkpoint = step_directory(run / "checkpoints", step)
        convert_from_hf(hf, checkpoint)
    return run, hf, write_tasks(folder / "tasks")


def evaluate(*options: Any) -> int:
    return main(["evaluate", "tasks", *map(str, options)])


def metrics(path: Path, task: str) -> list[float]:
    return [one["value"] for one in json.loads(path.read_text())["tasks"][task]["metrics"]]


def test_checkpoints_of_a_run_are_compared_and_drawn(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hf, names = world
    assert evaluate("--checkpoint", run, "--tasks", ",".join(names[:2]), "--all-checkpoints") == 0
    said = capsys.readouterr()
    table = said.out.splitlines()
    assert "the run's data were checked against none of the texts of own_choice" in said.err
    assert table[0].split() == ["checkpoint", "own_choice", "acc", "own_text", "bits_per_byte"]
    assert [line.split()[0] for line in table[1:]] == ["step_00000003", "step_00000007"]
    # In place as exported, and a run's default is its newest checkpoint.
    assert evaluate("--checkpoint", hf, "--tasks", ",".join(names[:2]), "--output", tmp_path) == 0
    folder = run / "evaluation" / "tasks"
    for task in ("own_choice", "own_text"):
        found = metrics(folder / "results-step_00000007.json", task)
        assert found == pytest.approx(metrics(tmp_path / "results-hf.json", task), rel=1e-6)
    assert [(point["step"], point["metric"]) for point in read(run)["own_text"]] == [
        (3, "bits_per_byte"),
        (7, "bits_per_byte"),
    ]
    assert read(run)["own_text"][0]["value"] == metrics(folder / "results-step_00000003.json", "own_text")[0]
    before = {path.name for path in folder.glob("results-*")}
    assert evaluate("--checkpoint", run, "--tasks", names[2]) == 0
    assert {path.name for path in folder.glob("results-*")} == before
    assert [len(points) for _, points in sorted(read(run).items())] == [1, 2, 2]


def test_report_shows_tasks(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.runs.test_report import record, write_run

    write_run(tmp_path, [record(1), record(2)])
    folder = tmp_path / "evaluation" / "tasks"
    folder.mkdir(parents=True)
    for step, value in ((1, 0.25), (2, 0.5)):
        score = {"metric": "acc", "filter": "none", "value": value, "stderr": 0.1, "higher_is_better": True}
        results = {"checkpoint": {"step": step}, "tasks": {"arc_easy": {"metrics": [score]}}}
        (folder / f"results-step_{step}.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "arc_easy: acc 0.5000 +- 0.1000 at step 2, 0.2500 at step 1" in said
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")
    (folder / "results-step_3.json").write_text('{"checkpoint": {}}')
    assert main(["report", str(tmp_path)]) == 2
    assert "results-step_3.json is damaged" in capsys.readouterr().err


def test_tasks_that_need_no_download(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = model_folder(tmp_path / "model", max_position_embeddings=512)
    names = "python_library,sort_letters,add_numbers,reverse_letters,subtract_numbers"
    options = ("--limit", "4", "--num-fewshot", "1", "--json")
    assert evaluate("--checkpoint", hf, "--tasks", names, "--output", tmp_path, *options) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    own = {"pydoc_cloze", "python_next_line", "python_text", "sort_letters", "reverse_letters", "add_numbers"}
    assert own <= set(tasks) and all(tasks[name]["samples"] == 4 and tasks[name]["limit"] == 4 for name in own)
    assert tasks["pydoc_cloze"]["of"] == 300 and tasks["sort_letters"]["num_fewshot"] == 1


def test_shipped_documents_are_sound() -> None:
    from qwen_moe.data.tasks import is_held_out
    from qwen_moe.evaluation.harness.local import documents as local

    for make in (local.pydoc_cloze, local.python_next_line):
        rows = make(50)["test"]
        assert len(rows) == 50 and rows[:] == make(50)["test"][:]
        assert {row["answer"] for row in rows} == {0, 1, 2, 3}
        assert all(len(set(row["choices"])) == 4 and row["text"].strip() for row in rows)
    cloze = local.pydoc_cloze()["test"][0]
    source = " ".join(" ".join(local._sources()).split())
    assert f"{cloze['text']} {cloze['choices'][cloze['answer']]}" in source
    splits = local.computed("sort", 20)
    assert all(is_held_out(row["prompt"]) for row in splits["test"])
    assert not any(is_held_out(row["prompt"]) for row in splits["train"])


def test_test_texts_are_written_without_a_model(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, names = world
    assert evaluate("--tasks", ",".join(names), "--export-tests", tmp_path / "tests") == 0
    rows = documents()
    read_lines = lambda name: [json.loads(line) for line in (tmp_path / "tests" / name).read_text().splitlines()]  # noqa: E731
    expected = [f"{row['text']} {row['choices'][row['answer']]}" for row in rows]
    assert [row["text"] for row in read_lines("own_choice.jsonl")] == expected
    assert [row["text"] for row in read_lines("own_answer.jsonl")] == expected
    assert [row["text"] for row in read_lines("own_text.jsonl")] == [row["text"] for row in rows]
    assert "--checkpoint is missing" in failed(capsys, "--tasks", names[0])


def failed(capsys: pytest.CaptureFixture[str], *options: Any) -> str:
    capsys.readouterr()
    assert evaluate(*options) == 2
    return capsys.readouterr().err


def test_one_message_for_tasks_that_are_not_there(
    world: tuple[Path, Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, hf, names = world
    at = ("--checkpoint", hf, "--output", tmp_path / "out")
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager  # without the thousands of files of the harness
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **given: manager(**given | {"include_defaults": False}))
    assert "no such task: did you mean pydoc_cloze" in failed(capsys, *at, "--tasks", "pydoc_clze")
    assert "gone.yaml does not exist" in failed(capsys, *at, "--tasks", "gone.yaml")
    assert "is not a folder" in failed(capsys, *at, "--tasks", "pydoc_cloze", "--include", tmp_path / "no")
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\ndataset_path: [\n")
    assert "broken.yaml cannot be loaded" in failed(capsys, *at, "--tasks", broken)
    broken.write_text(Path(names[0]).read_text().replace("doc_to_target: answer", 'doc_to_target: "{{nothing.here}}"'))
    assert "broken.yaml cannot be loaded" in failed(capsys, *at, "--tasks", broken)
    broken.write_text(Path(names[1]).read_text().replace("bits_per_byte", "bits_per_byte, aggregation: nothing"))
    assert "cannot evaluate own_text: " in failed(capsys, *at, "--tasks", broken)
    broken.write_text(Path(names[0]).read_text().replace("metric: acc,", "metric: accuracyy,"))
    assert "own_choice asks for the metric accuracyy, which" in failed(capsys, *at, "--tasks", broken)
    copy = Path(names[0]).with_name("copy.yaml")
    copy.write_text(Path(names[0]).read_text())
    assert "asks for own_choice twice" in failed(capsys, *at, "--tasks", f"{names[0]},{copy}")


def test_a_task_of_the_hub_says_what_to_download(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, hf, _ = world
    path = tmp_path / "hub.yaml"
    path.write_text(
        "task: hub\ndataset_path: nobody/such_set\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
        "doc_to_choice: c\ndoc_to_target: a\n"
    )
    said = failed(capsys, "--checkpoint", hf, "--tasks", "hub", "--include", tmp_path, "--output", tmp_path / "out")
    assert "needs the data set nobody/such_set, which is not on this machine" in said
    assert "hf download --repo-type dataset nobody/such_set" in said and said.count("\n") <= 2


def test_requests_that_the_model_cannot_answer(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, hf, names = world
    at = ("--checkpoint", hf, "--output", tmp_path / "out")
    assert "new tokens, and the model reads 48" in failed(
        capsys, *at, "--tasks", names[2], "--gen-kwargs", "max_gen_toks=48"
    )
    assert "give a text or a list of texts" in failed(capsys, *at, "--tasks", names[2], "--gen-kwargs", "until=3")
    assert '{"num_beams": 4}' in failed(capsys, *at, "--tasks", names[2], "--gen-kwargs", "num_beams=4")
    assert "longer than the model's reach of 48" in failed(capsys, *at, "--tasks", names[0], "--max-length", "49")
    assert "a continuation has" in failed(capsys, *at, "--tasks", names[0], "--max-length", "2")
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}
    scaled = model_folder(tmp_path / "scaled", rope_scaling=scaling)  # no second extension helps it
    assert "reach of 48 tokens: shorten them, or change model.rope_scaling in the model's config" in failed(
        capsys, "--checkpoint", scaled, "--output", tmp_path / "out", "--tasks", names[0], "--max-length", "49"
    )
    small = model_folder(tmp_path / "small", vocab_size=200)
    assert "vocabulary has 200" in failed(
        capsys, "--checkpoint", small, "--tasks", names[0], "--output", tmp_path / "small"
    )
    assert "all-checkpoints" in failed(capsys, *at, "--tasks", names[0], "--all-checkpoints")


def test_a_metric_that_is_not_computed_is_named(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The harness leaves it out without a word."""
    _, hf, names = world
    task = Path(names[0]).with_name("odd.yaml")
    text = Path(names[0]).read_text().replace("own_choice", "odd")
    task.write_text(text.replace("metric_list: [", "metric_list: [{metric: word_perplexity}, "))
    assert evaluate("--checkpoint", hf, "--output", tmp_path / "out", "--tasks", task) == 0
    assert "odd has no word_perplexity, because the harness does not" in capsys.readouterr().err


def test_right_answers_that_are_no_choice_are_counted(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The harness counts them as wrong without a word. Of a run, their texts are also compared with its data."""
    run, _, _ = world
    rows = [row | {"answer": answer} for row, answer in zip(documents(), (0, 4, -1, 1))]
    answers = [{**rows[0], "answer": [2, 1]}, {**rows[1], "answer": [9]}]
    several = [one | {"text": f"{one['text']} once"} for one in answers]
    for name, some in (("one", rows), ("several", several)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
        (tmp_path / f"{name}.yaml").write_text(CHOICE.format(name=name, rows=path))
    names = f"{tmp_path}/one.yaml,{tmp_path}/several.yaml"
    assert evaluate("--checkpoint", run, "--tasks", names, "--output", tmp_path, "--export-tests", tmp_path / "t") == 0
    said = capsys.readouterr().err
    assert "in 2 of 4 documents of one the right answer is none of the choices (document 2: 4 of 4 choices)" in said
    assert "in 1 of 2 documents of several the right answer is none of the choices (document 2: [9] of" in said
    texts = [json.loads(line)["text"] for line in (tmp_path / "t" / "several.jsonl").read_text().splitlines()]
    assert texts == [f"{several[0]['text']} x", several[1]["text"]]


def test_examples_from_the_asked_documents_are_named(
    world: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a word, the harness puts the asked document with its answer among the examples."""
    _, hf, names = world
    options = ("--num-fewshot", 5, "--limit", 8, "--output", tmp_path)
    assert evaluate("--checkpoint", hf, "--tasks", f"{names[0]},{names[2]}", *options) == 0
    said = capsys.readouterr().err
    assert "the examples of own_choice come from the documents that are asked" in said and "own_answer come" not in said
    for task, there in (("own_choice", True), ("own_answer", False)):
        (path,) = tmp_path.rglob(f"{task}.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parts = [row["arguments"][0][0].split("\n\n") for row in rows]
        assert any(part.startswith(some[-1]) for some in parts for part in some[:-1]) == there


def test_the_data_of_a_run_are_known(world: tuple[Path, Path, list[str]]) -> None:
    run, _, _ = world
    assert checked.prefixes_of(run) == [Path("data/some"), Path("data/more")]
    assert checked.prefixes_of(run / "checkpoints") == []
    assert checked.share_of_texts([], ["a test"]) is None
    assert checked.warning("arc", 1.0) == "" == checked.warning("arc", None)
    assert "none of the texts of arc" in checked.warning("arc", 0.0)
    assert "checked against 50% of the texts of arc" in checked.warning("arc", 0.5)


def test_the_share_of_texts_that_data_were_checked_against(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of several data counts."""
    from qwen_moe.data import checked as record
    from qwen_moe.data.words import hash_of

    texts = ["the first test", "the second test", "a third one", "a fourth one"]
    known = {Path("all"): texts, Path("some"): texts[:3]}
    monkeypatch.setattr(
        record,
        "read_manifest",
        lambda prefix: SimpleNamespace(decontaminated={"tests": [hash_of(text) for text in known[prefix]]}),
    )
    assert checked.share_of_texts([Path("all")], texts) == 1
    assert checked.share_of_texts([Path("all"), Path("some")], iter(texts)) == 0.75
