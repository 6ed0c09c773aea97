"""The training loop, which every rank runs: build, resume, step, validate, checkpoint, stop."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launchers.folder.run_folder import CHECKPOINTS
from launchers.job.heartbeat import Heartbeat
from launchers.local.supervisor import INTERRUPTED, PROGRESS
from parallel.gemm import description
from parallel.hang_watch import MismatchError, compare_collectives
from parallel.process import ProcessInfo
from qwen_moe.checkpoint.distributed import CheckpointWriter, resume
from qwen_moe.checkpoint.preflight import check_disk_space
from qwen_moe.checkpoint.train_state import TrainState
from qwen_moe.checkpoint.valid import newest_valid
from qwen_moe.config import RunConfig
from qwen_moe.data.inputs import RunInputs, open_inputs
from qwen_moe.errors import UserError
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.ops.compiled import compiling
from qwen_moe.objectives.balance import maximum_violation
from qwen_moe.runs.attempt import record_attempt
from qwen_moe.runs.identity import saved_settings
from qwen_moe.runs.recorder import Recorder, measure_matmul_peak, open_recorder, peak_memory
from qwen_moe.runs.sinks import check_recorders
from qwen_moe.sharding.build import DTYPES, build_model, make_grids
from qwen_moe.sharding.layout import run_layout
from qwen_moe.training.compilation import choose_compilation
from qwen_moe.training.optimizer import build_optimizer
from qwen_moe.training.restore import restore
from qwen_moe.training.rollback import History
from qwen_moe.training.slow_step import SlowStepNotice
from qwen_moe.training.step import BadStep, StepResult, Trainer


class StopRequest:
    """SIGTERM, SIGINT or a signal of ``more`` requests a graceful stop. All ranks agree on the step at which they stop."""

    def __init__(self, device: torch.device, more: Sequence[int] = ()) -> None:
        self._asked = torch.zeros((), dtype=torch.int32, device=device)
        for number in (signal.SIGTERM, signal.SIGINT, *more):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.fill_(1)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, equal on all ranks. All ranks must call it at the same step."""
        anyone = self._asked.clone()
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
        return bool(anyone)


def _roll_back(
    config: RunConfig,
    trainer: Trainer,
    writer: CheckpointWriter,
    history: History,
    recorder: Recorder,
    step: int,
    bad: BadStep,
) -> int:
    """Go back to the newest checkpoint and skip the batches up to that of ``step``. Returns the checkpoint's step. Raises
    BadStep after too many skips, or if there is no checkpoint. All ranks must call it."""
    if len(history.skips) >= config.training.max_skips:
        raise BadStep(
            f"{bad}. Batches were already skipped {len(history.skips)} times; training.max_skips allows no more"
        )
    writer.finish()
    # A checkpoint after ``step`` was damaged when the run fell back, so it is not of this trajectory even if readable now.
    path, _ = newest_valid(config.run_dir / CHECKPOINTS, at_most=step)
    if path is None:
        raise bad
    trainer.abandon_step()
    state = resume(path, trainer.model, trainer.optimizer, config.model)
    writer.retention.went_back_to(state.step)
    history.skip(state.step, step)
    history.losses = History.restored([], state.recent_losses).losses
    saved, skipped = state.step, step + 1 - state.step
    message = f"{bad}. Back to step {saved}, without the {skipped} batches since"
    recorder.go_back(saved, {"step": saved, "skipped_batches": skipped, "reason": str(bad)}, message)
    return saved


class _Clock:
    """The smoothed speed of steps in tokens per second, and its share of the measured matmul peak of all ranks."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.tokens = config.tokens_per_step
        self.flops = flops_per_token(config.model, config.data.sequence_length).training
        peak = torch.tensor(
            measure_matmul_peak(DTYPES[config.precision.compute], device), dtype=torch.float64, device=device
        )
        dist.all_reduce(peak)
        self.peak = float(peak)
        self.smooth: float | None = None
        self.steps = 0

    def record(self, seconds: float) -> dict[str, float]:
        """Add a step that took ``seconds``. The first step, which may compile, does not enter the mean of later steps."""
        self.steps += 1
        self.smooth = seconds if self.smooth is None or self.steps == 2 else 0.9 * self.smooth + 0.1 * seconds
        rate = self.tokens / self.smooth
        return {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "model_flops_per_second": rate * self.flops,
            "share_of_peak": rate * self.flops / self.peak,
        }


def _step_record(config: RunConfig, step: int, result: StepResult, device: torch.device) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": step,
        "time": time.time(),
        "tokens": step * config.tokens_per_step,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "memory_bytes": peak_memory(device),
    } | result.metrics
    if result.expert_counts is not None:
        violation = maximum_violation(result.expert_counts)
        record |= {
            "expert_imbalance_mean": sum(violation) / len(violation),
            "expert_imbalance_max": max(violation),
        }
        if config.balance.capacity_factor:
            record["dropped_share"] = result.dropped_choices / int(result.expert_counts.sum())
        if step % config.logging.expert_load_interval == 0 or step == config.train_steps:
            record["expert_counts"] = result.expert_counts.tolist()
    return record


def _build(
    config: RunConfig, info: ProcessInfo, device: torch.device, say: Callable[[str], None]
) -> tuple[RunInputs, Trainer, CheckpointWriter]:
    """Build the run's data, trainer and checkpoint writer. Nothing is restored yet. All ranks must call it."""
    layout = run_layout(config, info.world_size)
    grids = make_grids(config, layout, device)
    root = config.run_dir / CHECKPOINTS
    if info.rank == 0:
        check_recorders(config)
        check_disk_space(config, root)
    inputs = open_inputs(config, grids.dp)
    say(choose_compilation(config, device))
    if device.type == "cpu" and DTYPES[config.precision.compute] == torch.bfloat16:
        say(description(torch.bfloat16))
    model = build_model(config, layout, grids, device)
    if config.precision.compute == "fp8":
        say(f"FP8 matmuls, recipe {config.precision.fp8.recipe}, by {model.kernels.name}")
    trainer = Trainer(config, layout, model, build_optimizer(model, config.optimizer), device)
    writer = CheckpointWriter(
        root,
        keep=config.checkpoint.keep,
        keep_steps=config.checkpoint.keep_steps,
        asynchronous=config.checkpoint.asynchronous,
        config=config.model,
        compute_dtype="bf16" if config.precision.compute == "fp8" else config.precision.compute,
        hf_files=inputs.tokenizer,
    )
    return inputs, trainer, writer


def _check_collectives(step: int) -> None:
    try:
        compare_collectives()
    except MismatchError as error:
        raise UserError(f"step {step}: collectives of ranks do not match: {error}") from None


def _validate(config: RunConfig, trainer: Trainer, inputs: RunInputs, recorder: Recorder, done: int) -> None:
    """Record the validation loss every `training.validation_interval` steps and after the last step."""
    interval = config.training.validation_interval
    if inputs.has_validation and (done == config.train_steps or (interval and done % interval == 0)):
        loss = trainer.evaluate(inputs.validation_micro_batches())
        recorder.event({"step": done, "validation_loss": loss}, f"step {done}: validation loss {loss:.4f}")


def train(
    config: RunConfig,
    info: ProcessInfo,
    device: torch.device,
    heart: Heartbeat | None = None,
    stop_signals: Sequence[int] = (),
) -> int:
    """Train to the end or until asked to stop. Returns 0 if the run is complete, 130 if it was stopped before that."""

    def say(message: str) -> None:
        if info.rank == 0:
            print(message, file=sys.stderr, flush=True)

    heart = heart or Heartbeat()
    stop = StopRequest(device, stop_signals)
    inputs, trainer, writer = _build(config, info, device, say)
    done, history = restore(config, trainer, inputs, say)
    writer.retention.went_back_to(done)
    if info.rank == 0:
        record_attempt(config, info, device, resumed_step=done)
    recorder = open_recorder(config, resumed_step=done)
    clock = _Clock(config, device)
    recorder.begin("compiling" if compiling() else "first step")
    slow = SlowStepNotice(recorder.say, config, clock.peak)
    stopped = False
    while done < config.train_steps:
        start = time.perf_counter()
        slow.begin_step(done + 1, compiling() and clock.steps == 0)
        batches = inputs.train_micro_batches(history.data_step(done, inputs.ordered_steps))
        try:
            result = trainer.step(done, batches, history.highest_loss(config.training.spike_nats))
        except BadStep as bad:
            done = _roll_back(config, trainer, writer, history, recorder, done, bad)
            continue
        done += 1
        history.losses.append(result.loss)
        heart.beat(done)
        if config.parallel.check_collectives:
            _check_collectives(done)
        slow.end_step()
        recorder.step(_step_record(config, done, result, device) | clock.record(time.perf_counter() - start))
        if clock.steps == 1:
            recorder.first_step_done()
        _validate(config, trainer, inputs, recorder, done)
        last = done == config.train_steps
        stopped = stop.agreed() and not last
        if last or stopped or done % config.checkpoint.interval == 0 or done in config.checkpoint.keep_steps:
            with heart.saving():
                writer.save(trainer.model, trainer.optimizer, _train_state(config, done, inputs, history))
            _note_progress(config.run_dir, done, info)
        if stopped:
            break
    slow.close()
    writer.finish()
    recorder.close()
    if stopped:
        say(f"stopped after step {done} of {config.train_steps}; the same command resumes from there")
    return INTERRUPTED if stopped else 0


def _train_state(config: RunConfig, step: int, inputs: RunInputs, history: History) -> TrainState:
    return TrainState(
        step=step,
        consumed_samples=step * config.training.global_batch_size,
        consumed_tokens=step * config.tokens_per_step,
        data_fingerprint=inputs.fingerprint,
        settings=saved_settings(config),
        skips=list(history.skips),
        recent_losses=list(history.losses),
    )


def _note_progress(run_dir: Path, step: int, info: ProcessInfo) -> None:
    """Let rank 0 tell the supervisor that this attempt made progress, so that a restart begins later."""
    if info.rank == 0:
        (run_dir / PROGRESS).write_text(f"{step}\n", encoding="utf-8")
