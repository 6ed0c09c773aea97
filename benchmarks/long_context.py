"""What long sequences cost: documents in one sequence against sequences of their own, attention over two processes against
one, the work of each rank, and a whole step of a long packed sequence.

    python benchmarks/long_context.py documents|ranks|work|step [--rounds 5] [--tokens N] [--threads 2]

Sides take turns in one run, so that a drifting machine slows them alike.
"""

import argparse
import resource
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from parallel.local_group import preload, run_local
from parallel.mesh import Axis
from qwen_moe.config import RunConfig, parse_config
from qwen_moe.data.samples import documents_of
from qwen_moe.models.attention.core import Attend, attend
from qwen_moe.models.attention.mask import Visibility
from qwen_moe.sharding.context import ContextAttention, spans

HEADS, KV_HEADS, DIM = 8, 2, 64
SCALE = DIM**-0.5


def _tensors(batch: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, tokens, heads, DIM, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def _timed(core: Attend, tensors: list[torch.Tensor], visible: Visibility) -> float:
    begin = time.perf_counter()
    q, k, v = tensors
    y = core(q, k, v, visible, SCALE)
    torch.autograd.grad(y, tensors, torch.ones_like(y))
    return time.perf_counter() - begin


def _lengths(kind: str, tokens: int) -> list[int]:
    """Lengths of documents whose sum is ``tokens``: all 512, or random ones of 60 to 2,000 tokens."""
    if kind == "512 each":
        return [512] * (tokens // 512)
    generator, found = torch.Generator().manual_seed(1), list[int]()
    while sum(found) < tokens:
        found.append(min(int(60 * 33 ** torch.rand((), generator=generator).item()), tokens - sum(found)))
    return found


def documents(tokens: int, rounds: int) -> None:
    """Attention forward and backward: one packed sequence, against every document as a sequence of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("512 each", "60 to 2,000"):
            lengths = _lengths(kind, tokens)
            ends = torch.zeros(1, tokens, dtype=torch.bool)
            ends[0, torch.tensor(lengths).cumsum(0) - 1] = True
            starts = documents_of(ends)["document_starts"]
            packed = _tensors(1, tokens, dtype)
            if kind == "512 each":
                alone = [_tensors(len(lengths), 512, dtype)]
            else:
                alone = [_tensors(1, length, dtype) for length in lengths]
            ratios, seconds = [], []
            for number in range(rounds + 1):
                apart = sum(_timed(attend, own, Visibility()) for own in alone)
                together = _timed(attend, packed, Visibility(starts=starts))
                if number:
                    ratios.append(together / apart)
                    seconds.append(together)
            print(
                f"{str(dtype)[6:]:9s} {tokens:,} tokens in {len(lengths)} documents of {kind}: packed "
                f"{statistics.median(seconds):.3f} s, {statistics.median(ratios):.2f} times their own sequences",
                flush=True,
            )


def _rank(tokens: int, rounds: int, threads: int) -> dict[str, list[float]]:
    """Seconds of each round by kind on this rank; ``one process`` runs on rank 0 with ``threads`` while the others wait."""
    rank, size = dist.get_rank(), dist.get_world_size()
    cp, alone = Axis("cp", size, rank, dist.group.WORLD), Axis("alone", 1, 0, None)
    kinds = {
        "ring": ContextAttention("ring", cp, alone),
        "all_gather": ContextAttention("all_gather", cp, alone),
        "ulysses": ContextAttention("all_gather", alone, cp),
    }
    whole, own = _tensors(1, tokens, torch.float32), _tensors(1, tokens // size, torch.float32)
    found: dict[str, list[float]] = {name: [] for name in ("one process", *kinds)}
    for _ in range(rounds + 1):
        dist.barrier()
        if rank == 0:
            torch.set_num_threads(threads)
            found["one process"].append(_timed(attend, whole, Visibility()))
        torch.set_num_threads(max(1, threads // size))
        for name, core in kinds.items():
            dist.barrier()
            found[name].append(_timed(core, own, Visibility()))
            dist.barrier()
    return found


def ranks(tokens: int, rounds: int, threads: int) -> None:
    """Attention forward and backward on two processes, against one process with all threads. The slower rank counts."""
    reports = run_local(_rank, 2, tokens, rounds, threads, timeout=3000)
    one = reports[0]["one process"][1:]
    for name in ("ring", "all_gather", "ulysses"):
        both = [max(times) for times in zip(*(report[name][1:] for report in reports), strict=True)]
        ratio = statistics.median(a / b for a, b in zip(both, one, strict=True))
        print(
            f"{name:10s} {tokens:,} tokens: {statistics.median(both):.3f} s, {ratio:.2f} times one process", flush=True
        )


def work(tokens: int) -> None:
    """Visible query-key pairs of every rank."""
    for size in (2, 4, 8, 16):
        held = tokens // size
        counts = []
        for rank in range(size):
            keys = tuple(span for other in range(size) for span in spans(other, size, held))
            pieces = Visibility().pieces(spans(rank, size, held), keys)
            total = 0
            for piece in pieces:
                rows, columns = (x.stop - x.start for x in (piece.queries, piece.keys))
                total += rows * (rows + 1) // 2 if piece.causal else rows * columns
            counts.append(total)
        print(f"cp={size}: pairs of the fullest rank / of the emptiest {max(counts) / min(counts):.6f}", flush=True)


def _step_config(tokens: int) -> RunConfig:
    return parse_config(
        {
            "run_dir": "unused",
            "model": {
                "family": "qwen2_moe",
                "vocab_size": 8192,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 128,
                "shared_expert_intermediate_size": 256,
                "max_position_embeddings": tokens,
            },
            "data": {"train": [{"prefix": "unused"}], "sequence_length": tokens, "respect_document_boundaries": True},
            "training": {"train_tokens": 10**8, "micro_batch_size": 1, "global_batch_size": 1, "recompute": "full"},
            "optimizer": {"learning_rate": 1e-4},
            "precision": {"compute": "bf16", "master": "fp32"},
        },
        "benchmark",
    )


def _step(tokens: int, threads: int) -> tuple[float, float, int]:
    """(seconds of the second step, peak GB of this process, parameters)."""
    from qwen_moe.verify.ranks import make_trainer

    torch.set_num_threads(threads)
    trainer = make_trainer(_step_config(tokens))
    ends = torch.zeros(1, tokens, dtype=torch.bool)
    ends[0, torch.tensor(_lengths("60 to 2,000", tokens)).cumsum(0) - 1] = True
    ids = torch.randint(0, 8192, (1, tokens + 1))
    batch: dict[str, Any] = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]} | documents_of(ends)
    seconds = 0.0
    for number in range(2):
        begin = time.perf_counter()
        trainer.step(number, [batch])
        seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return seconds, peak, sum(p.numel() for p in trainer.model.parameters())


def step(tokens: int, threads: int) -> None:
    seconds, peak, parameters = run_local(_step, 1, tokens, threads, timeout=3000)[0]
    print(
        f"a packed step of {tokens:,} tokens, {parameters / 1e6:.0f} M parameters, recompute full: {seconds:.1f} s, peak "
        f"{peak:.2f} GB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["documents", "ranks", "work", "step"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    preload(["qwen_moe.verify.ranks"])
    torch.set_num_threads(args.threads)
    if args.what == "documents":
        documents(args.tokens or 32768, args.rounds)
    elif args.what == "ranks":
        ranks(args.tokens or 8192, args.rounds, args.threads)
    elif args.what == "work":
        work(args.tokens or 131072)
    else:
        step(args.tokens or 131072, args.threads)
