"""Where the time of our training step goes: seconds by part of the model, as a share of the step and of the matmul peak.

    python benchmarks/step_parts.py [--precision bf16] [--steps 5]     # the parts of the reference step
    python benchmarks/step_parts.py --scaling                          # tokens/s against sequence, experts and layers

Parts are timed in place, forward and backward, by hooks around the modules. `rest` is what lies between them: residual
additions, embedding, autograd itself. FLOPs are those of `qwen_moe/models/flops.py` (backward twice forward).
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from train_step import SHAPE, adamw  # type: ignore[import-not-found]  # the script beside this one

from parallel.heap import keep_freed_memory
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.attention.gqa import Attention
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.feed_forward import FeedForward
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.init import build_model
from qwen_moe.models.moe.block import MoE
from qwen_moe.models.moe.dispatch import Arrived
from qwen_moe.models.moe.experts import Experts
from qwen_moe.models.moe.router import Router
from qwen_moe.models.norm import RMSNorm
from qwen_moe.models.ops.compiled import compile_kernels
from qwen_moe.runs.recorder import measure_matmul_peak

MANY = "8 active of "
PARTS = {Attention: "attention", Router: "router", FeedForward: "shared expert", RMSNorm: "norms"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _OnBackward(torch.autograd.Function):
    """Identity. Calls ``note`` when backward comes through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, note: Callable[[], None]) -> torch.Tensor:
        ctx.note = note
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.note()
        return grad_outputs[0], None


class PartClock:
    """Adds up the seconds between the hooks of a module's forward and of its backward, by the part it belongs to."""

    def __init__(self, model: DecoderLM) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._begun: dict[tuple[int, str], float] = {}
        for module in model.modules():
            name = "moe" if isinstance(module, MoE) else PARTS.get(type(module))
            if name is not None:
                self._watch(module, name)
            elif isinstance(module, Experts):
                self._watch_experts(module)

    def _watch_experts(self, experts: Experts) -> None:
        """Torch's backward hooks see no rows that a module is given in a list, as `Experts` is."""
        inner, name = experts.compute, "experts"

        def begin(direction: str) -> None:
            self._begun[id(experts), direction] = time.perf_counter()

        def end(direction: str) -> None:
            self.seconds[name] += time.perf_counter() - self._begun.pop((id(experts), direction))

        def compute(arrived: Arrived) -> torch.Tensor:
            begin("forward")
            states = _OnBackward.apply(arrived.states, lambda: end("backward"))
            y = inner(arrived._replace(states=states))
            end("forward")
            return _OnBackward.apply(y, lambda: begin("backward"))

        experts.compute = compute  # type: ignore[method-assign]

    def _watch(self, module: nn.Module, name: str) -> None:
        def begin(direction: str) -> Any:
            def hook(*_: Any) -> None:
                self._begun[id(module), direction] = time.perf_counter()

            return hook

        def end(direction: str) -> Any:
            def hook(*_: Any) -> None:
                self.seconds[name] += time.perf_counter() - self._begun.pop((id(module), direction))

            return hook

        module.register_forward_pre_hook(begin("forward"))
        module.register_forward_hook(end("forward"))
        module.register_full_backward_pre_hook(begin("backward"))
        module.register_full_backward_hook(end("backward"))


def measure(config: ModelConfig, dtype: torch.dtype, batch: int, sequence: int, steps: int) -> dict[str, float]:
    """Median seconds of a step by part, after two steps of warm-up, and ``step``, the whole."""
    model = build_model(config, 0, dtype)
    model.train()
    optimizer = adamw(model.parameters())
    clock = PartClock(model)
    tokens = torch.randint(0, config.vocab_size, (batch, sequence + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    inner = model.cross_entropy

    def head(*args: Any) -> torch.Tensor:
        begin = time.perf_counter()
        loss = inner(*args)
        clock.seconds["head and loss"] += time.perf_counter() - begin
        return loss

    model.cross_entropy = head
    found: list[dict[str, float]] = []
    for _ in range(steps + 2):
        clock.seconds.clear()
        begin = time.perf_counter()
        (model.loss_sums(inputs, labels).cross_entropy / labels.numel()).backward()
        before = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        found.append(dict(clock.seconds) | {"optimizer": end - before, "step": end - begin})
    return {name: statistics.median(one[name] for one in found[2:]) for name in found[-1]}


def parts(precision: str, steps: int) -> None:
    batch, sequence = 4, 512
    config = parse_model(SHAPE, "benchmark")
    peak = measure_matmul_peak(DTYPES[precision], torch.device("cpu"))
    seconds = measure(config, DTYPES[precision], batch, sequence, steps)
    whole = seconds.pop("step")
    seconds["permutation"] = seconds.pop("moe") - sum(seconds[name] for name in ("experts", "router", "shared expert"))
    seconds["rest"] = whole - sum(seconds.values())
    flops = flops_per_token(config, sequence)
    work = {
        "attention": flops.attention_projections + flops.attention_scores,
        "experts": flops.routed_experts,
        "shared expert": flops.shared_expert,
        "router": flops.router,
        "head and loss": flops.head,
    }
    tokens = batch * sequence
    print(
        f"{precision}: {tokens / whole:,.0f} tokens/s, {3 * flops.forward * tokens / whole / peak:.0%} of the matmul peak"
    )
    print(f"{'part':16s}{'ms':>8s}{'of step':>9s}{'of peak':>9s}")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        rate = f"{3 * work[name] * tokens / value / peak:9.0%}" if name in work else f"{'':9s}"
        print(f"{name:16s}{value * 1e3:8.0f}{value / whole:9.1%}{rate}")


def scaling(precision: str, steps: int) -> None:
    """2,048 tokens a step (8,192 where a sequence is that long, or with 8 active experts); the model is half as wide as the
    reference."""
    base = SHAPE | {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}
    base |= {"num_hidden_layers": 4, "max_position_embeddings": 8192}
    cases: list[tuple[str, dict[str, Any], int]] = [(f"sequence {s}", {}, s) for s in (512, 1024, 2048, 4096, 8192)]
    cases += [(f"experts {e}", {"num_experts": e}, 512) for e in (8, 16, 32, 64, 128)]
    cases += [(f"layers {n}", {"num_hidden_layers": n}, 512) for n in (2, 4, 8, 16)]
    cases += [(f"{MANY}{e}", {"num_experts": e, "num_experts_per_tok": 8}, 512) for e in (16, 128, 256)]
    dtype = DTYPES[precision]
    peak = measure_matmul_peak(dtype, torch.device("cpu"))
    print(f"{'case':16s}{'tokens/s':>10s}{'MFLOP/token':>13s}{'of peak':>9s}")
    for name, change, sequence in cases:
        config = parse_model(base | change, name)
        batch = max(1, (8192 if name.startswith(MANY) else 2048) // sequence)
        step = measure(config, dtype, batch, sequence, steps)["step"]
        flops = flops_per_token(config, sequence).training
        speed = batch * sequence / step
        print(f"{name:16s}{speed:10,.0f}{flops / 1e6:13.1f}{speed * flops / peak:9.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    compile_kernels(not args.no_compile)
    if args.scaling:
        scaling(args.precision[0], args.steps)
        return
    for precision in args.precision:
        parts(precision, args.steps)


if __name__ == "__main__":
    main()
