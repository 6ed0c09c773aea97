"""Forward and backward of one Qwen3-30B-A3B-shaped MoE layer, and of a small whole model, against other libraries'.

    python -m benchmarks.gpu [--rounds 10] [--recipes current blockwise] [--compile] [--json]
    python -m benchmarks.gpu --device cpu --tiny          # a dry run: nothing but that it runs

All contenders get the same tokens and the same routing, balanced or skewed (Zipf's law over experts: the first is chosen
about as often as the last 64 together), and take turns: A B C A B C ... (whole
models one after the other: they would not fit beside each other). Timed with CUDA events after a warm-up; reported
are medians, TFLOP/s of the arithmetic that must be done (recomputation and padding count as nothing), and its share of
the bf16 matmul rate measured in the same process. What is not installed, or does not run, is listed with the reason.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_contenders import (
    TINY,
    Session,
    Size,
    Step,
    megatron_layer,
    our_layer,
    our_model,
    precisions,
    routed_tokens,
    run_config,
    transformer_engine_layer,
    transformers_layer,
    transformers_model,
)
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.ops.compiled import compile_kernels
from qwen_moe.runs.recorder import measure_matmul_peak

Contenders = dict[str, Callable[[], Step]]


def measure(steps: dict[str, Step], device: torch.device, rounds: int) -> dict[str, list[float] | str]:
    """Seconds of every round of every step that runs, interleaved; of others the reason."""
    results: dict[str, Any] = {}
    for name, step in steps.items():
        try:
            for _ in range(3 if device.type == "cuda" else 1):
                step()
            results[name] = []
        except Exception as error:  # one contender that does not run must not hide the others
            results[name] = _reason(error)
    for _ in range(rounds):
        for name, step in steps.items():
            if isinstance(results[name], list):
                results[name].append(_timed(step, device))
    return results


def _timed(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        start_time = time.perf_counter()
        step()
        return time.perf_counter() - start_time
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def _built(contenders: Contenders) -> tuple[dict[str, Step], dict[str, str]]:
    steps, reasons = {}, {}
    for name, make in contenders.items():
        try:
            steps[name] = make()
        except Exception as error:
            reasons[name] = _reason(error)
    return steps, reasons


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step of every contender does."""

    what: str
    flops: float
    tokens: int


def compare(work: Work, contenders: Contenders, device: torch.device, rounds: int, peak: float) -> list[dict[str, Any]]:
    """One row for each contender; ``peak`` in FLOP/s."""
    steps, reasons = _built(contenders)
    rows = []
    for name, outcome in (measure(steps, device, rounds) | reasons).items():
        row: dict[str, Any] = {"what": work.what, "contender": name}
        if isinstance(outcome, str):
            rows.append(row | {"not_run": outcome})
            continue
        seconds = statistics.median(outcome)
        figures = {
            "milliseconds": seconds * 1e3,
            "tflops": work.flops / seconds / 1e12,
            "share_of_bf16_peak": work.flops / seconds / peak,
            "tokens_per_second": work.tokens / seconds,
        }
        rows.append(row | figures)
    return rows


def layer_contenders(session: Session, size: Size, recipes: list[str], routing: str) -> Contenders:
    x, router = routed_tokens(size, routing, session.device)
    ours: Contenders = {
        name: partial(our_layer, session, size, precision, x, router) for name, precision in precisions(recipes).items()
    }
    return ours | {
        "transformers bf16": partial(transformers_layer, session, size, x, router),
        "megatron-core bf16": partial(megatron_layer, session, size, x, router),
        "transformer engine bf16": partial(transformer_engine_layer, session, size, x, router),
    }


def benchmark(session: Session, size: Size, recipes: list[str], rounds: int) -> dict[str, Any]:
    """The whole comparison: facts about the machine and one row for each contender."""
    device = session.device
    peak = measure_matmul_peak(torch.bfloat16, device)
    # Three products of [D x F] per chosen expert, forward and two backward, 2 FLOP a multiply-add; the router's likewise.
    flops = size.tokens * (size.top_k * 3 * size.hidden * size.expert_hidden + size.hidden * size.experts) * 6.0
    rows: list[dict[str, Any]] = []
    for routing in ("balanced", "zipf"):
        work = Work(what=f"MoE layer, {routing}", flops=flops, tokens=size.tokens)
        rows += compare(work, layer_contenders(session, size, recipes, routing), device, rounds, peak)
        _release(device)
    flops = flops_per_token(run_config(size, {}).model, size.sequence).training * size.tokens
    models: Contenders = {
        name: partial(our_model, session, size, precision) for name, precision in precisions(recipes).items()
    }
    models["transformers bf16"] = partial(transformers_model, session, size)
    # One at a time: weights and activations of all would not fit beside each other.
    for name, make in models.items():
        work = Work(what=f"model of {size.layers} layers", flops=flops, tokens=size.tokens)
        rows += compare(work, {name: make}, device, rounds, peak)
        _release(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "bf16_matmul_tflops": peak / 1e12, "rows": rows}


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}, torch {result['torch']}, bf16 matmul {result['bf16_matmul_tflops']:.1f} TFLOP/s"]
    for row in result["rows"]:
        head = f"{row['what']:24s} {row['contender']:30s}"
        if "not_run" in row:
            lines.append(f"{head} not run: {row['not_run']}")
        else:
            lines.append(
                f"{head} {row['milliseconds']:9.2f} ms {row['tflops']:8.1f} TFLOP/s {row['share_of_bf16_peak']:6.1%} "
                f"of peak {row['tokens_per_second']:12,.0f} tokens/s"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run")
    parser.add_argument("--recipes", nargs="*", default=["current", "blockwise"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compile our elementwise chains, as train does on a GPU")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    session = Session(args.device)
    compile_kernels(args.compile)
    result = benchmark(session, TINY if args.tiny else Size(), args.recipes, args.rounds)
    print(json.dumps(result, indent=1) if args.json else table(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
