"""Steps of other modules, by the contract that they have with a recipe; synthetic texts; Slurm's scripts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("datatrove")
pytest.importorskip("pyarrow")

from qwen_moe.curation.names import STEPS
from qwen_moe.curation.recipe import SynthesiseSection
from qwen_moe.curation.synthesise import check, queries
from qwen_moe.errors import UserError
from tests.curation.curations import curate, documents, recipe, write_corpus


def length(text: str, metadata: dict[str, Any]) -> dict[str, float]:
    """A score for the tests."""
    return {"length": len(text) / 100}


SECTIONS: dict[str, Any] = {
    "scores": {"scorer": f"{__name__}:length", "minimum": {"length": 6.5}, "workers": 1},
    "domains": {"rules": [{"domain": "number7", "text": "(?i)number7"}], "otherwise": "rest"},
    "decontamination": {"against": ["test.jsonl"]},
    "filters": None,
    "weights": None,
}


def test_scores_domains_and_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    read = json.loads((tmp_path / "corpus/prose.jsonl").read_text().splitlines()[0])["text"]
    Path("test.jsonl").write_text(json.dumps({"text": read[40:240]}) + "\n")
    path = recipe(tmp_path, **SECTIONS)
    assert curate(path) == 0
    run = tmp_path / "run"
    facts = {one["step"]: one for one in json.loads((run / "curate.json").read_text())["steps"]}
    scored = documents(run / "3-scores")
    assert all(row["metadata"]["scores"]["length"] == len(row["text"]) / 100 for row in scored)
    assert all(len(row["text"]) >= 650 for row in documents(run / "3-scores/kept"))
    assert facts["scores"]["dropped"]["minimum_score"]["low_length"] == len(documents(run / "3-scores/dropped")) > 0
    assert set(facts["domains"]["by_domain"]) <= {"number7", "rest"}
    assert facts["decontamination"]["dropped"] == {"leaks": {"leak": 1}}
    assert (run / "8-prepare/rest.bin").exists()
    capsys.readouterr()
    assert curate(path, "--why", f"{tmp_path}/corpus/prose.jsonl:1") == 0
    why = capsys.readouterr().out
    assert "scores:           kept, scores length" in why
    assert re.search(
        r"decontamination:  dropped by leaks: leak; \d+ of \d+ tokens in common with test.jsonl, line 1: ", why
    )
    Path("test.jsonl").write_text(json.dumps({"text": "another test " * 10}) + "\n")
    assert curate(path) == 2
    assert "test.jsonl has changed" in capsys.readouterr().err


def test_settings_of_other_modules_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    Path("test.jsonl").write_text("")
    path = recipe(tmp_path, **{**SECTIONS, "scores": {"scorr": "length"}})
    assert curate(path) == 2
    message = capsys.readouterr().err
    assert "unknown key 'scores.scorr'; did you mean 'scorer'?" in message and "'scores.scorer' is missing" in message
    assert "test set test.jsonl is empty" in message
    assert not (tmp_path / "run/1-read").exists()


SYNTHETIC: dict[str, Any] = {
    "templates": ["{a} and {b}", "only {a}"],
    "fields": {"a": ["x", "y"], "b": ["1", "2", "3"]},
    "rewards": ["format:."],
    "row": {"answer": "{a}"},
}


def test_prompts_are_all_combinations_or_some_by_seed(tmp_path: Path) -> None:
    section = SynthesiseSection(checkpoint=tmp_path, **SYNTHETIC)
    rows = queries(section)
    assert [row["prompt"] for row in rows] == [
        "x and 1", "x and 2", "x and 3", "y and 1", "y and 2", "y and 3", "only x", "only y"
    ]  # fmt: skip
    assert [row["answer"] for row in rows[5:]] == ["y", "x", "y"]
    some = [
        [row["prompt"] for row in queries(section.model_copy(update={"prompts": 3, "seed": seed}))]
        for seed in (0, 0, 1)
    ]
    assert len(some[0]) == 3 and some[0] == some[1] != some[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": ["{c}"]}, "no values for the field c"),
        ({"fields": {"a": ["x"], "b": ["1"], "d": ["2"]}}, "no template has the field d"),
        ({"templates": ["{a"]}, "expected '}' before end of string"),
        ({"text": "{answer}"}, "text has the field answer"),
    ],
)
def test_templates_that_cannot_be_filled(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        check(SynthesiseSection(checkpoint=tmp_path, **{**SYNTHETIC, **changes}))


def test_a_model_writes_texts_and_rewards_select_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from qwen_moe.checkpoint.huggingface.convert import save_pretrained
    from tests.models.hf_reference import draw_weights
    from tests.rollout.conftest import tokenizer
    from tests.small import small_model

    model = draw_weights(small_model(max_position_embeddings=64), 4, torch.float32)
    save_pretrained(model, tmp_path / "hf", tokenizer=tokenizer())
    section = {
        "checkpoint": str(tmp_path / "hf"), "templates": ["{word} is "], "fields": {"word": list("abcdefgh")},
        "rewards": ["format:[aeiou]"], "samples": 4, "max_new_tokens": 12, "text": "{prompt}{completion}",
    }  # fmt: skip
    path = recipe(tmp_path, input=None, synthesise=section, filters=None, deduplication=None, weights=None,
                  prepare={"train_tokenizer": True, "vocab_size": 278})  # fmt: skip
    assert curate(path) == 0
    kept = documents(tmp_path / "run/1-read/kept")
    rejected = [json.loads(line) for line in (tmp_path / "run/0-synthesise/rejected.jsonl").read_text().splitlines()]
    assert len(kept) + len(rejected) == 32 and kept and rejected
    for row in kept:
        prompt = f"{row['metadata']['fields']['word']} is "
        assert row["text"].startswith(prompt) and set(row["text"][len(prompt) :]) & set("aeiou")
        assert row["metadata"]["domain"] == "synthetic"
    reasons = {row["metadata"]["filter_reason"] for row in rejected}
    assert reasons <= {"low_reward", "truncated", "empty"}
    capsys.readouterr()
    assert curate(path, "--why", rejected[0]["id"]) == 0
    assert "synthesise:       dropped by synthesise: " in capsys.readouterr().out


SLURM = {"time": "0:10:00", "partition": "cpu", "mem_per_cpu_gb": 1, "poll_seconds": 0.1}


def test_a_dry_run_writes_the_script_that_the_library_would_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against what sbatch gets from the library's own `launch_job`."""
    write_corpus(tmp_path / "corpus")
    path = recipe(tmp_path, slurm={**SLURM, "workers": 2, "sbatch_args": {"account": "me"}})
    assert curate(path, "--dry-run") == 0
    script = Path(capsys.readouterr().out.strip())
    text = script.read_text()
    for line in ("--partition=cpu", "--time=0:10:00", "--array=0-2%2", "--account=me", "--mem-per-cpu=1G"):
        assert f"#SBATCH {line}\n" in text
    assert f"export PATH={Path(sys.executable).parent}" in text and "launch_pickled_pipeline" in text

    given = []

    def sbatch(arguments: list[str], **_: Any) -> bytes:
        given.append(Path(arguments[-1]).read_text())
        return b"Submitted batch job 7\n"

    import datatrove.executor.slurm

    monkeypatch.setattr(datatrove.executor.slurm.subprocess, "check_output", sbatch)
    monkeypatch.setattr("qwen_moe.curation.execute._queued", lambda job: False)
    assert curate(path) == 2  # nothing runs the tasks
    message = capsys.readouterr().err
    assert "job 7 ended with 3 of 3 tasks undone" in message and "run the same command again" in message
    assert given[0] == text


def test_a_stopped_command_waits_for_the_job_that_it_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path / "corpus")
    path = recipe(tmp_path, slurm=SLURM, filters=None, deduplication=None, weights=None)
    log = tmp_path / "run/1-read/log/read"
    submitted: list[int] = []

    def launch(executor: Any) -> None:
        executor.job_id = "7"
        submitted.append(1)

    monkeypatch.setattr("datatrove.executor.slurm.SlurmPipelineExecutor.launch_job", launch)

    def interrupted(job: str) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_moe.curation.execute._queued", interrupted)
    assert curate(path) == 130
    assert json.loads((log / "job.json").read_text()) == {"job": "7"} and len(submitted) == 1

    asked: list[str] = []

    def runs(job: str) -> bool:
        """The job ends when it is asked for the third time."""
        asked.append(job)
        if len(asked) == 3:
            for rank in range(3):
                (log / "completions").mkdir(exist_ok=True)
                (log / f"completions/{rank:05d}").touch()
        return True

    monkeypatch.setattr("qwen_moe.curation.execute._queued", runs)
    assert curate(path, "--until", "read") == 2  # the stand-in has written nothing
    assert "no input has a document" in capsys.readouterr().err
    assert len(submitted) == 1 and asked == ["7"] * 3


def test_what_squeue_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen_moe.curation.execute import _queued

    def says(code: int, out: str, err: str) -> None:
        done = subprocess.CompletedProcess(["squeue"], code, out, err)
        monkeypatch.setattr("qwen_moe.curation.execute.subprocess.run", lambda *_, **__: done)

    for code, out, err, expected in (
        (0, "RUNNING\nPENDING\n", "", True),
        (0, "", "", False),
        (1, "", "slurm_load_jobs error: Invalid job id specified", False),
        (1, "", "Unable to contact slurm controller", True),
    ):
        says(code, out, err)
        assert _queued("7") is expected


def test_the_demo_s_recipe_is_valid() -> None:
    from qwen_moe.curation.recipe import load_curation

    config = load_curation(Path("curate_demo"))
    assert config.steps == STEPS[1:], "the demo has every step but synthetic texts, which need a model"
    assert yaml.safe_load((Path(__file__).parents[2] / "recipes/curate_demo.yaml").read_text())
