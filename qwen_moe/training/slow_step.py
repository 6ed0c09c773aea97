"""A line that says why a step takes more than a minute."""

import os
import threading
import time
from collections.abc import Callable

from launchers.counted import counted
from qwen_moe.config import RunConfig
from qwen_moe.models.flops import flops_per_token

PATIENCE = 60.0  # seconds that one step may take before the notice


def slow_step_reason(
    step: int, flops: float, peak: float, compiling: bool, load: float | None, cores: int, seconds: float
) -> str:
    """One sentence. ``flops``: of the step; ``peak``: FLOP/s of all ranks together; ``load``: the machine's load average."""
    text = f"step {step} has taken more than {seconds:.0f} s"
    if compiling:
        text += ": it compiles kernels, once per machine and model (precision.compile=never turns this off)"
    else:
        text += (
            f": it is {flops / 1e9:,.0f} GFLOP, at least {flops / peak:,.0f} s at the measured matmul peak of "
            f"{peak / 1e9:,.0f} GFLOP/s (smaller training.global_batch_size or model: shorter steps)"
        )
    if load is not None and load > 1.5 * cores:
        text += f"; other programs use this machine too (load {load:.1f} on {counted(cores, 'core')})"
    return text


class SlowStepNotice:
    """Calls ``say`` at most once per run, from its own thread, when a step takes longer than `PATIENCE`.

    ``peak``: measured FLOP/s of all ranks together.
    """

    def __init__(self, say: Callable[[str], None], config: RunConfig, peak: float) -> None:
        self._say, self._peak = say, peak
        self._flops = config.tokens_per_step * flops_per_token(config.model, config.data.sequence_length).training
        self._current: tuple[int, float, bool] | None = None  # step, when it began, whether it compiles
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="slow-step", daemon=True)
        self._thread.start()

    def begin_step(self, step: int, compiling: bool) -> None:
        self._current = (step, time.monotonic(), compiling)

    def end_step(self) -> None:
        self._current = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(PATIENCE / 60):
            current = self._current
            if current is None or time.monotonic() - current[1] < PATIENCE:
                continue
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
            step, _, compiling = current
            cores = os.cpu_count() or 1
            self._say(slow_step_reason(step, self._flops, self._peak, compiling, load, cores, PATIENCE))
            return
