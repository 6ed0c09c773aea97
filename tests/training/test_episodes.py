"""Learning from one's own samples: the same answers, rewards and steps in every layout, and nothing without a signal."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen_moe.config import parse_config
from qwen_moe.data.chat_tokenizer import trained_chat_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.runs.records import read_lines
from qwen_moe.training.episode_files import EpisodeFiles
from qwen_moe.training.queries import _read
from qwen_moe.training.reference import LOAD_FROM, MODELS, keep_or_compare
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.small import model_values
from tests.training.commands import command, run_to_end

LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_chat_tokenizer(("tasks:sort:60",), 288, tmp_path_factory.mktemp("tokenizer") / "data")


def values(tokenizer: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "run_dir": str(run_dir),
        "objective": {"kind": "grpo", "policy": {"clip_high": 0.3}},
        "model": model_values("qwen2_moe", vocab_size=288, max_position_embeddings=LENGTH),
        "data": {"tokenizer": str(tokenizer), "sequence_length": LENGTH},
        "rollout": {
            "queries": ["tasks:sort:24"],
            "rewards": ["format:[aeiou]"],
            "episodes": 2,
            "queries_per_episode": 8,
            "samples": 4,
            "max_new_tokens": 6,
            "batch": 16,
        },
        "training": {"micro_batch_size": 1, "global_batch_size": 24, "validation_interval": 0},
        "optimizer": {"learning_rate": 1e-2, "eps": 1e-5},
        "balance": {"scope": "sequence", "coefficient": 0.01, "z_loss_coefficient": 0.001},
        "precision": {"compute": "fp64", "master": "fp64", "compile": "never"},
        "checkpoint": {"export_hf": False},
    }
    for section, more in changes.items():
        recipe[section] = {**recipe.get(section, {}), **more}
    return recipe


def learn(recipe: dict[str, Any], degrees: dict[str, int], steps: int) -> list[dict[str, Any]]:
    """Take ``steps`` steps in this process of a group; figures of each, and what was sampled."""
    import torch.distributed as dist

    from qwen_moe.sharding.build import build_model, make_grids
    from qwen_moe.sharding.layout import run_layout
    from qwen_moe.training.episodes import Episodes
    from qwen_moe.training.optimizer import build_optimizer
    from qwen_moe.training.queries import open_queries
    from qwen_moe.training.reference import weights_hash
    from qwen_moe.training.restore import load_start
    from qwen_moe.training.step import Trainer

    config = parse_config(recipe | {"parallel": {**recipe.get("parallel", {}), **degrees}}, "test")
    device = torch.device("cpu")
    layout = run_layout(config, dist.get_world_size())
    grids = make_grids(config, layout, device)
    model = build_model(config, layout, grids, device)
    trainer = Trainer(config, layout, model, build_optimizer(model, config.optimizer), device)
    load_start(config, model, lambda text: None)
    said: list[str] = []
    episodes = Episodes(config, trainer, open_queries(config, grids.dp), said.append)
    found = []
    for step in range(steps):
        batches = episodes.micro_batches(step)
        result = trainer.step(step, batches)
        responses, experts = EpisodeFiles(config.run_dir, step // config.rollout.updates_per_episode).responses()
        found.append(
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "count": result.count,
                "tokens": [one.tokens.tolist() for one in responses],
                "experts": None if experts is None else [taken.tolist() for taken in experts],
                "weights": weights_hash(trainer),
                "tokens learned": episodes.tokens,
                "said": list(said),
            }
            | result.metrics
            | episodes.facts()
        )
    episodes.close()
    return found


LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "dp 2, ep 2": ({"ep": 2}, 2),
    "tp 2": ({"tp": 2}, 2),
    "pp 2": ({"pp": 2}, 2),
    "cp 2": ({"cp": 2}, 2),
    "cp 2, ep 2": ({"cp": 2, "ep": 2}, 2),
    "tp 2, dp 2, ep 4": ({"tp": 2, "ep": 2}, 4),
}
TIMED = ("sampling_seconds", "preparing_seconds", "weights")


@pytest.fixture(scope="module")
def alone(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    (found,) = run_distributed(learn, 1, values(tokenizer, tmp_path_factory.mktemp("alone")), {}, 2)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_samples_and_learns_what_one_process_does(
    name: str, tokenizer: Path, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    degrees, processes = LAYOUTS[name]
    for found in run_distributed(learn, processes, values(tokenizer, tmp_path), degrees, 2):
        for here, there in zip(found, alone, strict=True):
            assert here["tokens"] == there["tokens"] and here["experts"] == there["experts"]
            for key in set(there) - {*TIMED, "tokens", "experts"}:
                assert here[key] == pytest.approx(there[key], rel=1e-10, abs=1e-10), key
    of_queries = [json.loads(path.read_text())["answers"] for path in tmp_path.rglob("part_*.json")]
    shared_by = processes // degrees.get("tp", 1) // degrees.get("pp", 1)  # dp and cp ranks
    episodes = {path.parent for path in tmp_path.rglob("part_*.json")}
    assert len(of_queries) == shared_by * len(episodes) and all(of_queries)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_stages_of_a_rank_sample_in_their_order(schedule: str, tokenizer: Path, tmp_path: Path) -> None:
    """A rank holds every other stage, or the first and the last; the head is on another rank each time."""
    needs(schedule)
    model = model_values("qwen2_moe", vocab_size=288, max_position_embeddings=LENGTH, num_hidden_layers=4)
    changes = {"model": model, "training": {"global_batch_size": 32}}
    (alone,) = run_distributed(learn, 1, values(tokenizer, tmp_path / "alone", **changes), {}, 1)
    recipe = values(tokenizer, tmp_path / "split", parallel={"schedule": schedule}, **changes)
    for found in run_distributed(learn, 2, recipe, {"pp": 2}, 1):
        for here, there in zip(found, alone, strict=True):
            assert here["tokens"] == there["tokens"] and here["experts"] == there["experts"]
            for key in set(there) - {*TIMED, "tokens", "experts"}:
                assert here[key] == pytest.approx(there[key], rel=1e-10, abs=1e-10), key


def test_the_first_update_has_a_ratio_of_1_and_uses_what_differs(alone: list[dict[str, Any]]) -> None:
    for one in alone:
        assert one["ratio_max"] == 1.0 and one["clip_share"] == one["kl_to_old"] == 0.0
        assert one["sampler_gap_max"] < 1e-12 and 0 < one["used_answers"] <= 1
        assert one["used_answers"] == 1 - one["flat_groups"]
    assert alone[0]["weights"] != alone[1]["weights"]
    assert alone[0]["tokens"] != alone[1]["tokens"]


def test_rewards_that_are_all_equal_change_nothing_to_the_bit(tokenizer: Path, tmp_path: Path) -> None:
    recipe = values(tokenizer, tmp_path, rollout={"rewards": ["format:^"]})
    (found,) = run_distributed(learn, 1, recipe, {}, 2)
    assert [one["count"] for one in found] == [0, 0] and found[0]["flat_groups"] == 1
    assert found[0]["weights"] == found[1]["weights"]
    assert [one["tokens learned"] for one in found] == [1, 1]  # `report` divides by speeds


def test_several_updates_an_episode_leave_the_old_policy_behind(tokenizer: Path, tmp_path: Path) -> None:
    recipe = values(tokenizer, tmp_path, rollout={"updates_per_episode": 2})
    (found,) = run_distributed(learn, 1, recipe, {}, 2)
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["ratio_max"] == 1.0 and found[1]["ratio_max"] > 1.0 and found[1]["kl_to_old"] > 0


def write(tokenizer: Path, folder: Path, name: str) -> Path:
    recipe = values(
        tokenizer,
        folder / name,
        rollout={
            "episodes": 6,
            "queries_per_episode": 16,
            "held_out": ["tasks:sort:16:heldout"],
            "held_out_interval": 2,
        },
        training={"global_batch_size": 48},
        checkpoint={"interval": 2},
        precision={"compute": "fp32", "master": "fp32"},
        launch={"nproc": 2},
    )
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    timed = ("time", "seconds", "per_second", "share_of_peak", "memory_bytes")
    lines = [json.loads(json.dumps(line)) for line in read_lines(folder / "metrics.jsonl")]
    return [{key: value for key, value in line.items() if not any(part in key for part in timed)} for line in lines]


@pytest.fixture(scope="module")
def whole(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    result = run_to_end(write(tokenizer, folder, "whole"))
    assert result.returncode == 0, result.stderr
    return folder / "whole"


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(tokenizer: Path, tmp_path: Path, whole: Path) -> None:
    killed = write(tokenizer, tmp_path, "killed")
    for episode in (1, 4):  # in the middle of an episode: its samples are there, its rewards may not be
        process = subprocess.Popen(command(killed), start_new_session=True, stderr=subprocess.DEVNULL)
        begun = tmp_path / "killed" / "episodes" / f"episode_{episode:06d}" / "samples.json"
        limit = time.monotonic() + 200
        while not begun.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = run_to_end(killed)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "killed") == records(whole)
    said = (whole / "episodes" / "episode_000003" / "samples.jsonl").read_text()
    assert said == (tmp_path / "killed" / "episodes" / "episode_000003" / "samples.jsonl").read_text()


def test_the_divergence_is_from_the_model_that_the_run_began_with(tokenizer: Path, tmp_path: Path, whole: Path) -> None:
    policy = {"kl": "rho_k3", "kl_coefficient": 0.05}
    changes = {"objective": {"policy": policy}, "rollout": {"replay": False}, "checkpoint": {"load_from": str(whole)}}
    found = {
        name: run_distributed(learn, processes, values(tokenizer, tmp_path / name, **changes), degrees, 2)[0]
        for name, degrees, processes in (("alone", {}, 1), ("split", {"tp": 2}, 2))
    }
    first, second = found["alone"]
    assert first["kl"] == 0.0 < second["kl"]
    for here, there in zip(found["split"], found["alone"], strict=True):
        assert [here[key] for key in ("loss", "kl", "grad_norm")] == pytest.approx(
            [there[key] for key in ("loss", "kl", "grad_norm")], rel=1e-10, abs=1e-10
        )


def test_damaged_samples_are_made_again_or_refused(tokenizer: Path, tmp_path: Path) -> None:
    """Before an update has learned from them they are made again; afterwards that would be from other weights."""
    recipe = values(tokenizer, tmp_path, rollout={"updates_per_episode": 2})
    (expected,) = run_distributed(learn, 1, recipe, {}, 2)
    (folder,) = (tmp_path / "episodes").iterdir()
    weights, made_by = (EpisodeFiles(tmp_path, 0).facts[name] for name in ("weights", "made_by"))
    files = EpisodeFiles(tmp_path, 0, made_by.removeprefix(f"{weights} "))
    for name in ("part_0.tokens.npy", "part_0.log_probs.npy", "samples.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        assert not files.has_samples(weights)
        with pytest.raises(UserError, match="is gone or damaged, and an update has learned"):
            files.has_samples(None)
        (folder / name).write_bytes(content)
    assert files.has_samples(weights) and files.has_samples(None)
    old = folder / "old_log_probs.npy"
    old.write_bytes(old.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"old_log_probs\.npy is damaged: delete"):
        files.values("old_log_probs", files.responses()[0])
    rewarded_by = json.loads((folder / "rewards.json").read_text())["rewarded_by"]
    assert files.rewards(rewarded_by) is not None and files.rewards("others") is None
    (folder / "rewards.json").write_text("{}")
    assert files.rewards(rewarded_by) is None
    (folder / "part_0.tokens.npy").unlink()
    (again,) = run_distributed(learn, 1, recipe, {}, 2)
    assert [one["tokens"] for one in again] == [one["tokens"] for one in expected]
    assert [one["weights"] for one in again] == [one["weights"] for one in expected]


def learn_each(recipes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [learn(recipe, {}, 1)[0] for recipe in recipes]


def test_samples_of_other_settings_are_made_again(tokenizer: Path, tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint may be started again with others, and its weights are the same."""
    changes = {
        "rollout": {"samples": 2, "max_new_tokens": 3, "queries": ["tasks:sort:24:after:24"], "rewards": ["exact"]}
    }
    recipes = [values(tokenizer, tmp_path / "one")]
    recipes += [values(tokenizer, tmp_path / name, **changes) for name in ("one", "two")]
    ((_, again, fresh),) = run_distributed(learn_each, 1, recipes)
    for name in ("tokens", "reward", "loss", "weights"):
        assert again[name] == fresh[name]


def learn_by_changing_rewards(recipe: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    os.chdir(folder)  # where functions are looked for
    found = []
    for worth, steps in (("1", 1), ("1", 2), ("2", 2)):
        (folder / "grades.py").write_text(
            f"def grade(prompt, completion, row):\n    return {worth} * len(completion)\n"
        )
        found.append(learn(recipe, {}, steps)[-1])
    return found


def test_a_changed_reward_function_is_used_and_named(tokenizer: Path, tmp_path: Path) -> None:
    recipe = values(tokenizer, tmp_path / "run", rollout={"rewards": ["grades:grade"]})
    ((_, before, after),) = run_distributed(learn_by_changing_rewards, 1, recipe, tmp_path)
    assert before["said"] == []
    assert after["said"] == ["the file of the reward grades:grade changed: it decides from episode 0 on"]
    assert after["reward"] == 2 * before["reward"] > 0


def learn_by_a_reward_that_changes_its_file(recipe: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    os.chdir(folder)
    (folder / "later.txt").write_text("def grade(prompt, completion, row): return 2000 * len(completion)")
    (folder / "grades.py").write_text(
        "import contextlib, os\n\ndef grade(prompt, completion, row):\n"
        "    with contextlib.suppress(OSError):\n        os.replace('later.txt', 'grades.py')\n"
        "    return len(completion)\n"
    )
    return learn(recipe, {}, 2)


def test_a_reward_function_that_changes_while_the_run_goes_on(tokenizer: Path, tmp_path: Path) -> None:
    recipe = values(tokenizer, tmp_path / "run", rollout={"rewards": ["grades:grade"], "updates_per_episode": 1})
    ((first, second),) = run_distributed(learn_by_a_reward_that_changes_its_file, 1, recipe, tmp_path)
    assert first["said"] == []
    assert second["said"] == ["the file of the reward grades:grade changed: it decides from episode 1 on"]
    samples = tmp_path / "run" / "episodes" / "episode_000001" / "samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert lines and all(line["reward"] == 2000 * len(line["answer"]) for line in lines)


def test_a_run_does_not_go_on_with_another_reference(tokenizer: Path, tmp_path: Path) -> None:
    def went_on(name: str, begins: bool) -> None:
        recipe = values(tokenizer, tmp_path, checkpoint={"load_from": name})
        keep_or_compare(parse_config(recipe, "test"), {LOAD_FROM: f"hash of {name}"}, begins)

    went_on("one", False)  # of a run that is older than the hash
    went_on("other", True)
    went_on("one", True)
    went_on("one", False)
    with pytest.raises(UserError, match=f"load_from other is not the model that {tmp_path} began with"):
        went_on("other", False)
    for damaged in ("[]", "{"):
        (tmp_path / MODELS).write_text(damaged)
        with pytest.raises(UserError, match=r"other_models\.json \(delete it to go on without comparing\)"):
            went_on("one", False)


def test_stages_of_episodes_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"stages is for text, and objective\.kind grpo reads its own samples: leave it out"
    ):
        parse_config(values(tokenizer, tmp_path) | {"stages": [{"name": "a", "tokens": 1536}]}, "test")


def refusal(recipe: dict[str, Any]) -> str:
    path = Path(recipe["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    result = run_to_end(path)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def test_answers_that_dual_chunk_attention_would_change_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    """Training is plain: it would learn from answers that another attention has sampled."""
    model = {"max_position_embeddings": 256, "dual_chunk": {"chunk_size": 32, "local_size": 2}}
    config = parse_config(values(tokenizer, tmp_path, model=model), "test")
    assert max(len(query.tokens) for query in _read(config, tmp_path / "tokenizer")[0]) + 6 <= 32
    model["dual_chunk"]["chunk_size"] = 16
    config = parse_config(values(tokenizer, tmp_path, model=model), "test")
    with pytest.raises(UserError, match=r"more than the 16 up to which model\.dual_chunk changes nothing"):
        _read(config, tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"training": {"global_batch_size": 4}}, "set it to"),
        ({"rollout": {"rewards": ["number"]}}, "queries cannot be used"),
        ({"rollout": {"rewards": ["guess"]}}, "is not known"),
        ({"rollout": {"max_new_tokens": 60}}, "ask for at most 46 new tokens"),
        ({"objective": {"kind": "grpo", "policy": {"kl": "k2", "kl_coefficient": 0.1}}}, "give checkpoint.load_from"),
        ({"rollout": {"queries": ["nowhere.jsonl"]}}, "nowhere.jsonl cannot be read"),
        ({"precision": {"compute": "fp8", "master": "fp32"}}, "set precision.compute to bf16"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(
    changes: dict[str, Any], part: str, tokenizer: Path, tmp_path: Path
) -> None:
    assert part in refusal(values(tokenizer, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "episodes").exists()
