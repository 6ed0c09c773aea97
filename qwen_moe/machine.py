"""Facts about this machine: cores, memory, and how it computes matmuls and how fast (`qwen-moe info --machine`)."""

import os
import platform
from pathlib import Path
from typing import Any

from launchers.counted import counted


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_facts() -> dict[str, Any]:
    """Measure this machine with this process's threads, in about a second. Rates are FLOP/s of a square matmul."""
    import torch

    from parallel.gemm import description, has_hardware
    from parallel.threads import available_cpus
    from qwen_moe.models.ops.compiled import missing_compiler
    from qwen_moe.runs.recorder import measure_matmul_peak

    cpu = torch.device("cpu")
    products = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        products[name] = {
            "in_hardware": has_hardware(dtype),
            "flops_per_second": measure_matmul_peak(dtype, cpu, seconds=0.2),
            "how": description(dtype),
        }
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "processor": _processor(),
        "cores": available_cpus()[0],
        "threads": torch.get_num_threads(),
        "memory_bytes": pages,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "products": products,
        "missing_compiler": missing_compiler("cpu"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def machine_text(facts: dict[str, Any]) -> str:
    """Human-readable summary of `machine_facts`."""
    memory = f", {facts['memory_bytes'] / 1e9:.0f} GB of memory" if facts["memory_bytes"] else ""
    load = f", load {facts['load']:.1f}" if facts["load"] is not None else ""
    lines = [
        facts["processor"],
        f"  {counted(facts['cores'], 'core')}, {counted(facts['threads'], 'thread')}{memory}{load}; torch "
        f"{facts['torch']} with "
        f"{facts['vector_instructions']}",
    ]
    for entry in facts["products"].values():
        lines.append(f"  {entry['flops_per_second'] / 1e9:8,.0f} GFLOP/s  {entry['how']}")
    compiler = facts["missing_compiler"]
    lines.append(f"  elementwise chains: {'not compiled, no ' + compiler if compiler else 'compiled by torch.compile'}")
    lines.append(f"  GPUs: {', '.join(facts['gpus']) or 'none'}")
    return "\n".join(lines)
