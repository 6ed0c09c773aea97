"""The parts of `tests.gpu.report`: each checks one thing on a device and prints a row for every finding.

    python -m tests.gpu.parts NAME --device cuda [--tiny]

A row is ok, failed or skipped with the reason, and has a value, with its bound where there is one.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.gpu.report import MARK
from tests.gpu.rows import Row, Where, check, error_of, skipped


def environment(where: Where) -> Iterator[Row]:
    name = torch.cuda.get_device_name() if where.cuda else f"CPU ({platform.machine()})"
    yield Row("device", "ok", name)
    yield Row("python", "ok", platform.python_version())
    yield Row("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}")
    if where.cuda:
        properties = torch.cuda.get_device_properties(where.device)
        memory, capability = properties.total_memory / 2**30, (properties.major, properties.minor)
        yield Row("device memory", "ok", f"{memory:.0f} GiB, compute capability {capability[0]}.{capability[1]}")
        yield Row("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
        yield Row("cuDNN", "ok", str(torch.backends.cudnn.version()))
    for package in ("triton", "transformers", "megatron-core", "transformer-engine", "deepspeed", "apex"):
        try:
            yield Row(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield skipped(package, "not installed")
    from parallel.kernels.transformer_engine import KernelsUnavailable, load_transformer_engine

    try:
        load_transformer_engine()
        yield Row("Transformer Engine imports", "ok", "yes")
    except KernelsUnavailable as error:
        yield skipped("Transformer Engine imports", error)


def grouped_products(where: Where) -> Iterator[Row]:
    """Our grouped product in bf16 against float64, forward and backward, with empty and crowded experts."""
    from qwen_moe.models.ops.grouped_matmul import grouped_mm
    from tests.models.grouped_loop import loop_mm

    experts, inner, outer, rows = (4, 32, 64, 64) if where.tiny else (128, 2048, 1536, 16384)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, outer, inner, generator=generator)
    for name, share in (("balanced", torch.ones(experts)), ("one expert", F.one_hot(torch.tensor(1), experts).float())):
        counts = torch.bincount(
            torch.multinomial(share, rows, replacement=True, generator=generator), minlength=experts
        )
        x, dy = torch.randn(rows, inner, generator=generator), torch.randn(rows, outer, generator=generator)
        results = []
        for mm, dtype in ((grouped_mm, torch.bfloat16), (loop_mm, torch.float32)):
            a = x.to(torch.bfloat16).to(where.device, dtype).requires_grad_()
            w = weight.to(torch.bfloat16).to(where.device, dtype).requires_grad_()
            y = mm(a, w, counts.to(where.device))
            y.backward(dy.to(torch.bfloat16).to(where.device, dtype))
            results.append((y.detach(), a.grad, w.grad))
        for part, got, expected in zip(("output", "input gradient", "weight gradient"), *results):
            yield check(f"{name}: {part} against float32", error_of(got, expected), 0.01)


def attention(where: Where) -> Iterator[Row]:
    """Causal grouped-query attention by each of torch's fused kernels against float32 arithmetic."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, kv_heads, sequence, dim = (1, 4, 2, 64, 16) if where.tiny else (2, 32, 4, 2048, 128)
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, sequence, dim), *[(batch, kv_heads, sequence, dim)] * 2]
    tensors = [torch.randn(shape, generator=generator).to(where.device, torch.bfloat16) for shape in shapes]
    dy = torch.randn(batch, heads, sequence, dim, generator=generator).to(where.device, torch.bfloat16)

    def run(dtype: torch.dtype, backend: SDPBackend) -> list[torch.Tensor]:
        q, k, v = (t.to(dtype).detach().requires_grad_() for t in tensors)
        with sdpa_kernel([backend]):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y.backward(dy.to(dtype))
        return [y.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]

    expected = run(torch.float32, SDPBackend.MATH)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            got = run(torch.bfloat16, backend)
        except RuntimeError as error:
            yield skipped(backend.name.lower(), error)
            continue
        worst = max(error_of(mine, theirs) for mine, theirs in zip(got, expected))
        yield check(f"{backend.name.lower()}: output and gradients", worst, 0.02)


def long_attention(where: Where) -> Iterator[Row]:
    """Attention inside documents, and in the pieces of context parallelism, against float64 arithmetic with a mask."""
    from qwen_moe.data.samples import documents_of
    from qwen_moe.models.attention.core import attend
    from qwen_moe.models.attention.mask import Span, Visibility
    from qwen_moe.models.ops.piece_attention import piece_attention
    from qwen_moe.verify.reference import plain_attention

    batch, heads, kv_heads, sequence, dim = (2, 4, 2, 64, 16) if where.tiny else (2, 16, 4, 1024, 128)
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, sequence, heads, dim), *[(batch, sequence, kv_heads, dim)] * 2, (batch, sequence, heads, dim)]
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    starts = documents_of(torch.rand(batch, sequence, generator=generator) < 8 / sequence)["document_starts"]

    def run(core: Any, device: torch.device, dtype: torch.dtype, documents: bool) -> list[torch.Tensor]:
        q, k, v, dy = (t.to(device, dtype).requires_grad_() for t in tensors)
        visible = Visibility(starts=starts.to(device) if documents else None)
        y = core(q, k, v, visible, dim**-0.5)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    def in_pieces(q: Any, k: Any, v: Any, visible: Visibility, scale: float) -> torch.Tensor:
        half = sequence // 2
        halves = (Span(0, half, 0), Span(half, sequence, half))
        return piece_attention(q, k, v, visible.pieces(halves, halves), scale)

    for documents in (False, True):
        expected = run(plain_attention, torch.device("cpu"), torch.float64, documents)
        for name, core in (("attend", attend), ("pieces", in_pieces)):
            for dtype, bound in ((torch.bfloat16, 0.02), (torch.float32, 1e-3)):
                what = f"{name}, {'documents' if documents else 'causal'}, {str(dtype)[6:]}: output and gradients"
                try:
                    worst = max(map(error_of, run(core, where.device, dtype, documents), expected))
                except RuntimeError as error:
                    yield Row(what, "failed", str(error)[:300])
                    continue
                yield check(what, worst, bound)


def generation(where: Where) -> Iterator[Row]:
    """Tokens drawn in float32 on the device against float64 on the CPU: prompts of many lengths at once, answers that share
    a prompt, dual chunk attention, and sparse prefill that keeps nearly everything."""
    from qwen_moe.config import parse_model
    from qwen_moe.generation.engine import Engine
    from qwen_moe.generation.extension import extended
    from qwen_moe.generation.runner import LocalRunner
    from qwen_moe.generation.sampling import Sampling
    from qwen_moe.models.attention.sparse import SparseSettings
    from qwen_moe.models.init import build_model

    shape = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128, "max_position_embeddings": 256, "initializer_range": 0.2,
    }  # fmt: skip
    config = parse_model({"family": "qwen2_moe", **shape}, "generation")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in (3, 40, 117, 64)]
    long = [torch.randint(0, 512, (n,), generator=generator).tolist() for n in (700, 300)]
    sampling = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, samples=3)
    for name, texts, sparse in (
        ("prompts of many lengths", prompts, None),
        ("dual chunk attention", long, None),
        ("sparse prefill", long, SparseSettings(kept_share=1.0, threshold=256)),
    ):
        reading = extended(config, "auto", max(map(len, texts)) + sampling.max_new_tokens)
        drawn, error = [], ""
        for device, dtype in ((torch.device("cpu"), torch.float64), (where.device, torch.float32)):
            model = build_model(config, 0, torch.float64).to(device, dtype).eval()
            try:
                engine = Engine(LocalRunner(model), reading, sparse=sparse)
                drawn.append([answer for answers in engine.generate(texts, sampling) for answer in answers])
            except RuntimeError as failure:
                error = str(failure)[:300]
        if error:
            yield Row(name, "failed", error)
            continue
        pairs = [(a, b) for x, y in zip(*drawn, strict=True) for a, b in zip(x.tokens, y.tokens, strict=False)]
        yield check(f"{name}: share of tokens that differ", sum(a != b for a, b in pairs) / len(pairs), 0.1)
        first = [
            abs(x.log_probs[0] - y.log_probs[0]) for x, y in zip(*drawn, strict=True) if x.tokens[0] == y.tokens[0]
        ]
        yield check(f"{name}: log-probability of the first token", max(first), 1e-3)


def host_reads(where: Where) -> Iterator[Row]:
    """An MoE layer at ep = 1 while CUDA raises on every wait of the host."""
    from benchmarks.gpu_contenders import TINY, Size, run_config
    from qwen_moe.models.moe.block import MoE

    size = TINY if where.tiny else Size(batch=1)
    with torch.device(where.device):
        moe = MoE(run_config(size, {}).model).to(torch.bfloat16)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(size.batch, size.sequence, size.hidden, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        moe(x)[0].backward(torch.ones_like(x))

    step()
    if not where.cuda:
        yield skipped("no wait of the host in an MoE layer", "needs CUDA; the layer ran")
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        yield Row("no wait of the host in an MoE layer", "ok", "forward and backward")
    except RuntimeError as error:
        yield Row("no wait of the host in an MoE layer", "failed", str(error)[:300])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def layers(where: Where) -> Iterator[Row]:
    """A small model in bf16 on the device against float64 on the CPU: loss and gradient norm."""
    from qwen_moe.config import parse_model
    from qwen_moe.models.init import build_model

    shape = {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "initializer_range": 0.05,
    }  # fmt: skip
    tokens = torch.randint(0, 512, (4, 129), generator=torch.Generator().manual_seed(0))
    for family, more in (("qwen2_moe", {"shared_expert_intermediate_size": 64}), ("qwen3_moe", {"head_dim": 32})):
        config, figures = parse_model(shape | more | {"family": family}, "test"), []
        for device, dtype in ((where.device, torch.bfloat16), (torch.device("cpu"), torch.float64)):
            model = build_model(config, 0, torch.float64).to(dtype).to(device)
            ids = tokens.to(device)
            loss = model.loss_sums(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).cross_entropy / (4 * 128)
            loss.backward()
            norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
            figures.append((float(loss.detach()), float(norm)))
        for what, got, expected in zip(("loss", "gradient norm"), *figures):
            yield check(f"{family}: {what} against float64", abs(got / expected - 1), 0.01 if what == "loss" else 0.05)


HERE, TRAINING = __name__, "tests.gpu.parts_training"
# Where each part is; imported when it is run, so that what is missing for one is not missed by others.
PARTS = {
    "environment": HERE,
    "grouped_products": HERE,
    "attention": HERE,
    "long_attention": HERE,
    "generation": HERE,
    "host_reads": HERE,
    "layers": HERE,
    "parity": TRAINING,
    "training": TRAINING,
    "checkpoint": TRAINING,
    "optimizers": TRAINING,
    "benchmark": TRAINING,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=sorted(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    part = getattr(importlib.import_module(PARTS[args.part]), args.part)
    for row in part(Where(device, args.tiny)):
        print(MARK + json.dumps(asdict(row)), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
