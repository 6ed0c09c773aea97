"""Training step (forward, backward, AdamW) of qwen-moe against transformers' Qwen2MoeForCausalLM on one machine.

    python benchmarks/train_step.py [--precision bf16 mixed fp32] [--rounds 5] [--sequences 4] [--no-compile] [--json]

All sides have the same weights and the same batch. Each has a process of its own, as a user would run it, and they take
turns: A B C A B C ..., so that a machine whose speed drifts slows all. Reported are medians, and the median of the ratios of
the steps of one round. Reference shape: vocabulary 8192, hidden 512, 8 layers, 8 heads, 4 KV heads, 16 experts
of 256, 4 active, shared expert of 512, batch 4 x 512.

``bf16``: weights, gradients and optimizer states in bf16 on both sides. ``mixed``: ours with fp32 master weights and bf16
compute (FSDP2's mixed precision on one rank, as `qwen-moe train` runs it) against the fp32 model under bf16 autocast.
``fp32``: fp32 throughout on both sides.

Our process keeps the memory that it frees, in whole pieces, as every process of `qwen-moe train` on a CPU does
(`parallel.heap`). transformers runs twice: as it is, and with these settings.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.heap import heap_environment, keep_freed_memory
from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.init import build_model
from qwen_moe.models.ops.compiled import compile_kernels
from qwen_moe.runs.recorder import measure_matmul_peak

ROWS, SEQUENCE = 4, 512
WARM_UP = 2  # steps
OURS, THEIRS, THEIRS_KEPT = "ours", "transformers", "transformers-kept"  # the last keeps freed memory as ours does
SHAPE: dict[str, Any] = {
    "family": "qwen2_moe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
}
Step = Callable[[], float]


def reference_config() -> ModelConfig:
    return parse_model(SHAPE, "benchmark")


def batch(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[rows, 512]`` and the tokens that follow them."""
    tokens = torch.randint(0, SHAPE["vocab_size"], (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def ours(precision: str, rows: int = ROWS) -> tuple[Step, DecoderLM]:
    """One training step of ours; calling it returns the loss before the update."""
    config = reference_config()
    if precision == "mixed":
        model = _sharded(config)
    else:
        model = build_model(config, 0, torch.bfloat16 if precision == "bf16" else torch.float32)
    model.train()
    optimizer = adamw(model.parameters())
    inputs, labels = batch(rows)

    def step() -> float:
        sums = model.loss_sums(inputs, labels)
        loss = sums.cross_entropy / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, model


def _sharded(config: ModelConfig) -> DecoderLM:
    """With master weights and FSDP's mixed precision, as `qwen-moe train` does, on a mesh of one rank."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    from parallel.data import shard
    from parallel.mesh import Grids, Layout

    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    model = build_model(config, 0, torch.float32)
    grids = Grids(Layout(), "cpu")
    units: list[Any] = []
    for layer in model.model.layers:
        units += [(layer.mlp.experts, grids.expert_shard), (layer, grids.dense_shard)]
    shard(
        model,
        units,
        grids.dense_shard,
        compute_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        reshard_after_forward=False,
    )
    register_fsdp_forward_method(model, "loss_sums")
    return model


def theirs(precision: str, experts: str, rows: int = ROWS) -> tuple[Step, Any]:
    """The same step of transformers with the given experts implementation and SDPA attention."""
    import transformers

    config = reference_config()
    values = {key: value for key, value in SHAPE.items() if key != "family"}
    hf_config = transformers.Qwen2MoeConfig(
        **values,
        decoder_sparse_step=1,
        norm_topk_prob=config.norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        output_router_logits=False,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    model = transformers.Qwen2MoeForCausalLM(hf_config)
    source = build_model(config, 0, torch.float32).state_dict()
    state = {}
    for name, tensor in source.items():
        if name.endswith("expert_bias"):
            continue
        state[name] = tensor.flatten(1, 2) if name.endswith("gate_up_proj") else tensor
    model.load_state_dict(state)
    model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    optimizer = adamw(model.parameters())
    inputs, labels = batch(rows)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
            logits = model(input_ids=inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, model


class Side:
    """One side in a process of its own, which takes a step whenever it is asked to."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        self.name = name
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_memory_gb = 0.0
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--side", name, *arguments],
            env=os.environ | (heap_environment() if name.partition(" ")[0] != THEIRS else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> float:
        """Take a step and return its seconds. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print("step", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.name} ended")
        seconds, loss, self.peak_memory_gb = json.loads(answer)
        self.seconds.append(seconds)
        self.losses.append(loss)
        return float(seconds)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(side: str, precision: str, rows: int) -> None:
    """What a process of `Side` does: a line ``[seconds, loss, peak memory in GB]`` for each line that it reads."""
    name, _, experts = side.partition(" ")
    if name != THEIRS:
        keep_freed_memory()
    step, _ = ours(precision, rows) if name == OURS else theirs(precision, experts, rows)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        # VmHWM, not ru_maxrss: the latter begins at the memory of the process that forked this one.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(json.dumps([seconds, loss, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9]), flush=True)


def fastest_experts(arguments: list[str]) -> str:
    """The quickest experts implementation that transformers offers here, each tried on one step after a warm-up."""
    seconds = {}
    # Not "batched_mm": it copies expert weights per token, 50 GB at this shape.
    for name in ("grouped_mm", "eager"):
        side = Side(f"{THEIRS} {name}", arguments)
        try:
            side.step()
            seconds[name] = side.step()
        except RuntimeError as error:
            print(f"transformers' {name} experts do not run here: {error}", file=sys.stderr)
        side.end()
    return min(seconds, key=lambda name: seconds[name])


def compare(precision: str, rounds: int, arguments: list[str]) -> dict[str, Any]:
    """Timings of all sides in turns, and their agreement on the first loss."""
    arguments = ["--precision", precision, *arguments]
    experts = fastest_experts(arguments)
    sides = {name: Side(f"{name} {experts}", arguments) for name in (OURS, THEIRS, THEIRS_KEPT)}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    peaks = []
    for turn in range(WARM_UP + rounds):
        if turn >= WARM_UP:
            peaks.append(measure_matmul_peak(dtype, torch.device("cpu")))
        for side in sides.values():
            side.step()
    found: dict[str, Any] = {
        "precision": precision,
        "transformers_experts": experts,
        "matmul_peak": statistics.median(peaks),
    }
    for name, side in sides.items():
        timed = side.seconds[WARM_UP:]
        found[name] = {
            "seconds_of_first_step": side.seconds[0],
            "first_loss": side.losses[0],
            "seconds": statistics.median(timed),
            "seconds_of_ours": statistics.median(
                b / a for a, b in zip(sides[OURS].seconds[WARM_UP:], timed, strict=True)
            ),
            "peak_memory_gb": side.peak_memory_gb,
        }
        side.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "mixed", "fp32"), default=["bf16", "mixed", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=ROWS, help="of a batch (where a step takes minutes)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true", help="ours as a short run has it: without torch.compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compile_kernels(not args.no_compile)
    if args.side:
        serve(args.side, args.precision[0], args.sequences)
        return
    arguments = ["--sequences", str(args.sequences), "--threads", str(args.threads)]
    arguments += ["--no-compile"] if args.no_compile else []
    results = [compare(precision, args.rounds, arguments) for precision in args.precision]
    flops = flops_per_token(reference_config(), SEQUENCE).training
    if args.json:
        facts = {"torch": torch.__version__, "processor": platform.processor(), "threads": args.threads}
        print(json.dumps(facts | {"mflop_per_token": flops / 1e6, "results": results}, indent=1))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {flops / 1e6:.0f} MFLOP per token, {args.rounds} rounds")
    tokens = args.sequences * SEQUENCE
    for r in results:
        print(
            f"{r['precision']}: matmul peak {r['matmul_peak'] / 1e9:,.0f} GFLOP/s, transformers' fastest experts "
            f"{r['transformers_experts']}, our first step {r[OURS]['seconds_of_first_step']:.0f} s"
        )
        print(f"  {'':20s}{'tokens/s':>10s}{'ours faster':>13s}{'of peak':>9s}{'peak GB':>9s}{'first loss':>12s}")
        for name in (OURS, THEIRS, THEIRS_KEPT):
            side = r[name]
            speed = tokens / side["seconds"]
            print(
                f"  {name:20s}{speed:10,.0f}{side['seconds_of_ours']:13.2f}{speed * flops / r['matmul_peak']:9.0%}"
                f"{side['peak_memory_gb']:9.2f}{side['first_loss']:12.4f}"
            )


if __name__ == "__main__":
    main()
