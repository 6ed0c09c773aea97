"""Samples, rewards and keeps the answers to a file of queries: file after file, each scored while the next is sampled."""

import argparse
import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from launchers.counted import counted
from qwen_moe.alone import alone
from qwen_moe.checkpoint.fingerprint import fingerprint, tokenizer_fingerprint
from qwen_moe.data.tokenizer import copy_tokenizer
from qwen_moe.errors import UserError
from qwen_moe.generation.command import reading_of
from qwen_moe.generation.sampling import Sampling
from qwen_moe.generation.session import Session
from qwen_moe.generation.text import answer_text
from qwen_moe.generation.tokenizer import tokenizer_folder
from qwen_moe.progress import counter
from qwen_moe.rollout.queries import Query, digest, read_queries
from qwen_moe.rollout.rewards import Item, Rewarder, RewardFailure, RewardSettings
from qwen_moe.rollout.server import Sampler, Server, ServerSampler
from qwen_moe.rollout.server_check import check_weights
from qwen_moe.rollout.store import MANIFEST, TOKENIZER, Row, Store
from qwen_moe.rollout.summary import figures

_BATCHES_PER_FILE = 4


def roll_out(
    args: argparse.Namespace, session: Session, sampling: Sampling, rewards: RewardSettings
) -> dict[str, Any] | None:
    """The summary, on the rank that reports. All ranks call this. Raises UserError."""
    with contextlib.ExitStack() as stack:
        rewarder = stack.enter_context(Rewarder(rewards)) if session.reports else None

        def check(query: Query) -> None:
            session.check_one(query.tokens, sampling.max_new_tokens)
            if rewarder is not None:
                rewarder.check(query.values)

        queries = read_queries(args.input, session.opened.tokenizer, chat=args.chat, checks=[check])
        session.say_if_no_chat(args.chat, (query.values for query in queries))
        session.check([query.tokens for query in queries], sampling.max_new_tokens)
        if rewarder is None:
            todo: list[int] = []  # rank 0 knows
            for index in session.agree(todo):
                _sample(session, session, [queries[number] for number in _numbers(args, queries, index)], sampling)
            return None
        args.output.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(alone(args.output))
        sampler = _sampler(args, session, sampling)
        settings = _settings(args, session, sampling, queries)
        store = Store(args.output, settings, rewarder.identity(), len(queries), _per_file(args))
        copy_tokenizer(tokenizer_folder(session.opened.weights.directory), args.output / TOKENIZER)
        with _scoring(store, queries, rewarder) as score:
            for index in store.to_score():
                score(index)
            todo = _to_sample(session, store, len(queries))
            if isinstance(sampler, ServerSampler) and todo:
                sampler.check(sampling)
            if args.server is not None and args.server_check and todo:
                check_weights(session, sampler, queries[: args.server_check], sampling, args.server_gap)
            with counter(len(queries), sum(len(store.numbers(index)) for index in todo)) as shown:
                for index in todo:
                    rows = _sample(session, sampler, [queries[number] for number in store.numbers(index)], sampling)
                    store.add_samples(index, rows)
                    score(index)
                    shown.update(len(rows))
        summary, variances = figures(store.rows())
        store.finish(summary, variances)
        return summary


def _per_file(args: argparse.Namespace) -> int:
    return args.queries_per_file or max(1, _BATCHES_PER_FILE * args.batch_size // args.samples)


def _numbers(args: argparse.Namespace, queries: list[Query], index: int) -> range:
    size = _per_file(args)
    return range(index * size, min((index + 1) * size, len(queries)))


def _settings(args: argparse.Namespace, session: Session, sampling: Sampling, queries: list[Query]) -> dict[str, Any]:
    """What decides the samples, to the last bit of a log-probability."""
    directory = session.opened.weights.directory
    names = ("dtype", "batch_size", "tp", "ep", "pp")
    return {
        "model": fingerprint(directory),
        "tokenizer": tokenizer_fingerprint(tokenizer_folder(directory)),
        "end_tokens": sorted(session.opened.end_tokens),
        "vocab_size": session.opened.config.vocab_size,
        "queries_digest": digest(queries),
        **vars(sampling),
        "stop": list(sampling.stop),
        **{name: getattr(args, name) for name in names},
        **reading_of(args),
        "server": None if args.server is None else f"{args.server_kind}: {args.model}",
    }


def _sampler(args: argparse.Namespace, session: Session, sampling: Sampling) -> Sampler:
    """What samples: this process, or the server. Before there is anything in the output, it is asked whether it is there;
    later only if something is left to sample, because samples that are there are scored without it."""
    if args.server is None:
        return session
    server = Server(
        url=args.server,
        model=args.model,
        kind=args.server_kind,
        seconds=args.server_seconds,
        tries=args.server_tries,
        at_once=max(1, args.batch_size // args.samples),
        key_variable=args.server_key_variable,
    )
    found = ServerSampler(server, sorted(session.opened.end_tokens), session.opened.config.vocab_size)
    if not (args.output / MANIFEST).exists():
        found.check(sampling)
    return found


def _sample(session: Session, sampler: Sampler, queries: list[Query], sampling: Sampling) -> list[Row]:
    prompts, numbers = [query.tokens for query in queries], [query.number for query in queries]
    found = sampler.generate(prompts, sampling, numbers=numbers)
    return [
        {
            "number": query.number,
            "id": query.id,
            "values": query.values,
            "prompt_tokens": query.tokens,
            "samples": [
                {
                    "tokens": answer.tokens,
                    "log_probs": answer.log_probs,
                    "text": answer_text(session.opened, answer, sampling.stop),
                    "finish_reason": answer.finish_reason,
                }
                for answer in answers
            ],
        }
        for query, answers in zip(queries, found, strict=True)
    ]


def _to_sample(session: Session, store: Store, queries: int) -> list[int]:
    """Files without samples, on which all ranks agree."""
    todo = session.agree(store.to_sample())
    sampled = queries - sum(len(store.numbers(index)) for index in todo)
    if sampled:
        session.say(
            f"{store.folder}: {sampled:,} of {counted(queries, 'query has', 'queries have')} their samples already"
        )
    return todo


@contextlib.contextmanager
def _scoring(store: Store, queries: list[Query], rewarder: Rewarder) -> Iterator[Any]:
    """A function that has a file scored by another thread. An error of that thread is raised by a later call or at the end
    of the block."""

    def work(index: int) -> None:
        store.add_scores(index, _scored(store.samples(index), queries, rewarder))

    pending: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as thread:

        def score(index: int) -> None:
            while pending and pending[0].done():
                pending.popleft().result()
            pending.append(thread.submit(work, index))

        try:
            yield score
            while pending:
                pending.popleft().result()
        except RewardFailure as error:
            raise UserError(f"{error}. All samples are kept in {store.folder}: the same command goes on") from None
        finally:
            thread.shutdown(wait=True, cancel_futures=True)


def _scored(rows: list[Row], queries: list[Query], rewarder: Rewarder) -> list[Row]:
    items = [
        Item(
            prompt=queries[row["number"]].prompt,
            completion=sample["text"],
            row={"id": row["id"], **row["values"]},
            finish_reason=sample["finish_reason"],
        )
        for row in rows
        for sample in row["samples"]
    ]
    scores = iter(rewarder.score(items))
    for row in rows:
        for sample in row["samples"]:
            score = next(scores)
            sample |= {"reward": score.value, "parts": score.parts, "why": score.why, "failed": list(score.failed)}
    return rows
