"""Continues many prompts at once: reads them in chunks, then draws one token of every answer per forward pass.

Shapes: N new tokens of any number of sequences, V vocabulary; of routing, see `routing`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from launchers.counted import counted
from qwen_moe.config import ModelConfig
from qwen_moe.errors import UserError
from qwen_moe.generation.cache import Chunk, SequenceCache, read_prompts
from qwen_moe.generation.likelihood import Likelihood, ScoredText, TextsOfPass
from qwen_moe.generation.routing import Routing, split_routing
from qwen_moe.generation.runner import Runner
from qwen_moe.generation.sampling import Sampling, draw, uniforms
from qwen_moe.models.attention.dual_chunk import DualChunkReader
from qwen_moe.models.attention.reader import PlainReader, Reader
from qwen_moe.models.attention.sparse import SparsePrefill, SparseRecord, SparseSettings
from qwen_moe.models.rope import make_rope

_CHANCES = 64  # random numbers drawn at a time
NOT_FINITE = (
    "the model's outputs are NaN or infinite: its weights are damaged, or it needs a wider dtype (--dtype fp32)"
)


@dataclass(frozen=True)
class Completion:
    """An answer. ``log_probs``: of each token, see `sampling.draw`. ``finish_reason``: "stop" at an end token or a stop
    string, "length" at max_new_tokens. The end token is the last of ``tokens``. ``routing``: if it was asked for."""

    tokens: list[int]
    log_probs: list[float]
    finish_reason: str
    routing: Routing | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is done at once. ``chunk``: tokens of prompts per forward pass; ``sequences``: answers per batch;
    ``cached``: tokens that the caches of a batch may hold, unless one prompt needs more."""

    chunk: int = 32768
    sequences: int = 64
    cached: int = 1 << 20


@dataclass
class _Answer:
    """An answer in the making."""

    chances: Iterator[float]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    experts: list[torch.Tensor] = field(default_factory=list)  # [l, K] of each token that was read

    def completion(self, routing: Routing | None) -> Completion:
        return Completion(self.tokens, self.log_probs, self.finish_reason, routing)


def _chances(seed: int, prompt: int, sample: int) -> Iterator[float]:
    generator = uniforms(seed, prompt, sample)
    while True:
        yield from torch.rand(_CHANCES, generator=generator, dtype=torch.float64).tolist()


class Engine:
    """Generates with one model.

    ``config`` says how texts are read: RoPE and dual chunk attention, which may be an extension of the model's own (the
    weights do not depend on them). ``sparse``: leave out keys in long prompts; `record` says how much. ``end_tokens`` end an
    answer. ``text`` decodes tokens, for stop strings.
    """

    def __init__(
        self,
        runner: Runner,
        config: ModelConfig,
        *,
        sparse: SparseSettings | None = None,
        end_tokens: Sequence[int] = (),
        text: Callable[[list[int]], str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.runner, self.config, self.limits = runner, config, limits or Limits()
        self.rope = make_rope(config)
        self.end_tokens, self.text = frozenset(end_tokens), text
        self._sparse = None if sparse is None else SparsePrefill(replace(sparse, first_head=runner.first_head))
        self._plain = PlainReader(self.rope, self._sparse)
        self._chunked = None
        if config.dual_chunk is not None:
            self._chunked = DualChunkReader(self.rope, config.dual_chunk, self._sparse)

    @property
    def record(self) -> SparseRecord | None:
        """What sparse prefill has left out so far, on this rank."""
        return None if self._sparse is None else self._sparse.record

    def reader(self, longest: int) -> tuple[Reader, bool]:
        """How texts of at most ``longest`` tokens are read, and whether new tokens need the reader too: those of sequences
        in plain attention can be read together."""
        chunks = self.config.dual_chunk
        if self._chunked is None or chunks is None or longest <= chunks.plain_length:
            return self._plain, False
        return self._chunked, True

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        numbers: Sequence[int] | None = None,
        routing: bool = False,
        done: Callable[[int, list[Completion]], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """``sampling.samples`` answers to each of ``prompts``, in their order.

        ``numbers`` (default 0, 1, ...) identify the prompts: with the seed they decide what is drawn, whatever else is in
        the batch. ``routing``: say which experts each token took (`Completion.routing`). ``done(i, answers)`` is called as
        soon as prompt i has all its answers; ``progress(read, drawn)`` after each forward pass with the numbers of tokens.
        Raises UserError for tokens that the model does not know, texts that it does not reach, and the routing of a model
        without experts.
        """
        numbers = range(len(prompts)) if numbers is None else numbers
        for prompt in prompts:
            check_prompt(prompt, sampling.max_new_tokens, self.config)
        if routing and not self.config.moe_layers:
            raise UserError("a model without experts has no routing: generate without asking for it")
        if sampling.stop and self.text is None:
            raise UserError(
                f"stop is {list(sampling.stop)}, but there is no tokenizer to write text with: leave it out"
            )
        results: dict[int, list[Completion]] = {}

        def finished(prompt: int, answers: list[Completion]) -> None:
            results[prompt] = answers
            if done is not None:
                done(prompt, answers)

        for batch in batches([len(prompt) for prompt in prompts], sampling, self.limits):

            def told(i: int, answers: list[Completion], batch: list[int] = batch) -> None:
                finished(batch[i], answers)

            _Batch(self, [prompts[i] for i in batch], [numbers[i] for i in batch], sampling, routing).run(
                told, progress or (lambda read, drawn: None)
            )
        self.runner.finish()
        return [results[i] for i in range(len(prompts))]

    def likelihoods(self, texts: Sequence[ScoredText]) -> list[Likelihood]:
        """How likely the scored tokens of ``texts`` are, all in one forward pass. Raises UserError."""
        readers = [self.reader(len(text.tokens))[0] for text in texts]
        cache = TextsOfPass(texts, readers, self.config.num_hidden_layers - 1)
        device = self.runner.device
        fields = (torch.tensor(field, device=device) for field in (cache.ids, cache.wanted, cache.labels))
        ids, wanted, labels = fields
        return cache.split(*self.runner.log_probs(ids, cache, wanted, labels))


class _Batch:
    """Prompts that are read together, and continued until the last of their answers has ended."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        sampling: Sampling,
        routing: bool,
    ) -> None:
        self._engine, self._runner, self._sampling, self._prompts = engine, engine.runner, sampling, prompts
        self._routing = routing
        self._read: list[list[torch.Tensor]] = [[] for _ in prompts]  # experts [n, l, K] of each prompt's chunks
        self._here = list(range(len(prompts)))  # prompts whose answers are being drawn
        self._answers = [
            [_Answer(_chances(sampling.seed, number, sample)) for sample in range(sampling.samples)]
            for number in numbers
        ]
        lengths = [len(prompt) for prompt in prompts]
        reader, alone = engine.reader(max(lengths) + sampling.max_new_tokens)
        self._cache = SequenceCache(
            engine.rope,
            lengths,
            samples=sampling.samples,
            new_tokens=sampling.max_new_tokens,
            reader=reader,
            alone=alone,
            last_layer=engine.config.num_hidden_layers - 1,
        )
        self._occurred: torch.Tensor | None = None

    def run(self, done: Callable[[int, list[Completion]], None], progress: Callable[[int, int], None]) -> None:
        logits = self._read_prompts(progress).repeat_interleave(self._sampling.samples, 0)
        if self._sampling.repetition_penalty != 1 and logits.shape[1]:
            self._occurred = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            for row in range(len(logits)):
                self._occurred[row, list(self._prompts[row // self._sampling.samples])] = True
        while True:
            tokens = self._draw(logits)
            progress(0, len(tokens))
            for prompt, answers in enumerate(self._answers):
                if answers and all(answer.finish_reason for answer in answers):
                    done(prompt, self._completions(prompt))
                    self._answers[prompt] = []
            if not any(self._answers):
                return
            tokens = self._forget_ended(tokens)
            self._cache.begin_step(self._runner.device)
            logits, experts = self._pass(tokens, torch.arange(len(tokens), device=tokens.device))
            for answer, taken in zip(self._rows() if self._routing else (), experts, strict=True):
                if not answer.finish_reason:
                    answer.experts.append(taken)

    def _pass(self, ids: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of ``wanted``, and the experts ``[N, l, K]`` of all tokens: ``[0]`` if nobody asked."""
        experts: list[torch.Tensor] | None = [] if self._routing else None
        logits = self._runner.logits(ids, self._cache, wanted, experts)
        return logits, experts[0] if experts else torch.empty(0)

    def _completions(self, prompt: int) -> list[Completion]:
        answers = self._answers[prompt]
        if not self._routing:
            return [answer.completion(None) for answer in answers]
        parts = [*self._read[prompt], *(taken.unsqueeze(0) for answer in answers for taken in answer.experts)]
        sizes = [len(self._prompts[prompt]), *(len(answer.experts) for answer in answers)]
        routings = split_routing(self._runner.of_all_layers(torch.cat(parts)), sizes)
        self._read[prompt] = []
        return [answer.completion(routing) for answer, routing in zip(answers, routings, strict=True)]

    def _rows(self) -> list[_Answer]:
        """The answers that rows of a forward pass belong to. A prompt whose answers have ended may still have rows."""
        ended = [_Answer(iter(()), finish_reason="ended")] * self._sampling.samples
        return [answer for prompt in self._here for answer in self._answers[prompt] or ended]

    def _read_prompts(self, progress: Callable[[int, int], None]) -> torch.Tensor:
        """Logits after each prompt, ``[P, V]``."""

        def read(ids: torch.Tensor, wanted: torch.Tensor, chunks: list[Chunk]) -> torch.Tensor:
            logits, experts = self._pass(ids, wanted)
            if self._routing:
                for chunk, taken in zip(chunks, experts.split([len(chunk) for chunk in chunks]), strict=True):
                    self._read[chunk.prompt].append(taken)
            progress(len(ids), 0)
            return logits

        return read_prompts(self._prompts, self._cache, self._engine.limits.chunk, self._runner.device, read)

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of every row. Ended answers get any."""
        rows, greedy = self._rows(), self._sampling.temperature == 0
        chance = torch.tensor(
            [0.0 if greedy or row.finish_reason else next(row.chances) for row in rows], dtype=torch.float64
        )
        if logits.shape[1]:
            tokens, log_probs = draw(logits, self._sampling, chance, self._occurred)
        else:
            tokens, log_probs = torch.zeros_like(chance, dtype=torch.int64), torch.zeros_like(chance)
        tokens, log_probs = self._runner.share(tokens.to(self._runner.device), log_probs.to(self._runner.device))
        if self._occurred is not None:
            self._occurred.scatter_(1, tokens.unsqueeze(1), True)
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            if row.finish_reason:
                continue
            if not math.isfinite(log_prob):
                raise UserError(NOT_FINITE)
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            if token in self._engine.end_tokens or self._says_stop(row):
                row.finish_reason = "stop"
            elif len(row.tokens) == self._sampling.max_new_tokens:
                row.finish_reason = "length"
        return tokens

    def _says_stop(self, row: _Answer) -> bool:
        if not self._sampling.stop or self._engine.text is None:
            return False
        # A token may hold less than a letter, but no stop string spans more tokens than it has bytes, and the one before
        # gives the decoder its context.
        longest = max(len(stop.encode()) for stop in self._sampling.stop) + 8
        recent = self._engine.text(row.tokens[-longest:])
        return any(stop in recent for stop in self._sampling.stop)

    def _forget_ended(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drop the rows of prompts that have all their answers, once they are half of the rows."""
        live = [place for place, prompt in enumerate(self._here) if self._answers[prompt]]
        if 2 * len(live) > len(self._here):
            return tokens
        samples = self._sampling.samples
        rows = torch.tensor([place * samples + i for place in live for i in range(samples)], device=tokens.device)
        self._here = [self._here[place] for place in live]
        self._cache.keep(live, tokens.device)
        if self._occurred is not None:
            self._occurred = self._occurred[rows]
        return tokens[rows]


def batches(lengths: Sequence[int], sampling: Sampling, limits: Limits) -> list[list[int]]:
    """Prompts that are continued together: of similar lengths, as many as ``limits`` allow."""
    found: list[list[int]] = []
    for prompt in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        # Of all prompts of a batch the longest decides what each takes; in this order it is the last.
        each = lengths[prompt] + sampling.samples * sampling.max_new_tokens
        fits = min(limits.sequences // sampling.samples, limits.cached // each)
        if found and len(found[-1]) < fits:
            found[-1].append(prompt)
        else:
            found.append([prompt])
    return found


def check_prompt(prompt: Sequence[int], max_new_tokens: int, config: ModelConfig) -> None:
    """Raise UserError unless the model knows the tokens of ``prompt`` and reaches to the end of its continuation."""
    length = len(prompt)
    if length == 0:
        raise UserError("the prompt is empty: give at least one token")
    smallest, largest = min(prompt), max(prompt)
    if smallest < 0 or largest >= config.vocab_size:
        wrong = largest if largest >= config.vocab_size else smallest
        raise UserError(
            f"the prompt has token {wrong} but the model's vocabulary has {config.vocab_size}: the tokenizer belongs "
            "to another model"
        )
    if length + max_new_tokens > config.reach:
        raise UserError(
            f"a prompt of {counted(length, 'token')} and {max_new_tokens} new ones make {length + max_new_tokens}, "
            "more than the "
            f"model's reach of {config.reach} tokens: shorten the prompt, or ask for at most "
            f"{max(config.reach - length, 0)} new tokens"
        )
