"""Samples answers from a vLLM or SGLang server over HTTP: token ids in, token ids and log-probabilities out.

* vLLM: ``POST /v1/completions`` with the prompt as ids, ``logprobs`` and ``return_token_ids``; the fields are those of
  `CompletionRequest` and `CompletionResponseChoice` in vllm/entrypoints/openai/completion/protocol.py, from 0.10.2 on.
  Servers without ``token_ids`` are asked for tokens as ``token_id:N``.
* SGLang: ``POST /generate`` with batches of ``input_ids`` and ``return_logprob`` (docs.sglang.io, sampling parameters),
  because its OpenAI-compatible endpoint returns no ids.

Both give log-probabilities before the temperature is applied (vLLM's ``--logprobs-mode raw_logprobs``), so the temperature
must be 1, or 0. Every answer is checked: a server that gives other tokens than it was asked for is an error.
"""

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from launchers.counted import counted
from qwen_moe.config.rollout import ServerKind, wrong_address, wrong_variable
from qwen_moe.errors import UserError
from qwen_moe.generation.engine import Completion
from qwen_moe.generation.sampling import Sampling, uniforms
from qwen_moe.progress import bar

_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone at the next try
_LONGEST_WAIT = 30.0  # seconds between two tries


class Sampler(Protocol):
    """What samples answers: a `Session`, which has the model, or a `ServerSampler`."""

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, *, numbers: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """``sampling.samples`` answers to each of ``prompts``, in their order. ``numbers`` identify the prompts: with the
        seed they decide what is drawn."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a server is and how to ask it. ``seconds``: to wait for an answer. ``tries``: of each request. ``at_once``:
    requests at a time. ``key_variable``: the environment variable with the API key; empty for a server that asks for none.
    ``in_recipe``: messages name settings of a recipe instead of options."""

    url: str
    model: str
    kind: ServerKind = "vllm"
    seconds: float = 600.0
    tries: int = 6
    at_once: int = 16
    key_variable: str = ""
    in_recipe: bool = False

    def __post_init__(self) -> None:
        if wrong := wrong_address(self.url):
            raise UserError(f"--server {wrong}")
        if wrong := wrong_variable(self.key_variable):
            raise UserError(f"--server-key-variable {wrong}")
        self.headers()

    def name(self, setting: str = "") -> str:
        """What the user calls a setting, or the server itself."""
        if self.in_recipe:
            return f"rollout.server.{setting}" if setting else f"rollout.server {self.url}"
        return {"": "--server", "model": "--model"}.get(setting, f"--server-{setting.replace('_', '-')}")

    def headers(self) -> dict[str, str]:
        """The header with the API key, if there is one. Raises UserError if the variable is not set or cannot be sent."""
        if not self.key_variable:
            return {}
        variable = f"{self.name('key_variable')}: the environment variable {self.key_variable}"
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(f"{variable} is empty or not set: set it to the server's API key")
        if not (key.isascii() and key.isprintable()):
            raise UserError(
                f"{variable} has characters that an HTTP header cannot have: set it to the server's API key"
            )
        return {"Authorization": f"Bearer {key}"}

    @property
    def goes_on(self) -> str:
        kept = "Answers that have come are kept" if self.in_recipe else "Samples of earlier files are kept"
        return f"{kept}: the same command goes on"


class ServerSampler:
    """A `Sampler`. ``end_tokens``, ``vocab_size``: of the model that is served; answers are checked against them."""

    def __init__(self, server: Server, end_tokens: Sequence[int], vocab_size: int) -> None:
        self.server, self._ends, self._vocabulary = server, frozenset(end_tokens), vocab_size
        self._base = server.url.rstrip("/").removesuffix("/v1")

    def check(self, sampling: Sampling) -> None:
        """Raise UserError if the server does not answer or has no such model, or for settings whose log-probabilities would
        not be those that training compares with. Call it before anything is sampled."""
        if sampling.temperature not in (0, 1) or sampling.repetition_penalty != 1:
            raise UserError(
                f"{self.server.name()} with temperature {sampling.temperature} and repetition penalty "
                f"{sampling.repetition_penalty}: a server's log-probabilities are those at temperature 1 without penalty; "
                "use these, or sample here"
            )
        answer = self.ask("/v1/models", None)
        names = [str(one.get("id")) for one in _list(answer, "data") if isinstance(one, dict)]
        if self.server.model not in names:
            if not names:
                raise UserError(
                    f"{self._base} has no model at all: load {self.server.model!r} into it, and run this again"
                )
            known, setting = ", ".join(names), self.server.name("model")
            raise UserError(f"{self._base} has no model {self.server.model!r}, only {known}: give {setting}")

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        numbers: Sequence[int] | None = None,
        done: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Sampler`. ``done(i, answers)`` is called as soon as prompt i has its answers, from any thread."""
        numbers = list(range(len(prompts))) if numbers is None else numbers
        if not prompts:
            return []

        def answers(index: int) -> list[Completion]:
            found = self._answers(prompts[index], sampling, numbers[index])
            if done is not None:
                done(index, found)
            return found

        with ThreadPoolExecutor(min(self.server.at_once, len(prompts))) as threads:
            try:
                asked = threads.map(answers, range(len(prompts)))
                return list(bar(asked, "answers", " queries", len(prompts)))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _answers(self, prompt: list[int], sampling: Sampling, number: int) -> list[Completion]:
        # The same random numbers for a query in whichever order queries are asked, as far as the server keeps to its seed.
        seeds = [uniforms(sampling.seed, number, n).initial_seed() % (1 << 31) for n in range(sampling.samples)]
        if self.server.kind == "vllm":
            body = _vllm_request(self.server.model, prompt, sampling, seeds[0])
            found = _vllm_answers(self.ask("/v1/completions", body), prompt)
        else:
            answer = self.ask("/generate", _sglang_request(prompt, sampling, seeds))
            found = _sglang_answers(answer)
        self._check_answers(found, sampling, number)
        return found

    def _check_answers(self, answers: list[Completion], sampling: Sampling, number: int) -> None:
        def refuse(problem: str) -> None:
            raise UserError(
                f"{self._base} {problem}, for query number {number}. {self.server.goes_on} with a server that is right"
            )

        if len(answers) != sampling.samples:
            refuse(f"gave {counted(len(answers), 'answer')} and was asked for {sampling.samples}")
        for answer in answers:
            tokens, log_probs = answer.tokens, answer.log_probs
            if not 0 < len(tokens) <= sampling.max_new_tokens:
                refuse(
                    f"gave an answer of {counted(len(tokens), 'token')} and was asked for 1 to {sampling.max_new_tokens}"
                )
            if len(log_probs) != len(tokens):
                refuse(f"gave {counted(len(log_probs), 'log-probability')} for {counted(len(tokens), 'token')}")
            if wrong := [token for token in tokens if not 0 <= token < self._vocabulary]:
                refuse(f"gave token {wrong[0]}, but the model's vocabulary has {self._vocabulary}")
            if wrong_one := [one for one in log_probs if not (math.isfinite(one) and one <= 1e-4)]:
                refuse(f"gave the log-probability {wrong_one[0]}")
            if answer.finish_reason not in ("stop", "length"):
                refuse(f"ended an answer with finish_reason {answer.finish_reason!r}, expected stop or length")
            if answer.finish_reason == "stop" and not sampling.stop and tokens[-1] not in self._ends:
                refuse(
                    f"ended an answer with token {tokens[-1]}, which is none of the end tokens {sorted(self._ends)} of the "
                    "model: training on it would not teach to stop"
                )

    @property
    def _about_key(self) -> str:
        if self.server.key_variable:
            return f". Is the environment variable {self.server.key_variable} this server's API key?"
        setting = self.server.name("key_variable")
        return (
            f". If it asks for an API key, put it into an environment variable, and give {setting} the variable's name"
        )

    def ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON that the server answers. Raises UserError, after several tries if it is down or busy."""
        url, seconds = self._base + path, self.server.name("seconds")
        data = None if body is None else json.dumps(body).encode()
        problem = ""
        for attempt in range(self.server.tries):
            if attempt:
                time.sleep(min(_LONGEST_WAIT, 0.5 * 2 ** (attempt - 1)))
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            for name, value in self.server.headers().items():
                request.add_unredirected_header(name, value)  # the key is not for another host
            try:
                with urllib.request.urlopen(request, timeout=self.server.seconds) as response:
                    return _json(response.read(), url)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}: {_explanation(error)}"
                if error.code not in _PASSING:
                    advice = self._about_key if error.code in (401, 403) else ""
                    raise UserError(f"{url} refuses the request with {problem}{advice}") from None
            except TimeoutError:
                problem = f"no answer within {counted(self.server.seconds, 'second')} ({seconds})"
            except urllib.error.URLError as error:
                slow = isinstance(error.reason, TimeoutError)
                problem = f"no answer within {counted(self.server.seconds, 'second')}" if slow else f"{error.reason}"
            except (http.client.HTTPException, ConnectionError) as error:
                problem = f"the connection was lost ({type(error).__name__})"
        raise UserError(
            f"{url} did not answer in {counted(self.server.tries, 'try')}: {problem}. {self.server.goes_on} once it does"
        )


def _explanation(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, as far as it arrives."""
    try:
        return error.read(2000).decode(errors="replace").strip()[:300] or "nothing more is said"
    except (http.client.HTTPException, OSError) as lost:
        return f"the rest did not arrive ({type(lost).__name__})"


def _json(content: bytes, url: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{url} answers {content[:80]!r}, which is not JSON: is it a vLLM or SGLang server?") from None


def _list(answer: Any, name: str) -> list[Any]:
    found = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise UserError(
            f"the server's answer has no list {name!r}: {str(answer)[:120]}. Is it a vLLM or SGLang server?"
        )
    return found


def _vllm_request(model: str, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "n": sampling.samples,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,  # or else that of the model's generation_config.json
        "stop": list(sampling.stop),
        "seed": seed,
        "logprobs": 0,  # of the sampled token only
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
    }


def _vllm_answers(answer: Any, prompt: list[int]) -> list[Completion]:
    """The choices in the order of their index. Raises UserError for another form, and a prompt that is not ours."""
    try:
        choices = sorted(_list(answer, "choices"), key=lambda choice: choice["index"])
        if len(indices := [choice["index"] for choice in choices]) != len(set(indices)):
            raise ValueError(f"the choices have the indices {indices}")
        for choice in choices:
            read = choice.get("prompt_token_ids")
            if read is not None and list(read) != prompt:
                raise UserError(
                    f"the server read a prompt that begins with the tokens {list(read)[:8]} and was given {prompt[:8]} "
                    f"({counted(len(read), 'token')} for {len(prompt)}): it must not change prompts"
                )
        return [
            Completion(_vllm_tokens(one), [float(p) for p in one["logprobs"]["token_logprobs"]], one["finish_reason"])
            for one in choices
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _other_form("vLLM", error, answer) from None


def _vllm_tokens(choice: dict[str, Any]) -> list[int]:
    if choice.get("token_ids") is not None:
        return [_token(token) for token in choice["token_ids"]]
    return [int(name.removeprefix("token_id:")) for name in choice["logprobs"]["tokens"]]


def _token(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no token id")
    return value


def _sglang_request(prompt: list[int], sampling: Sampling, seeds: list[int]) -> dict[str, Any]:
    """A batch of the prompt once for every answer, each with a seed of its own: a server that keeps to seeds would give n
    answers of one seed the same tokens."""
    parameters = {
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
    }
    of_answers = [parameters | {"sampling_seed": seed} for seed in seeds]
    return {"input_ids": [prompt] * len(seeds), "sampling_params": of_answers, "return_logprob": True}


def _sglang_answers(answer: Any) -> list[Completion]:
    try:
        found = []
        for one in answer if isinstance(answer, list) else [answer]:
            meta = one["meta_info"]
            drawn = meta["output_token_logprobs"]
            tokens = [_token(entry[1]) for entry in drawn]
            found.append(Completion(tokens, [float(entry[0]) for entry in drawn], meta["finish_reason"]["type"]))
        return found
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise _other_form("SGLang", error, answer) from None


def _other_form(kind: str, error: Exception, answer: Any) -> UserError:
    return UserError(
        f"the server's answer has not the form of {kind}'s ({type(error).__name__}: {error}): {str(answer)[:200]}. Token "
        "ids and log-probabilities of each token are needed; vLLM gives them from 0.10.2 on"
    )
