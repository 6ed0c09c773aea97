"""One run of a command that generates: on one device, or as one of several ranks that torchrun, srun or `start_ranks`
started."""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from parallel.mesh import Grids, LayoutError
from parallel.process import ProcessError, process_info, start
from qwen_moe.checkpoint.huggingface.convert import Weights
from qwen_moe.checkpoint.huggingface.export import export_dtype
from qwen_moe.errors import UserError
from qwen_moe.generation.choices import log_probs_of_choices
from qwen_moe.generation.engine import Completion, Engine, Limits
from qwen_moe.generation.extension import extended, own_extension
from qwen_moe.generation.launch import split_layout
from qwen_moe.generation.likelihood import Likelihood, ScoredText, check_text, in_passes
from qwen_moe.generation.open import HowToRead, Opened, on_one_device
from qwen_moe.generation.ranks import ShardedRunner, gather_shares, load_sharded
from qwen_moe.generation.runner import Runner
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.text import check_lengths
from qwen_moe.models.attention.sparse import SparseRecord
from qwen_moe.progress import style

Done = Callable[[int, list[Completion]], None]
Shared = TypeVar("Shared")
Item = TypeVar("Item")


class Session:
    """The model of ``args.checkpoint``, read in the way that ``args`` say. A context manager: leaves the process group.

    ``reports``: whether this process prints and writes. Prompts are dealt out to data-parallel groups; their answers come
    back in waves of a batch each, so that a stopped run loses no more.
    """

    def __init__(self, args: argparse.Namespace, split: bool) -> None:
        self.opened = Opened(args.checkpoint)
        self._how = HowToRead(
            extension=args.context_extension,
            chunk=args.chunk_size,
            attention=args.attention,
            kept_share=args.kept_share,
            limits=Limits(sequences=args.batch_size),
        )
        self._compile = args.compile
        if self._compile and split:
            raise UserError("--compile is for one process: leave out --compile, or --tp, --ep, --pp and --dp")
        self._asked_dtype, self._rank, self._grids = args.dtype, 0, None
        self._device, self._engine, self._record, self._longest = torch.device("cpu"), None, None, 0
        if split:
            self._grids = self._join(args)

    _grids: Grids | None
    _engine: Engine | None
    _record: SparseRecord | None  # of all ranks, where there are several

    def _join(self, args: argparse.Namespace) -> Grids:
        config = self.opened.config
        try:
            info = process_info()
            layout = split_layout(config, args, info.world_size)
            self._device = start(info)
        except (ProcessError, LayoutError) as error:
            raise UserError(str(error)) from None
        self._rank = info.rank
        return Grids(layout, self._device.type, kv_heads=config.num_key_value_heads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if self._grids is not None and kind is None:
            dist.destroy_process_group()

    @property
    def reports(self) -> bool:
        return self._rank == 0

    @property
    def dtype(self) -> str:
        assert self._engine is not None
        return str(self._engine.runner.dtype).removeprefix("torch.")

    @property
    def layout(self) -> str:
        """Over how many processes the model is split, which decides the rounding."""
        return "one process" if self._grids is None else str(self._grids.layout)

    def say(self, text: str) -> None:
        if self.reports:
            print(text, file=sys.stderr)

    def say_if_no_chat(self, chat: bool, rows: Iterable[Mapping[str, Any]]) -> None:
        """Say that a model which answers turns is given plain text, where a row of prompts has it and ``chat`` is off."""
        if not chat and any("prompt" in row for row in rows) and self.opened.ends_turns:
            self.say(
                "note: the model answers turns of conversations, and the prompts are given to it as plain text: --chat asks "
                "them as a user"
            )

    def notes(self) -> list[str]:
        """What the user should know about the answers."""
        record = self._record or (None if self._engine is None else self._engine.record)
        shares = {} if record is None else record.shares()
        if not shares:
            return []
        return [
            f"sparse attention kept {shares['kept']:.1%} of the attention of the mean query "
            f"({shares['kept_worst_layer']:.1%} in the worst layer) with {shares['work']:.1%} of dense attention's work"
        ]

    def check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        """Raise UserError for prompts that the model cannot continue. Call it once, with all prompts, before `generate`: the
        longest decides how texts are read."""
        self._longest = check_lengths(self.opened.config, self._how, prompts, max_new_tokens)

    def check_one(self, prompt: list[int], max_new_tokens: int) -> None:
        """`check` of one prompt among others: a longer one may need the context extension that this one does not."""
        how = self._how.within(self.opened.config, len(prompt) + max_new_tokens)
        check_lengths(self.opened.config, how, [prompt], max_new_tokens)

    def reach(self, longest: int | None = None) -> int:
        """Instead of `check`: texts have at most ``longest`` tokens, by default as many as the model reaches. Returns this
        number. What was allowed before stays allowed. Raises UserError if the model does not reach so far."""
        longest = longest or self.opened.config.reach
        config = extended(self.opened.config, self._how.extension, longest, self._how.chunk)
        if longest > config.reach:
            own = own_extension(config)
            fix = f"change {own} in the model's config" if own else "extend the context (--context-extension)"
            raise UserError(
                f"texts of {longest:,} tokens are longer than the model's reach of {config.reach:,} tokens: shorten them, "
                f"or {fix}"
            )
        self._longest = max(self._longest, longest)
        return longest

    def agree(self, todo: Shared) -> Shared:
        """What rank 0 has to do: only its file of answers counts."""
        if self._grids is None:
            return todo
        shared = [todo]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def likelihoods(self, texts: Sequence[ScoredText], done: Callable[[dict[int, Likelihood]], None]) -> None:
        """How likely the scored tokens of ``texts`` are. On the rank that reports, ``done`` is called with some of the
        answers, by their index in ``texts``, as soon as they are known there. Raises UserError."""
        for text in texts:
            check_text(text, self.opened.config.vocab_size, self._longest)
        if not texts:
            return
        engine, plan = self._open(), in_passes([len(text.tokens) for text in texts], self._how.limits.chunk)

        def work(own: list[int]) -> list[list[Likelihood]]:
            found = [engine.likelihoods([texts[i] for i in plan[number]]) for number in own]
            engine.runner.finish()
            return found

        with _Bars(sum(len(text.tokens) for text in texts), 0, self.reports) as bars:
            for numbers, found in self._in_waves(engine, len(plan), 1, work):
                indices = [i for number in numbers for i in plan[number]]
                if self.reports:
                    done(dict(zip(indices, [one for of_pass in found for one in of_pass], strict=True)))
                bars.advance(sum(len(texts[i].tokens) for i in indices), 0)

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        numbers: Sequence[int] | None = None,
        routing: bool = False,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Answers to all ``prompts``, which ``numbers`` identify, with their ``routing`` if asked (see `Engine.generate`).
        On the rank that reports, ``done`` is called for each as soon as it is known there."""
        numbers = list(range(len(prompts))) if numbers is None else numbers
        if not prompts:
            return []
        engine = self._open()
        tokens = sum(map(len, prompts))
        with _Bars(tokens, len(prompts) * sampling.samples * sampling.max_new_tokens, self.reports) as bars:
            if self._grids is None:
                tell = None if done is None else (lambda i, answers: done(numbers[i], answers))
                return engine.generate(
                    prompts, sampling, numbers=numbers, routing=routing, done=tell, progress=bars.advance
                )

            def work(own: list[int]) -> list[list[Completion]]:
                given, named = [prompts[i] for i in own], [numbers[i] for i in own]
                return engine.generate(given, sampling, numbers=named, routing=routing, progress=bars.advance)

            results: list[list[Completion]] = []
            at_once = self._how.limits.sequences // sampling.samples
            for indices, found in self._in_waves(engine, len(prompts), at_once, work):
                if done is not None and self.reports:
                    for index, completions in zip(indices, found, strict=True):
                        done(numbers[index], completions)
                results += found
            return results

    def log_probs(self, prompts: list[list[int]], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of each of ``choices`` as the answer to each of ``prompts`` (see `log_probs_of_choices`), on
        every rank. Call `reach` first."""
        engine = self._open()

        def work(indices: list[int]) -> list[list[float]]:
            return log_probs_of_choices(engine, [prompts[i] for i in indices], choices)

        found = self._in_waves(engine, len(prompts), self._how.limits.sequences, work)
        return [row for _, rows in found for row in rows]

    def _open(self) -> Engine:
        self._engine = self.opened.engine(self._how, self._longest, self._load)
        return self._engine

    def _in_waves(
        self, engine: Engine, count: int, at_once: int, work: Callable[[list[int]], list[Item]]
    ) -> Iterator[tuple[list[int], list[Item]]]:
        """Numbers below ``count``, a wave at a time, and what ``work`` makes of each: every dp and cp rank does
        ``at_once`` of a wave."""
        runner, grids = engine.runner, self._grids
        wave = max(1, at_once) * (1 if grids is None else grids.data.size)
        for begin in range(0, count, wave):
            indices = list(range(begin, min(begin + wave, count)))
            if grids is None:
                yield indices, work(indices)
            else:
                assert isinstance(runner, ShardedRunner)
                yield indices, gather_shares(work(runner.share_of(indices)), grids, len(indices))
        if grids is not None and engine.record is not None:
            records = [engine.record] * dist.get_world_size()
            dist.all_gather_object(records, engine.record)
            self._record = SparseRecord.joined(records)

    def _load(self, weights: Weights) -> Runner:
        if self._grids is None:
            return on_one_device(self._asked_dtype, compiled=self._compile)(weights)
        dtype = export_dtype(self._asked_dtype) or weights.dtype
        model = load_sharded(weights.config, weights.source, self._grids, dtype, self._device, str(weights.directory))
        return ShardedRunner(model, self._grids, self._device)


class _Bars:
    """Progress on stderr: tokens of prompts that were read, then tokens that were drawn. Each appears after a second."""

    def __init__(self, to_read: int, to_draw: int, shown: bool) -> None:
        settings = style() | {"unit": "token", "unit_scale": True, "leave": False, "delay": 1.0, "disable": not shown}
        self._reading = tqdm(desc="reading", total=to_read, **settings)
        self._drawing = tqdm(desc="generating", total=to_draw, **settings | {"disable": not shown or not to_draw})

    def advance(self, read: int, drawn: int) -> None:
        self._reading.update(read)
        self._drawing.update(drawn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._reading.close()
        self._drawing.close()
