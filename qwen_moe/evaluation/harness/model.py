"""A model of ours as lm-evaluation-harness sees it. Requests become tokens exactly as in the harness's own model of
transformers (`lm_eval.models.huggingface.HFLM`), so that numbers can be compared."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from launchers.counted import counted
from qwen_moe.errors import UserError
from qwen_moe.evaluation.harness.answers import RequestAnswers, key_of
from qwen_moe.evaluation.harness.work import Answered, Work
from qwen_moe.generation.engine import Completion
from qwen_moe.generation.likelihood import Likelihood, ScoredText
from qwen_moe.generation.sampling import Sampling

TokenPair = tuple[Any, list[int], list[int]]  # what was asked, tokens of the context and of the continuation
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_MEANINGLESS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "do_sample": None}


class HarnessModel(TemplateLM):
    """``longest``: tokens that the model reads. ``identity``: what answers depend on beside the request. ``answers`` keeps
    them. `counts` says in how many requests something was not as asked.

    Every process of a layout works on every request (`work`), so that to the harness there is one process.
    """

    def __init__(
        self, work: Work, longest: int, identity: dict[str, Any], answers: RequestAnswers, seed: int = 0
    ) -> None:
        super().__init__()
        opened = work.session.opened
        self.tokenizer = opened.tokenizer
        self.max_length, self.max_gen_toks = longest, 256
        self.counts: Counter[str] = Counter()
        self._work, self._answers, self._seed = work, answers, seed
        self._identity = identity
        self._ends = opened.end_tokens
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"{self.tokenizer.name_or_path} has no end token, with which the harness begins texts: set eos_token in "
                "tokenizer_config.json"
            )

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @functools.cached_property
    def _prefix(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **special)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        except Exception as error:  # a template raises what it likes
            raise UserError(f"the tokenizer's chat template refuses a prompt of the task: {error}") from None

    def _loglikelihood_tokens(self, requests: Sequence[TokenPair], **kwargs: Any) -> list[tuple[float, bool]]:
        texts = [self._scored(*request) for request in requests]
        keys = [key_of(self._identity, "likelihood", list(text.tokens), text.scored) for text in texts]

        def ask(todo: list[int], done: Answered) -> None:
            def found(some: dict[int, Likelihood]) -> None:
                done({i: [one.log_prob, one.greedy] for i, one in some.items()})

            self._work.likelihoods([texts[i] for i in todo], found)

        return [(log_prob, greedy) for log_prob, greedy in self._answered(keys, ask)]

    def _scored(self, asked: Any, context: list[int], continuation: list[int]) -> ScoredText:
        """What of a request the model reads. Raises UserError if nothing is left to score."""
        if not continuation:
            raise UserError(
                f"the tokenizer makes no token of a continuation ({asked[1]!r:.60} after {asked[0]!r:.60}), so that it has "
                "no probability: leave the task out, or use the model's own tokenizer"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {counted(len(continuation), 'token')}, more than the {self.max_length} that the "
                "model reads: "
                "leave the task out, or raise --max-length with --context-extension"
            )
        whole = context + continuation
        self.counts["truncated"] += len(whole) > self.max_length + 1
        unknown = self.tokenizer.unk_token_id
        self.counts["unknown"] += unknown is not None and unknown in continuation
        return ScoredText(whole[-(self.max_length + 1) :], len(continuation))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[TokenPair] = []
        sizes = []
        for request in requests:
            (text,) = request.args
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            some = [((text[:60], ""), *make_disjoint_window(window)) for window in of_text]
            windows += some
            sizes.append(len(some))
        found = iter(self._loglikelihood_tokens(windows))
        return [sum(next(found)[0] for _ in range(size)) for size in sizes]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id)
        prompts: list[list[int]] = []
        ways: list[tuple[Sampling, tuple[str, ...]]] = []
        for request in requests:
            context, kwargs = request.args
            sampling, stop = self._sampling(kwargs, eos)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - sampling.max_new_tokens
            self.counts["truncated"] += len(tokens) > room
            prompts.append(tokens[-room:])
            ways.append((sampling, stop))
        keys = self._generation_keys(prompts, [sampling for sampling, _ in ways])

        def ask(todo: list[int], done: Answered) -> None:
            groups: dict[Sampling, list[int]] = {}
            for place, i in enumerate(todo):
                groups.setdefault(ways[i][0], []).append(place)
            for sampling, places in groups.items():

                def found(some: dict[int, Completion], places: list[int] = places) -> None:
                    done({places[i]: self._text(one, ways[todo[places[i]]][1]) for i, one in some.items()})

                asked = [todo[place] for place in places]
                # The same draws after a stop, whatever is left to draw.
                numbers = [int(keys[i][:15], 16) for i in asked]
                self._work.generate([prompts[i] for i in asked], sampling, numbers, found)

        return self._answered(keys, ask)

    def _generation_keys(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[str]:
        """Requests that draw have an answer of their own each time; greedy ones share it."""
        times: Counter[str] = Counter()
        keys = []
        for prompt, sampling in zip(prompts, samplings, strict=True):
            key = key_of(self._identity, "generation", prompt, dataclasses.asdict(sampling))
            times[key] += 1
            keys.append(key_of(key, times[key]) if sampling.temperature else key)
        return keys

    def _sampling(self, given: dict[str, Any], eos: str) -> tuple[Sampling, tuple[str, ...]]:
        """How a request wants its answer, and the strings at which its text ends. Raises UserError."""
        kwargs = normalize_gen_kwargs(given, self.max_gen_toks)
        until, new = kwargs.pop("until"), kwargs.pop("max_gen_toks")
        if not all(isinstance(text, str) for text in until):
            raise UserError(
                f"a task ends answers at until={json.dumps(until, default=str)}: give a text or a list of texts"
            )
        stop = tuple(dict.fromkeys(text for text in [*until, eos] if text))
        draws = kwargs.pop("do_sample")
        values = {"top_p": 1.0} | {name: kwargs.pop(name) for name in _SAMPLING if kwargs.get(name) is not None}
        values["temperature"] = float(values.get("temperature", 1.0)) if draws else 0.0
        others = {
            name: value
            for name, value in kwargs.items()
            if value is not None and name not in _SAMPLING and _MEANINGLESS.get(name) != value
        }
        if others:
            raise UserError(
                f"a task asks to generate with {json.dumps(others, default=str)}, which is not supported: set until, "
                f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}, with --gen-kwargs"
            )
        if new >= self.max_length:
            raise UserError(
                f"a task asks for {new} new tokens, and the model reads {self.max_length} in all: ask for fewer "
                f"(--gen-kwargs max_gen_toks={max(self.max_length // 2, 1)})"
            )
        # An end token is not written out to be found: the engine knows it.
        heard = stop if self.eot_token_id not in self._ends else tuple(text for text in stop if text != eos)
        return Sampling(max_new_tokens=new, stop=heard, seed=self._seed, **values), stop

    def _text(self, answer: Completion, stop: tuple[str, ...]) -> str:
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return str(postprocess_generated_text(text, list(stop), None))

    def _answered(self, keys: list[str], ask: Callable[[list[int], Answered], None]) -> list[Any]:
        """The answers to requests by their ``keys``; ``ask`` is told the indices of those that have none yet."""
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        todo = sorted(i for key, i in first.items() if key not in self._answers)

        def done(found: dict[int, Any]) -> None:
            self._answers.add({keys[todo[place]]: answer for place, answer in found.items()})

        if todo:
            ask(todo, done)
        return [self._answers[key] for key in keys]
