"""Sampling over HTTP, from a real server that speaks the protocols of vLLM and SGLang and answers with our own model."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.cli import main
from qwen_moe.errors import UserError
from qwen_moe.generation.sampling import Sampling
from qwen_moe.rollout import server as module
from qwen_moe.rollout.server import Server, ServerSampler
from qwen_moe.rollout.store import read_manifest, read_rollouts
from tests.rollout.conftest import write_lines
from tests.rollout.fake_server import FakeServer, serving

PROMPTS = [[1, 2, 3], [4], [5, 6]]
SAMPLING = Sampling(max_new_tokens=6, temperature=1, top_p=1, samples=3, seed=5)


@pytest.fixture(scope="module")
def running(hf: Path) -> Iterator[FakeServer]:
    with serving(hf) as server:
        yield server


@pytest.fixture
def fake(running: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    running.reset()
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.01)
    return running


def sampler(fake: FakeServer, **changes: Any) -> ServerSampler:
    server = Server(**{"url": fake.url, "model": "ours", "tries": 3, "seconds": 30} | changes)
    return ServerSampler(server, sorted(fake.opened.end_tokens), fake.opened.config.vocab_size)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_answers_are_those_of_the_model_that_is_served(fake: FakeServer, kind: Any) -> None:
    found = sampler(fake, kind=kind).generate(PROMPTS, SAMPLING, numbers=[7, 8, 9])
    assert [len(answers) for answers in found] == [3, 3, 3]
    sent = {tuple(body["prompt"] if kind == "vllm" else body["input_ids"][0]): body for _, body in fake.requests}
    for prompt, answers in zip(PROMPTS, found, strict=True):
        body = sent[tuple(prompt)]
        if kind == "vllm":
            assert answers == fake.sampled(prompt, replace(SAMPLING, seed=body["seed"]))
        else:
            seeds = [one["sampling_seed"] for one in body["sampling_params"]]
            assert len(set(seeds)) == 3 and body["input_ids"] == [prompt] * 3
            assert answers == [fake.sampled(prompt, replace(SAMPLING, seed=seed, samples=1))[0] for seed in seeds]
    assert len({json.dumps(vars(one)) for answers in found for one in answers}) == 9
    # Queries keep their random numbers in another order.
    again = sampler(fake, kind=kind).generate(PROMPTS[::-1], SAMPLING, numbers=[9, 8, 7])
    assert again == found[::-1]


def test_an_older_server_names_tokens(fake: FakeServer) -> None:
    expected = sampler(fake).generate(PROMPTS, SAMPLING)

    def older(answer: Any) -> Any:
        for choice in answer["choices"]:
            del choice["token_ids"], choice["prompt_token_ids"]
        return answer

    fake.change = older
    assert sampler(fake).generate(PROMPTS, SAMPLING) == expected


def test_what_passes_is_tried_again(fake: FakeServer) -> None:
    fake.failures = [503, 0]
    (found,) = sampler(fake).generate(PROMPTS[:1], SAMPLING)
    assert len(found) == 3 and len(fake.requests) == 3
    fake.failures = [503, 429, 500]
    with pytest.raises(
        UserError, match=r"/v1/completions did not answer in 3 tries: status 500.*the same command goes on"
    ):
        sampler(fake).generate(PROMPTS[:1], SAMPLING)
    fake.failures = [400]
    with pytest.raises(UserError, match=r"refuses the request with status 400: .*busy"):
        sampler(fake).generate(PROMPTS[:1], SAMPLING)


@pytest.mark.parametrize("kept_waiting", [False, True])
def test_an_error_whose_text_does_not_arrive_is_an_error_of_the_server(
    monkeypatch: pytest.MonkeyPatch, kept_waiting: bool
) -> None:
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            for _ in range(2):
                connection, _ = listening.accept()
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 503 busy\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nsorry")
                if kept_waiting:
                    time.sleep(0.3)
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        closing = ServerSampler(Server(url=url, model="ours", tries=2, seconds=0.2), [31], 53)
        with pytest.raises(UserError, match=r"in 2 tries: status 503: the rest did not arrive \(\w+\)"):
            closing.generate(PROMPTS[:1], SAMPLING)


@pytest.mark.parametrize(
    "url",
    [
        *("http://", "http://127.0.0.1:port", "http://127.0.0.1:99999", "http://[::1", "http://my host:80", "http://."),
        *(f"http://{'a' * 70}.org", "http://host/é", "http://host/?key=1", "ftp://host", "localhost:8000"),
    ],
)
def test_what_is_no_address_is_refused_before_it_is_asked(url: str) -> None:
    with pytest.raises(UserError, match=r"--server .* is no address.*: give one such as http://127.0.0.1:8000"):
        Server(url=url, model="ours")


def test_a_password_in_an_address_is_not_printed() -> None:
    with pytest.raises(UserError, match="a user name or a password") as error:
        Server(url="http://me:hunter2@127.0.0.1:80", model="ours")
    assert "hunter2" not in str(error.value)


def test_a_server_that_asks_for_a_key(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "sk-secret"
    with pytest.raises(UserError, match=r"status 401: .*give --server-key-variable the variable's name"):
        sampler(fake).check(SAMPLING)
    with pytest.raises(UserError, match="the environment variable KEY_OF_TESTS is empty or not set"):
        sampler(fake, key_variable="KEY_OF_TESTS")
    monkeypatch.setenv("KEY_OF_TESTS", "sk-öther")
    with pytest.raises(UserError, match="characters that an HTTP header cannot have") as error:
        sampler(fake, key_variable="KEY_OF_TESTS")
    assert "sk-" not in str(error.value)
    monkeypatch.setenv("KEY_OF_TESTS", "sk-wrong")
    with pytest.raises(UserError, match=r"status 401: .*Is the environment variable KEY_OF_TESTS this") as error:
        sampler(fake, key_variable="KEY_OF_TESTS").generate(PROMPTS, SAMPLING)
    assert "sk-" not in str(error.value)
    monkeypatch.setenv("KEY_OF_TESTS", "sk-secret\n")  # as `cat` of a file gives it
    right = sampler(fake, key_variable="KEY_OF_TESTS")
    right.check(SAMPLING)
    assert len(right.generate(PROMPTS, SAMPLING)) == 3


def test_a_key_in_the_place_of_a_variable_is_not_printed() -> None:
    with pytest.raises(UserError, match="--server-key-variable is not the name of an environment variable") as error:
        Server(url="http://127.0.0.1:80", model="ours", key_variable="sk-secret")
    assert "secret" not in str(error.value)


def test_a_key_is_not_sent_on_to_another_host(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY_OF_TESTS", "sk-secret")
    seen = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            self.send_response(302)
            self.send_header("Location", fake.url + self.path)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    fake.key = "sk-secret"
    with HTTPServer(("127.0.0.1", 0), Redirecting) as other:
        threading.Thread(target=other.handle_request, daemon=True).start()
        asking = sampler(fake, url=f"http://127.0.0.1:{other.server_address[1]}", key_variable="KEY_OF_TESTS", tries=1)
        with pytest.raises(UserError, match="status 401"):
            asking.check(SAMPLING)
    assert seen == ["Bearer sk-secret"]


def test_a_server_without_models(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerSampler, "ask", lambda self, path, body: {"data": []})
    with pytest.raises(UserError, match="has no model at all: load 'ours' into it"):
        sampler(fake).check(SAMPLING)


def test_a_server_that_is_slow_or_down(fake: FakeServer) -> None:
    fake.wait = 1.0
    with pytest.raises(UserError, match=r"in 2 tries: no answer within 0.1 seconds \(--server-seconds\)"):
        sampler(fake, seconds=0.1, tries=2).generate(PROMPTS[:1], SAMPLING)
    closed = ServerSampler(Server(url="http://127.0.0.1:9", model="ours", tries=2), [31], 53)
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/models did not answer in 2 tries: .*refused"):
        closed.check(SAMPLING)


def edited(place: int, **changes: Any) -> Any:
    def change(answer: Any) -> Any:
        answer["choices"][place] |= changes
        return answer

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(1, prompt_token_ids=[9, 1, 2, 3]), r"read a prompt that begins with the tokens \[9, 1, 2, 3\]"),
        (edited(0, token_ids=[1, 2]), r"log-probabilities for 2 tokens"),
        (edited(0, token_ids=[1] * 7, logprobs={"token_logprobs": [-1.0] * 7}), "an answer of 7 tokens"),
        (edited(0, token_ids=[], logprobs={"token_logprobs": []}), "an answer of 0 tokens"),
        (
            edited(0, token_ids=[99], logprobs={"token_logprobs": [-1.0]}),
            "gave token 99, but the model's vocabulary has 53",
        ),
        (edited(0, token_ids=[1], logprobs={"token_logprobs": [float("nan")]}), "gave the log-probability nan"),
        (edited(0, token_ids=[1], logprobs={"token_logprobs": [0.5]}), "gave the log-probability 0.5"),
        (edited(0, token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"), "none of the end tokens"),
        (edited(0, finish_reason="abort"), "finish_reason 'abort'"),
        (edited(0, logprobs=None), "not the form of vLLM's"),
        (edited(0, index=1), r"the choices have the indices \[0, 1, 1\]"),
        (edited(0, token_ids=[1.5], logprobs={"token_logprobs": [-1.0]}), "1.5 is no token id"),
        (edited(0, token_ids="12"), "'1' is no token id"),
        (edited(0, token_ids=[float("inf")]), "inf is no token id"),
        (edited(0, token_ids=[1], logprobs={"token_logprobs": [-(10**400)]}), "not the form of vLLM's"),
        (lambda answer: {"choices": answer["choices"][:2]}, "gave 2 answers and was asked for 3"),
        (lambda answer: {"error": "no"}, "no list 'choices'"),
        (lambda answer: b"<html>", "which is not JSON"),
        (lambda answer: b"[" * 100_000, "which is not JSON"),
    ],
)
def test_wrong_answers_are_refused(fake: FakeServer, change: Any, message: str) -> None:
    fake.change = change
    with pytest.raises(UserError, match=message):
        sampler(fake).generate(PROMPTS[:1], SAMPLING)


def test_what_cannot_be_is_known_before_sampling(fake: FakeServer, hf: Path, tmp_path: Path, capsys: Any) -> None:
    sampler(fake).check(SAMPLING)
    with pytest.raises(UserError, match="has no model 'other', only ours"):
        sampler(fake, model="other").check(SAMPLING)
    with pytest.raises(UserError, match="are those at temperature 1"):
        sampler(fake).check(replace(SAMPLING, temperature=0.7))
    with pytest.raises(UserError, match="is no address"):
        sampler(fake, url="localhost:8000")
    with pytest.raises(UserError, match=r"no such path|refuses the request with status 404"):
        sampler(fake, url=fake.url + "/elsewhere").check(SAMPLING)
    for more, message in ((["--server", fake.url], "--server and --model belong"), (
        ["--server", fake.url, "--model", "ours", "--tp", "2"], "leave them out with --server"
    )):  # fmt: skip
        common = ["--checkpoint", str(hf), "--input", "q.jsonl", "--output", str(tmp_path / "out"), "--reward", "exact"]
        assert main(["rollout", *common, *more]) == 2 and message in capsys.readouterr().err
    assert not fake.requests


def test_a_server_with_other_weights_is_refused(fake: FakeServer, hf: Path, tmp_path: Path, capsys: Any) -> None:
    """One expert of one layer, as when a hand-over of weights misses some (verl #7978, SkyRL #1737)."""
    source = write_lines(tmp_path / "q.jsonl", [{"prompt": "k" * n, "answer": "q"} for n in range(1, 5)])
    command = ["rollout", "--checkpoint", str(hf), "--input", str(source), "--output", str(tmp_path / "out")]
    command += [
        "--reward",
        "contains",
        "--samples",
        "2",
        "--max-new-tokens",
        "5",
        "--server",
        fake.url,
        "--model",
        "ours",
    ]
    model = fake.engine.runner.model
    weights = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj"))
    kept = weights.detach().clone()
    with torch.no_grad():
        weights[:2] *= -3
    try:
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "4 answers are" in message and "it serves other weights" in message
        assert not list((tmp_path / "out").glob("rollouts-*"))
        assert main([*command, "--server-check", "0", "--output", str(tmp_path / "unchecked")]) == 0
    finally:
        with torch.no_grad():
            weights.copy_(kept)
    assert main(command) == 0
    assert "answers are " in capsys.readouterr().err


def test_the_command_goes_on_after_the_server_was_down(fake: FakeServer, hf: Path, tmp_path: Path, capsys: Any) -> None:
    source = write_lines(tmp_path / "q.jsonl", [{"prompt": "k" * n, "answer": "q"} for n in range(1, 5)])
    command = ["rollout", "--checkpoint", str(hf), "--input", str(source), "--output", str(tmp_path / "out")]
    command += ["--reward", "contains", "--samples", "2", "--max-new-tokens", "5", "--queries-per-file", "2"]
    command += [
        "--server",
        fake.url,
        "--model",
        "ours",
        "--server-tries",
        "1",
        "--batch-size",
        "2",
        "--server-check",
        "0",
    ]
    longest = len(fake.opened.tokenizer.encode("k" * 4))
    fake.busy = lambda body: len(body["prompt"]) == longest  # the last query, so one of the second file
    assert main(command) == 2 and "did not answer in 1 try: status 503" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*-00000.jsonl"))) == 1 and not list(
        (tmp_path / "out").glob("*-00001.jsonl")
    )
    asked = len(fake.requests)
    fake.reset()
    assert main(command) == 0 and asked == 4 and len(fake.requests) == 2
    rows = list(read_rollouts(tmp_path / "out")[1])
    assert [len(row["samples"]) for row in rows] == [2] * 4
    assert read_manifest(tmp_path / "out")["sampling"]["server"] == "vllm: ours"
    for row in rows:
        for one in row["samples"]:
            assert len(one["tokens"]) == len(one["log_probs"])
    # What is there is scored anew without the server.
    gone = ["http://127.0.0.1:9" if one == fake.url else one for one in command]
    capsys.readouterr()
    assert main([*gone, "--reward", "format:."]) == 0
    assert "4 of 4 queries have their samples already" in capsys.readouterr().err
    (tmp_path / "out" / "rollouts-00001.jsonl").unlink()
    assert main([*gone, "--reward", "format:."]) == 2
    assert "/v1/models did not answer in 1 try" in capsys.readouterr().err
