"""Optimizer steps of the providers of `optimizer.provider`, taking turns, on the weights of the reference shape.

    python -m benchmarks.optimizer [--providers torch deepspeed] [--rounds 9] [--device cpu] [--json]

Weights, gradients and moments are float32. Every provider has a copy of its own; a round is one step of each, so that a
machine whose speed drifts slows all. Reported are the median of seconds and of the ratios round by round.
"""

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn

from benchmarks.train_step import reference_config
from qwen_moe.config import OptimizerConfig
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.training.optimizer import build_optimizer


class Weights(nn.Module):
    """The reference model's weights with gradients."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in DecoderLM(reference_config()).named_parameters()}
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.randn(shape, device=device) * 0.02)
            parameter.grad = torch.randn(shape, device=device) * 1e-3
            self.register_parameter(name.replace(".", "_"), parameter)


def seconds_of(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--providers", nargs="+", default=["torch", "deepspeed"], choices=["torch", "apex", "deepspeed"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    models = {name: Weights(device) for name in args.providers}
    optimizers = {
        name: build_optimizer(model, OptimizerConfig(learning_rate=1e-4, provider=name))
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for optimizer in optimizers.values():
        for _ in range(2):
            seconds_of(optimizer, device)
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            seconds[name].append(seconds_of(optimizer, device))
    first = args.providers[0]
    count = sum(p.numel() for p in models[first].parameters())
    results = {
        name: {
            "seconds": statistics.median(times),
            f"times_{first}": statistics.median(t / f for t, f in zip(times, seconds[first])),
        }
        for name, times in seconds.items()
    }
    if args.json:
        print(json.dumps({"parameters": count, "threads": args.threads, "device": args.device, "results": results}))
        return
    print(f"{count / 1e6:.1f}M float32 parameters, {args.device}, {args.threads} threads, {args.rounds} rounds")
    for name, result in results.items():
        print(f"{name:10s} {result['seconds'] * 1e3:8.1f} ms {result[f'times_{first}']:6.2f} times {first}'s")


if __name__ == "__main__":
    main()
