"""What a run records: metrics.jsonl, TensorBoard, the progress bar, and the matmul peak it compares itself with."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from parallel.gemm import has_hardware
from qwen_moe.runs.records import METRICS, read_lines


def measure_matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a square matmul on this process's device and threads: the best of repeated timings.

    Of float32 where products of ``dtype`` are computed in float32 (`parallel.gemm`), and for float64 on a GPU.
    """
    size = 1024 if device.type == "cpu" else 8192
    if (dtype == torch.float64 and device.type == "cuda") or (device.type == "cpu" and not has_hardware(dtype)):
        dtype = torch.float32
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Highest memory use of this process so far, bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class MetricsLog:
    """Appends one JSON line per record. A resumed run first drops the lines of steps that it will do again."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] <= resumed_step]
        temporary = path.with_name(path.name + ".partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Recorder:
    """Rank 0's view of the run for people and tools; on other ranks every method does nothing."""

    def __init__(self, run_dir: Path, *, resumed_step: int, train_steps: int, tensorboard: bool) -> None:
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        self.log = MetricsLog(run_dir / METRICS, resumed_step)
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)
        # A terminal is redrawn often; a log file gets a line a minute at most.
        interval = 0.2 if sys.stderr.isatty() else 30
        self.bar = tqdm(
            total=train_steps,
            initial=resumed_step,
            desc="train",
            unit="step",
            file=sys.stderr,
            mininterval=interval,
            maxinterval=interval,
            dynamic_ncols=True,
        )

    def step(self, record: dict[str, Any]) -> None:
        """One training step: written, and shown in the bar."""
        if not self.active:
            return
        self.log.write(record)
        self._tensorboard(record)
        share = record.get("share_of_peak", 0.0)
        self.bar.set_postfix_str(
            f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s, {share:.0%} of matmul peak",
            refresh=False,
        )
        self.bar.update(1)

    def begin(self, work: str) -> None:
        """Show ``work`` beside the bar until the first step is done. Its time is left out of the time that is shown as left:
        a first step compiles, reads files for the first time and allocates."""
        if self.active:
            self.bar.set_postfix_str(work, refresh=True)

    def first_step_done(self) -> None:
        """Estimate the time that is left from here on."""
        if not self.active:
            return
        done = self.bar.n
        self.bar.initial = done
        self.bar.reset()
        self.bar.n = self.bar.last_print_n = done

    def go_back(self, step: int, record: dict[str, Any], message: str) -> None:
        """Forget what was recorded after ``step``, and say why."""
        if not self.active:
            return
        self.log.close()
        self.log = MetricsLog(self.log.path, step)
        self.bar.n = step
        self.event(record, message)

    def event(self, record: dict[str, Any], message: str) -> None:
        """A validation or another thing worth a line of its own."""
        if not self.active:
            return
        self.log.write(record)
        self._tensorboard(record)
        self.say(message)

    def say(self, message: str) -> None:
        if self.active:
            self.bar.write(message, file=sys.stderr)

    def _tensorboard(self, record: dict[str, Any]) -> None:
        if self.writer is None:
            return
        for name, value in record.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.log.close()
            if self.writer is not None:
                self.writer.close()
