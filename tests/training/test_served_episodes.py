"""GRPO whose answers a server samples: a real one that loads the weights of every episode, and one that does not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parallel.local_group import RankFailed
from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.config import parse_config
from qwen_moe.data.chat_tokenizer import trained_chat_tokenizer
from qwen_moe.data.tokenizer import read_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Completion
from qwen_moe.generation.sampling import uniforms
from qwen_moe.rollout.hand_over import hand_over
from qwen_moe.rollout.server import Server, ServerSampler
from qwen_moe.rollout.server_check import Probe, check_probe
from qwen_moe.training.served_answers import ServedAnswers, answered_by
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights
from tests.rollout.fake_server import FakeServer, serving
from tests.small import model_values, small_model
from tests.training.commands import command, run_to_end
from tests.training.test_episodes import LENGTH, TIMED, learn, records, values


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_chat_tokenizer(("tasks:sort:60",), 288, tmp_path_factory.mktemp("tokenizer") / "data")


@pytest.fixture(scope="module")
def first(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with which the server begins, and which no run has."""
    folder = tmp_path_factory.mktemp("first") / "hf"
    model = draw_weights(small_model(vocab_size=288, max_position_embeddings=LENGTH), 4, torch.float32)
    save_pretrained(model, folder, tokenizer=read_tokenizer(tokenizer))
    return folder


@pytest.fixture(scope="module")
def running(first: Path) -> Iterator[FakeServer]:
    with serving(first, "fp64") as server:
        numbers = [(n, sample) for n in range(100) for sample in range(4)]
        server.seeds = {uniforms(1234, *one).initial_seed() % (1 << 31): (1234, *one) for one in numbers}
        yield server


@pytest.fixture
def server(running: FakeServer, first: Path) -> FakeServer:
    running.reset()
    running.load(first)
    return running


def served(fake: FakeServer, tokenizer: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    settings = {"url": fake.url, "model": "ours", "kind": "sglang", "tries": 2, "check": 3} | changes.pop("server", {})
    rollout = {"replay": False, "server": settings} | changes.pop("rollout", {})
    return values(tokenizer, run_dir, rollout=rollout, **changes)


@pytest.fixture(scope="module")
def own(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a run samples and learns by itself."""
    recipe = values(tokenizer, tmp_path_factory.mktemp("own"), rollout={"replay": False})
    return run_distributed(learn, 1, recipe, {}, 2)[0]


@pytest.mark.parametrize(
    ("degrees", "processes"), [({}, 1), ({"tp": 2, "ep": 2}, 4)], ids=["alone", "tp 2, dp 2, ep 4"]
)
def test_a_server_gives_what_the_run_would_sample_itself(
    degrees: dict[str, int],
    processes: int,
    server: FakeServer,
    tokenizer: Path,
    tmp_path: Path,
    own: list[dict[str, Any]],
) -> None:
    """In both episodes: so all weights have arrived after an update, too, from any layout."""
    everywhere = run_distributed(learn, processes, served(server, tokenizer, tmp_path), degrees, 2)
    for found in everywhere:
        for here, there in zip(found, own, strict=True):
            assert here["tokens"] == there["tokens"] and here["experts"] is None
            for key in set(there) - {*TIMED, "tokens", "experts", "said"}:
                assert here[key] == pytest.approx(there[key], rel=1e-10, abs=1e-10), key
            assert here["server_gap"] < 1e-12 and here["hand_over_seconds"] > 0
    assert len(server.loaded) == 2 and server.loaded[1].name == f"weights_{everywhere[0][0]['weights']}"
    config = json.loads((server.loaded[1] / "generation_config.json").read_text())
    assert config["eos_token_id"][0] == read_tokenizer(tokenizer).convert_tokens_to_ids("<|im_end|>")


def test_a_run_that_cannot_sample_itself_learns_from_a_server(
    server: FakeServer, tokenizer: Path, tmp_path: Path
) -> None:
    """In FP8, with two stages of the pipeline on each rank: the server has the weights in bf16."""
    wide = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    model = model_values("qwen2_moe", vocab_size=288, max_position_embeddings=LENGTH, num_hidden_layers=4, **wide)
    recipe = served(
        server,
        tokenizer,
        tmp_path,
        server={"gap": 0.5},
        model=model,
        precision={"compute": "fp8", "master": "fp32"},
        parallel={"schedule": "interleaved_1f1b"},
    )
    for first, second in run_distributed(learn, 2, recipe, {"pp": 2}, 2):
        assert first["ratio_max"] == second["ratio_max"] == 1.0 and first["count"] > 0
        assert 0 < first["sampler_gap_max"] < 0.5 and 0 < first["server_gap"] < 0.5
    header = json.loads((server.loaded[1] / "config.json").read_text())
    assert len(server.loaded) == 2 and (header.get("dtype") or header["torch_dtype"]) == "bfloat16"


def test_the_newest_two_directories_are_kept(server: FakeServer, tokenizer: Path, tmp_path: Path) -> None:
    for name in ("weights_0.pieces", "weights_0.partial", "weights_0"):  # of an export that was killed; of an old one
        (tmp_path / "served" / name).mkdir(parents=True)
        os.utime(tmp_path / "served" / name, (1, 1))
    run_distributed(learn, 1, served(server, tokenizer, tmp_path, rollout={"episodes": 3}), {}, 3)
    assert len(server.loaded) == 3
    there = sorted(path.name for path in (tmp_path / "served").iterdir())
    assert there == sorted([*(path.name for path in server.loaded[1:]), "probe.json"])


def test_a_server_that_never_loads_is_refused(server: FakeServer, tokenizer: Path, tmp_path: Path) -> None:
    server.deaf_after = 0
    with pytest.raises(RankFailed, match=r"serves other weights than .*/served/weights_\w+, which it was told to load"):
        run_distributed(learn, 1, served(server, tokenizer, tmp_path), {}, 1)
    assert not (tmp_path / "episodes").exists()


def test_a_server_with_the_weights_of_the_episode_before_is_refused(
    server: FakeServer, tokenizer: Path, tmp_path: Path
) -> None:
    """Although they are almost the new ones: far nearer than `gap`."""
    server.deaf_after = 1
    recipe = served(server, tokenizer, tmp_path, optimizer={"learning_rate": 5e-4, "eps": 1e-5})
    with pytest.raises(RankFailed, match=r"serves old weights: since an earlier episode .* and the server's by 0\."):
        run_distributed(learn, 1, recipe, {}, 2)
    assert sorted(path.name for path in (tmp_path / "episodes").iterdir()) == ["episode_000000"]
    assert len(server.loaded) == 2
    server.deaf_after = 1000  # the same command goes on
    (found,) = run_distributed(learn, 1, recipe, {}, 2)
    assert [one["server_gap"] < 1e-12 for one in found] == [True, True] and len(server.loaded) == 3


def probe(weights: str, served: list[float], own: list[float]) -> Probe:
    return Probe(weights, [[5, 6, 7, 8]], [served], [own])


def check(before: Probe | None, now: Probe) -> str:
    return check_probe(before, now, 0.1, "SERVER", "DIRECTORY")


def test_old_weights_are_told_from_a_server_that_computes_otherwise() -> None:
    old, new = [-1.0, -2.0, -0.5, -3.0], [-1.02, -1.99, -0.51, -3.03]
    noise, other = [0.01, -0.02, 0.015, 0.005], [-0.012, 0.01, 0.02, -0.01]
    narrow_old, narrow_new = ([a + b for a, b in zip(x, y, strict=True)] for x, y in ((old, noise), (new, other)))
    before = probe("a", narrow_old, old)
    assert "are 0.002 nats a token from" in check(before, probe("b", narrow_new, new))
    # The same server with the old weights, and noise that is as large as the change, but another one.
    with pytest.raises(UserError, match="serves old weights"):
        check(before, probe("b", [a + 1e-3 for a in narrow_old], new))
    # Changes that bf16 cannot show say nothing.
    check(before, probe("b", narrow_old, [a + 5e-4 for a in old]))
    # Other answers cannot be those of the same weights.
    check(before, Probe("b", [[4, 6, 7, 8]], [narrow_old], [new]))
    with pytest.raises(
        UserError, match=r"0\.15 nats a token from the model's, more than 0\.1: it serves other weights"
    ):
        check(None, probe("b", [a - 0.15 for a in new], new))


def test_a_server_that_is_down_in_the_middle_loses_nothing(
    server: FakeServer, tokenizer: Path, tmp_path: Path, own: list[dict[str, Any]]
) -> None:
    recipe = served(server, tokenizer, tmp_path, server={"tries": 1, "at_once": 1})

    def samples(body: Any) -> bool:
        return "sampling_params" in body and body["sampling_params"][0]["temperature"] == 1

    def asked() -> int:
        return sum(path == "/generate" and samples(body) for path, body in server.requests)

    server.busy = lambda body: samples(body) and asked() > 5
    with pytest.raises(RankFailed, match=r"in 1 try: status 503: .*Answers that have come are kept: the same command"):
        run_distributed(learn, 1, recipe, {}, 2)
    kept = tmp_path / "episodes" / "episode_000000" / "answers.jsonl"
    assert len(kept.read_text().splitlines()) == 6
    kept.write_bytes(kept.read_bytes()[:-9])  # a kill in the middle of a line
    shutil.rmtree(tmp_path / "served")
    server.reset()
    (found,) = run_distributed(learn, 1, recipe, {}, 2)
    assert [one["tokens"] for one in found] == [one["tokens"] for one in own]
    assert asked() == 4 + 8  # of 8 queries an episode


def test_answers_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    answers = [Completion([1, 2], [-0.25, -0.1], "stop")]
    with ServedAnswers(tmp_path, "one") as kept:
        kept.add(3, answers)
    assert answered_by(tmp_path) == "one"
    with ServedAnswers(tmp_path, "one") as kept:
        assert kept.found == {3: answers}
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text().replace("-0.25", "-0.26"))
    with ServedAnswers(tmp_path, "one") as kept:
        assert kept.found == {}  # its checksum is another
    path.write_text("")
    assert answered_by(tmp_path) is None


def test_a_command_has_the_server_load(server: FakeServer, tokenizer: Path, tmp_path: Path) -> None:
    server.key = os.environ["PATH"]  # a variable that the processes of all tests have
    script = tmp_path / "reload it.py"
    script.write_text(
        "import json, os, sys\nfrom urllib.request import Request, urlopen\n"
        "body = json.dumps({'model_path': sys.argv[1]}).encode()\n"
        "key = {'Authorization': 'Bearer ' + os.environ['PATH']}\n"
        f"urlopen(Request('{server.url}/update_weights_from_disk', body, key)).read()\n"
    )
    reload = f"{sys.executable} '{script}' {{directory}}"
    recipe = served(
        server, tokenizer, tmp_path / "run", server={"kind": "vllm", "reload": reload, "key_variable": "PATH"}
    )
    (found,) = run_distributed(learn, 1, recipe, {}, 1)
    assert found[0]["server_gap"] < 1e-12
    assert [path.parent for path in server.loaded] == [(tmp_path / "run" / "served").absolute()]


@pytest.mark.parametrize(
    ("reload", "message"),
    [
        (
            "sh -c 'echo no such server >&2; exit 3' {directory}",
            r"ended with 3: no such server.*the same command goes on",
        ),
        ("no-such-command {directory}", r"`no-such-command /.*directory` cannot be run: No such file"),
        ("sh -c 'sleep 30' {directory}", r"did not end within 0.1 seconds \(rollout.server.seconds\)"),
        ("", r"did not load .*directory: Failed to update weights.*It must see this directory under the same path"),
    ],
)
def test_a_hand_over_that_fails(reload: str, message: str, server: FakeServer, tmp_path: Path) -> None:
    seconds = 0.1 if "sleep" in reload else 30.0
    settings = Server(url=server.url, model="ours", kind="sglang", seconds=seconds, in_recipe=True)
    with pytest.raises(UserError, match=message):
        hand_over(ServerSampler(settings, [1], 288), tmp_path / "directory", reload)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server": {"url": "localhost:1"}}, "url 'localhost:1' is no address"),
        ({"server": {"kind": "vllm"}}, "vLLM's server has no standard request that loads other weights: give reload"),
        ({"server": {"reload": "restart.sh"}}, "does not say which directory to load: put {directory}"),
        ({"server": {"reload": "a 'b {directory}"}}, "No closing quotation"),
        ({"server": {"model": ""}}, "model is empty"),
        ({"server": {"key_variable": "sk-secret"}}, "key_variable is not the name of an environment variable"),
        ({"rollout": {"replay": True}}, "rollout.server does not say which experts its tokens took"),
        ({"balance": {"bias_update_rate": 0.1}}, "rollout.server loads cannot store"),
    ],
)
def test_what_a_server_cannot_do_is_refused(
    changes: dict[str, Any], message: str, server: FakeServer, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_config(served(server, tokenizer, tmp_path, **changes), "test")


def recipe_file(server: FakeServer, tokenizer: Path, folder: Path) -> Path:
    rollout = {"held_out": ["tasks:sort:8:heldout"], "held_out_interval": 1, "episodes": 3}
    recipe = served(server, tokenizer, folder / "run", rollout=rollout, checkpoint={"interval": 2, "export_hf": False})
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_kills_between_hand_over_and_answer_change_nothing(server: FakeServer, tokenizer: Path, tmp_path: Path) -> None:
    whole, killed = (recipe_file(server, tokenizer, tmp_path / name) for name in ("whole", "killed"))
    result = run_to_end(whole)
    assert result.returncode == 0, result.stderr
    for loads in (1, 2, 3):  # W0 for the first held-out answers, then an episode's each
        server.reset()
        server.wait = 0.3
        process = subprocess.Popen(command(killed), start_new_session=True, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 240
        while len(server.loaded) < loads and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        assert process.poll() is None and len(server.loaded) == loads
        time.sleep(0.4 * loads)  # some greedy answers have come, or some of the episode
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    server.reset()
    result = run_to_end(killed)
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "killed" / "run") == records(tmp_path / "whole" / "run")
    for episode in range(3):
        name = f"run/episodes/episode_{episode:06d}/samples.jsonl"
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
