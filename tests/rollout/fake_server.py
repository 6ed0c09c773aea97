"""A small HTTP server that speaks the protocols of vLLM and SGLang and answers with our own model."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qwen_moe.generation.engine import Completion
from qwen_moe.generation.open import HowToRead, Opened, on_one_device
from qwen_moe.generation.sampling import Sampling


class FakeServer(ThreadingHTTPServer):
    """Answers both protocols with the model of ``hf``. ``failures``: statuses to answer first. ``busy`` says which requests
    get a 503. ``key``: the API key that every request needs, if it is not empty. ``change`` edits an answer before it is
    sent. Requests come side by side: only ``busy`` can single one out.

    It loads other directories as SGLang does, and keeps their names in ``loaded``. After ``deaf_after`` of them it says that
    it has loaded one and has not. ``seeds``: the seed, the number of the prompt and that of the answer that a seed of a
    request stands for, so that it draws what a run would draw by itself.
    """

    def __init__(self, hf: Path, dtype: str = "fp32") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.dtype, self.lock = dtype, threading.Lock()
        self.seeds: dict[int, tuple[int, int, int]] = {}
        self.load(hf)
        self.reset()

    def load(self, hf: Path) -> None:
        with self.lock:
            self.opened = Opened(hf)
            self.engine = self.opened.engine(HowToRead(), 64, on_one_device(self.dtype, "cpu"))

    def reset(self) -> None:
        self.failures: list[int] = []
        self.requests: list[tuple[str, Any]] = []
        self.busy: Any = lambda body: False
        self.wait, self.key = 0.0, ""
        self.change: Any = lambda answer: answer
        self.loaded: list[Path] = []
        self.deaf_after = 1000

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sampled(self, prompt: list[int], sampling: Sampling) -> list[Completion]:
        seed, number, _ = self.seeds.get(sampling.seed, (sampling.seed, 0, 0))
        with self.lock:
            return self.engine.generate([prompt], replace(sampling, seed=seed), numbers=[number])[0]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def send(self, status: int, value: Any) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def may_ask(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self.send(401, {"error": "Unauthorized"})
            return False
        return True

    def do_GET(self) -> None:
        if not self.may_ask():
            return
        if self.path == "/v1/models":
            self.send(200, {"object": "list", "data": [{"id": "ours", "object": "model"}]})
        else:
            self.send(404, {"error": "no such path"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.may_ask():
            return
        self.server.requests.append((self.path, body))
        if self.server.failures or self.server.busy(body):
            status = self.server.failures.pop(0) if self.server.failures else 503
            if status == 0:
                self.close_connection = True  # without an answer
                return
            self.send(status, {"error": {"message": "busy"}})
            return
        time.sleep(self.server.wait)
        if self.path == "/update_weights_from_disk":
            self.send(200, self.loads(Path(body["model_path"])))
            return
        answer = self.vllm(body) if self.path == "/v1/completions" else self.sglang(body)
        self.send(200, self.server.change(answer))

    def loads(self, directory: Path) -> dict[str, Any]:
        if not (directory / "config.json").is_file():
            return {"success": False, "message": f"Failed to update weights: {directory} is not there."}
        if len(self.server.loaded) < self.server.deaf_after:
            self.server.load(directory)
        self.server.loaded.append(directory)
        return {"success": True, "message": "Succeeded to update model weights."}

    def vllm(self, body: dict[str, Any]) -> Any:
        assert body["model"] == "ours" and body["logprobs"] == 0 and body["return_token_ids"] is True
        sampling = Sampling(
            max_new_tokens=body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"], top_k=body["top_k"],
            min_p=body["min_p"], samples=body["n"], stop=tuple(body["stop"]), seed=body["seed"],
        )  # fmt: skip
        choices = []
        for index, answer in enumerate(self.server.sampled(body["prompt"], sampling)):
            log_probs = {"token_logprobs": answer.log_probs, "tokens": [f"token_id:{token}" for token in answer.tokens]}
            choices.append(
                {"index": index, "text": self.server.opened.text(answer.tokens), "finish_reason": answer.finish_reason,
                 "logprobs": log_probs, "token_ids": answer.tokens, "prompt_token_ids": body["prompt"]}
            )  # fmt: skip
        return {"id": "cmpl-1", "object": "text_completion", "choices": choices[::-1]}

    def sglang(self, body: dict[str, Any]) -> Any:
        assert self.path == "/generate" and body["return_logprob"] is True
        prompts, parameters = body["input_ids"], body["sampling_params"]
        seeds = [one["sampling_seed"] for one in parameters]
        given = parameters[0]
        sampling = Sampling(
            max_new_tokens=given["max_new_tokens"], temperature=given["temperature"], top_p=given["top_p"],
            top_k=max(given["top_k"], 0), min_p=given["min_p"], seed=seeds[0],
        )  # fmt: skip
        if seeds[0] in self.server.seeds:  # draw all answers of a prompt as a run does
            assert [self.server.seeds[seed][2] for seed in seeds] == list(range(len(seeds)))
            answers = self.server.sampled(prompts[0], replace(sampling, samples=len(seeds)))
        else:
            pairs = zip(prompts, seeds, strict=True)
            answers = [self.server.sampled(prompt, replace(sampling, seed=seed))[0] for prompt, seed in pairs]
        return [
            {"text": "", "output_ids": answer.tokens, "meta_info": {
                "finish_reason": {"type": answer.finish_reason},
                "output_token_logprobs": [[p, t, None] for p, t in zip(answer.log_probs, answer.tokens, strict=True)],
            }}
            for answer in answers
        ]  # fmt: skip


@contextlib.contextmanager
def serving(hf: Path, dtype: str = "fp32") -> Iterator[FakeServer]:
    """A server that answers until the end of the block."""
    with FakeServer(hf, dtype) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
