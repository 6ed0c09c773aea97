"""Training step (forward, backward, AdamW) of qwen-moe against transformers' Qwen2MoeForCausalLM on one machine.

    python benchmarks/train_step.py [--precision bf16 mixed fp32] [--rounds 5] [--sequences 4] [--no-compile] [--json]

Both sides have the same weights and the same batch, and take turns: A B A B ... in one process, so that a machine whose
speed drifts slows both. Reported are medians, and the median of the ratios pair by pair. Peak memory is measured in a
process of its own for each side. Reference shape: vocabulary 8192, hidden 512, 8 layers, 8 heads, 4 KV heads, 16 experts
of 256, 4 active, shared expert of 512, batch 4 x 512.

``bf16``: weights, gradients and optimizer states in bf16 on both sides. ``mixed``: ours with fp32 master weights and bf16
compute (FSDP2's mixed precision on one rank, as `qwen-moe train` runs it) against the fp32 model under bf16 autocast.
``fp32``: fp32 throughout on both sides.
"""

import argparse
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

from qwen_moe.config import ModelConfig, parse_model
from qwen_moe.models.decoder import DecoderLM
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.init import build_model
from qwen_moe.models.ops.compiled import compile_kernels, compiling
from qwen_moe.runs.recorder import measure_matmul_peak

ROWS, SEQUENCE = 4, 512
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


def fastest_experts(precision: str, rows: int) -> str:
    """The quickest experts implementation that transformers offers here, each tried on two steps after a warm-up."""
    seconds = {}
    # Not "batched_mm": it copies expert weights per token, 50 GB at this shape.
    for name in ("grouped_mm", "eager"):
        try:
            step, _ = theirs(precision, name, rows)
            step()
            start = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - start
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"transformers' {name} experts do not run here: {error}", file=sys.stderr)
    return min(seconds, key=lambda name: seconds[name])


def compare(precision: str, rounds: int, rows: int) -> dict[str, Any]:
    """Interleaved timings of both sides, and their agreement on the first loss."""
    experts = fastest_experts(precision, rows)
    our_step, _ = ours(precision, rows)
    their_step, _ = theirs(precision, experts, rows)
    begin = time.perf_counter()
    our_loss = our_step()
    first = time.perf_counter() - begin
    their_loss = their_step()
    our_step(), their_step()
    our_seconds: list[float] = []
    their_seconds: list[float] = []
    for _ in range(rounds):
        for step, seconds in ((our_step, our_seconds), (their_step, their_seconds)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    tokens = rows * SEQUENCE
    return {
        "precision": precision,
        "transformers_experts": experts,
        "seconds_of_our_first_step": first,
        "first_loss": {"ours": our_loss, "transformers": their_loss},
        "seconds": {"ours": statistics.median(our_seconds), "transformers": statistics.median(their_seconds)},
        "tokens_per_second": {
            "ours": tokens / statistics.median(our_seconds),
            "transformers": tokens / statistics.median(their_seconds),
        },
        "speed_ratio": statistics.median(b / a for a, b in zip(our_seconds, their_seconds)),
        "peak_memory_gb": {
            "ours": _peak_memory("ours", precision, experts, rows),
            "transformers": _peak_memory("theirs", precision, experts, rows),
        },
    }


def _peak_memory(side: str, precision: str, experts: str, rows: int) -> float:
    """Peak resident memory, GB, of a process that does three steps of one side."""
    command = [sys.executable, __file__, "--memory-of", side, precision, experts, "--sequences", str(rows)]
    command += [] if compiling() else ["--no-compile"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _report_memory(side: str, precision: str, experts: str, rows: int) -> None:
    step, _ = ours(precision, rows) if side == "ours" else theirs(precision, experts, rows)
    for _ in range(3):
        step()
    # VmHWM, not ru_maxrss: the latter begins at the memory of the process that forked this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "mixed", "fp32"), default=["bf16", "mixed", "fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=ROWS, help="of a batch (where a step takes minutes)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true", help="ours as a short run has it: without torch.compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compile_kernels(not args.no_compile)
    if args.memory_of:
        side, precision, experts = args.memory_of
        _report_memory(side, precision, experts, args.sequences)
    flops = flops_per_token(reference_config(), SEQUENCE).training
    results = []
    for precision in args.precision:
        peak = measure_matmul_peak(torch.float32 if precision == "fp32" else torch.bfloat16, torch.device("cpu"))
        result = compare(precision, args.rounds, args.sequences)
        result["matmul_peak_gflops"] = peak / 1e9
        result["share_of_peak"] = {k: v * flops / peak for k, v in result["tokens_per_second"].items()}
        results.append(result)
    if args.json:
        facts = {"torch": torch.__version__, "processor": platform.processor(), "threads": args.threads}
        print(json.dumps(facts | {"mflop_per_token": flops / 1e6, "results": results}, indent=1))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {flops / 1e6:.0f} MFLOP per token, {args.rounds} rounds")
    print(f"{'':10s}{'ours':>12s}{'transformers':>14s}{'ratio':>8s}{'of peak':>9s}{'GB ours':>9s}{'GB theirs':>11s}")
    for r in results:
        speed = r["tokens_per_second"]
        print(
            f"{r['precision']:10s}{speed['ours']:>8,.0f} t/s{speed['transformers']:>10,.0f} t/s"
            f"{r['speed_ratio']:>8.2f}{r['share_of_peak']['ours']:>9.0%}{r['peak_memory_gb']['ours']:>9.2f}"
            f"{r['peak_memory_gb']['transformers']:>11.2f}   first loss {r['first_loss']['ours']:.4f} and "
            f"{r['first_loss']['transformers']:.4f}, their experts {r['transformers_experts']}, our first step (compiles) "
            f"{r['seconds_of_our_first_step']:.0f} s"
        )


if __name__ == "__main__":
    main()
