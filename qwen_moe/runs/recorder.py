"""Records a run: metrics.jsonl, other recorders and the progress bar; and measures the matmul peak for comparison."""

import contextlib
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from launchers.folder.atomic import write_text
from launchers.folder.run_folder import METRICS
from parallel.gemm import has_hardware
from qwen_moe.config import RunConfig
from qwen_moe.progress import style
from qwen_moe.runs.records import DamagedRecords, read_lines
from qwen_moe.runs.sinks import Sink, not_recorded, open_sinks


def measure_matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a square matmul on this process's device and threads: the best of repeated timings.

    Measures float32 where matmuls of ``dtype`` are computed in float32 (`parallel.gemm`), and for float64 on a GPU.
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
    """The highest memory use of this process so far, in bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class MetricsLog:
    """Appends one JSON line per record. A resumed run first drops the lines of steps that it will repeat."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []  # records that could not be written yet
        self._rewind: int | None = resumed_step
        self._file: io.FileIO | None = None
        self._size = 0
        self._write_waiting()

    def write(self, record: dict[str, Any]) -> None:
        """Append ``record``. Raises OSError if the file cannot be written; the record then waits for the next call."""
        self.waiting.append(record)
        self._write_waiting()

    def go_back(self, step: int) -> None:
        """Drop the lines after ``step``. If it raises OSError, the lines are dropped before the next record is written."""
        self.waiting = [record for record in self.waiting if record["step"] <= step]
        self._rewind = step if self._rewind is None else min(step, self._rewind)
        self._write_waiting()

    def close(self) -> None:
        """Close the file. Raises OSError if waiting records could not be written; they are lost."""
        try:
            self._write_waiting()
        finally:
            self._leave()

    def _write_waiting(self) -> None:
        try:
            if self._rewind is not None:
                self._drop_after(self._rewind)
                self._rewind = None
            if self._file is None:
                # Reopen after a failure: the old handle may belong to a file server that was unreachable.
                self._file = io.FileIO(self.path, "a")
                self._size = min(self._size, os.fstat(self._file.fileno()).st_size)
                self._file.truncate(self._size)  # remove a partial line
            content = "".join(json.dumps(record) + "\n" for record in self.waiting).encode()
            rest = memoryview(content)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._leave()
            raise
        self._size += len(content)
        self.waiting.clear()

    def _drop_after(self, step: int) -> None:
        self._leave()
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        content = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(self.path, content)
        self._size = len(content.encode())

    def _leave(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _progress(record: dict[str, Any]) -> str:
    """What a step's line in the bar begins with. The loss of a policy that learns from its own samples says little."""
    return f"reward {record['reward']:.3f}" if "reward" in record else f"loss {record['loss']:.3f}"


def open_recorder(config: RunConfig, *, resumed_step: int) -> "Recorder":
    """The recorder that the recipe configures. Every rank must call it."""
    sinks, warnings = open_sinks(config, resumed_step=resumed_step) if dist.get_rank() == 0 else ([], [])
    recorder = Recorder(config.run_dir, resumed_step=resumed_step, train_steps=config.train_steps, sinks=sinks)
    for warning in warnings:
        recorder.say(warning)
    return recorder


class Recorder:
    """Rank 0's records of the run for users and tools; on other ranks every method does nothing.

    If a destination fails, the recorder warns once and training continues. Records that metrics.jsonl could not take are
    written later; a sink that fails is dropped.
    """

    def __init__(self, run_dir: Path, *, resumed_step: int, train_steps: int, sinks: Sequence[Sink] = ()) -> None:
        self.active = dist.get_rank() == 0
        if not self.active:
            return
        self.log = MetricsLog(run_dir / METRICS, resumed_step)
        self._log_failed = False
        self.sinks = list(sinks)
        self.bar = tqdm(total=train_steps, initial=resumed_step, desc="train", unit="step", **style(log_seconds=30.0))

    def step(self, record: dict[str, Any]) -> None:
        """Record one training step and show it in the bar."""
        if not self.active:
            return
        self._record(record)
        share = record.get("share_of_peak", 0.0)
        self.bar.set_postfix_str(
            f"{_progress(record)}, {record['tokens_per_second']:,.0f} tokens/s, {share:.0%} of matmul peak",
            refresh=False,
        )
        self.bar.update(1)

    def begin(self, work: str) -> None:
        """Show ``work`` beside the bar until the first step is done. A first step compiles, reads files for the first time
        and allocates, so it does not enter the estimate of the remaining time."""
        if self.active:
            self.bar.set_postfix_str(work, refresh=True)

    def first_step_done(self) -> None:
        """Base the estimate of the remaining time on the steps from here on."""
        if not self.active:
            return
        # Not bar.reset: it draws a bar of no steps, whose speed is negative.
        self.bar.initial = self.bar.last_print_n = self.bar.n
        self.bar.start_t = self.bar.last_print_t = self.bar._time()  # type: ignore[attr-defined]  # tqdm's own clock

    def go_back(self, step: int, record: dict[str, Any], message: str) -> None:
        """Drop the records after ``step``, and record and print the reason."""
        if not self.active:
            return
        self._log(lambda: self.log.go_back(step))
        self._each_sink(lambda sink: sink.go_back(step))
        self.bar.n = step
        self.event(record, message)

    def event(self, record: dict[str, Any], message: str) -> None:
        """Record a validation or another event, and print ``message``."""
        if not self.active:
            return
        self._record(record)
        self.say(message)

    def say(self, message: str) -> None:
        if self.active:
            self.bar.write(message, file=sys.stderr)

    def _record(self, record: dict[str, Any]) -> None:
        self._log(lambda: self.log.write(record))
        self._each_sink(lambda sink: sink.write(record))

    def _log(self, work: Callable[[], None]) -> None:
        try:
            work()
            self._log_failed = False
        except (OSError, DamagedRecords) as error:
            if not self._log_failed:
                self.say(f"warning: {METRICS} cannot be written ({error}); its records wait for a later step")
            self._log_failed = True

    def _each_sink(self, work: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                work(sink)
            except Exception as error:
                self.sinks.remove(sink)
                self.say(not_recorded(sink.name, error))

    def close(self) -> None:
        if not self.active:
            return
        self.bar.close()
        try:
            self.log.close()
        except (OSError, DamagedRecords) as error:
            self.say(f"warning: the last {len(self.log.waiting)} records are missing in {self.log.path} ({error})")
        self._each_sink(lambda sink: sink.close())
