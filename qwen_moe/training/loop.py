"""The training loop, which every rank runs, stage after stage: build, resume, step, validate, checkpoint, stop."""

import gc
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from launchers.counted import counted
from launchers.folder.run_folder import CHECKPOINTS
from launchers.job.heartbeat import Heartbeat
from launchers.local.supervisor import INTERRUPTED, PROGRESS
from parallel.gemm import description
from parallel.hang_watch import MismatchError, compare_collectives
from parallel.mesh import Grids
from parallel.process import ProcessInfo
from parallel.sequence import Batch
from qwen_moe.checkpoint.distributed import WITHOUT_WEIGHTS, CheckpointWriter, resume
from qwen_moe.checkpoint.optimizer_state import updates_done
from qwen_moe.checkpoint.preflight import check_disk_space, kept_steps
from qwen_moe.checkpoint.train_state import TrainState, read_train_state
from qwen_moe.checkpoint.valid import newest_valid
from qwen_moe.config import RunConfig, stage_runs
from qwen_moe.data.inputs import OrderedInputs, RunInputs, open_inputs, prepared_on_all_ranks, with_length
from qwen_moe.errors import UserError
from qwen_moe.models.flops import flops_per_token
from qwen_moe.models.ops.compiled import compiling
from qwen_moe.objectives.balance import maximum_violation
from qwen_moe.runs.attempt import record_attempt
from qwen_moe.runs.identity import saved_settings
from qwen_moe.runs.recorder import measure_matmul_peak, open_recorder, peak_memory
from qwen_moe.runs.sinks import check_recorders
from qwen_moe.sharding.build import DTYPES, build_model, make_grids
from qwen_moe.sharding.layout import run_layout
from qwen_moe.training.compilation import choose_compilation
from qwen_moe.training.episodes import Episodes
from qwen_moe.training.optimizer import build_optimizer
from qwen_moe.training.queries import open_queries
from qwen_moe.training.reference import COLUMN, provide_reference
from qwen_moe.training.restore import Say, find_start, history_of, load_start, restore
from qwen_moe.training.rollback import History
from qwen_moe.training.slow_step import SlowStepNotice
from qwen_moe.training.stages import begins_at, check_layouts, records, stage_of
from qwen_moe.training.step import BadStep, StepResult, Trainer
from qwen_moe.training.validation import Validation, earlier_lengths


class StopRequest:
    """SIGTERM, SIGINT or a signal of ``more`` requests a graceful stop. All ranks agree on the step at which they stop."""

    def __init__(self, device: torch.device, more: Sequence[int] = ()) -> None:
        self._noted = False
        self._asked = torch.zeros((), dtype=torch.int32, device=device)
        for number in (signal.SIGTERM, signal.SIGINT, *more):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # No tensor: the signal may come while a model is built of fake tensors, which mix with no others.
        self._noted = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop, equal on all ranks. All ranks must call it at the same step."""
        if self._noted:
            self._asked.fill_(1)
        anyone = self._asked.clone()
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX)
        return bool(anyone)


class _Clock:
    """The smoothed speed of steps in tokens per second, and its share of the measured matmul peak of all ranks."""

    def __init__(self, config: RunConfig, peak: float) -> None:
        self.tokens, self.peak = config.tokens_per_step, peak
        self.flops = flops_per_token(config.model, config.data.sequence_length).training
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
        "tokens": config.tokens_before(step),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "memory_bytes": peak_memory(device),
    } | result.metrics
    if config.place.name:
        record |= {"stage": config.place.name, "sequence_length": config.data.sequence_length}
    if result.expert_counts is not None:
        violation = maximum_violation(result.expert_counts)
        record |= {
            "expert_imbalance_mean": sum(violation) / len(violation),
            "expert_imbalance_max": max(violation),
        }
        if config.balance.capacity_factor:
            record["dropped_share"] = result.dropped_choices / int(result.expert_counts.sum())
        if step % config.logging.expert_load_interval == 0 or step == config.end_step:
            record["expert_counts"] = result.expert_counts.tolist()
    return record


def _check_collectives(step: int) -> None:
    try:
        compare_collectives()
    except MismatchError as error:
        raise UserError(f"step {step}: collectives of ranks do not match: {error}") from None


def _matmul_peak(config: RunConfig, device: torch.device) -> float:
    """FLOP/s that all ranks together measure. All ranks must call it."""
    peak = torch.tensor(
        measure_matmul_peak(DTYPES[config.precision.compute], device), dtype=torch.float64, device=device
    )
    dist.all_reduce(peak)
    return float(peak)


class _Stage:
    """One stage of a run on this rank, or a run without stages: its data, model and optimizer. Nothing is restored yet. All
    ranks must construct it together."""

    def __init__(
        self, stages: Sequence[RunConfig], config: RunConfig, grids: Grids, device: torch.device, say: Say
    ) -> None:
        self.config, self.stages = config, stages
        layout = run_layout(config, grids.layout.world_size)
        samples = config.objective.reads == "samples"
        self.inputs: OrderedInputs = open_queries(config, grids.dp) if samples else open_inputs(config, grids.dp)
        if grids.cp.size > 1:
            say(f"context parallelism over {grids.cp.size}: {layout.context.text(grids.cp.size)}")
        if device.type == "cpu" and DTYPES[config.precision.compute] == torch.bfloat16:
            say(description(torch.bfloat16))
        model = build_model(config, layout, grids, device)
        if config.precision.compute == "fp8":
            say(f"FP8 matmuls, recipe {config.precision.fp8.recipe}, by {model.kernels.name}")
        self.trainer = Trainer(config, layout, model, build_optimizer(model, config.optimizer), device)
        self.episodes = Episodes(config, self.trainer, self.inputs, say) if samples else None

    def batches(self, done: int, history: History) -> list[Batch]:
        first = self.config.place.first_step
        step = history.data_step(done, self.inputs.ordered_steps, first)
        if self.episodes is not None:
            return self.episodes.micro_batches(step)
        assert isinstance(self.inputs, RunInputs)
        return self.inputs.train_micro_batches(step)

    def state(self, done: int, history: History) -> TrainState:
        config, place = self.config, self.config.place
        return TrainState(
            step=done,
            updates=updates_done(self.trainer.optimizer),
            consumed_samples=place.first_samples + (done - place.first_step) * config.training.global_batch_size,
            consumed_tokens=config.tokens_before(done),
            data_fingerprint=self.inputs.fingerprint,
            settings=saved_settings(config),
            skips=list(history.skips),
            recent_losses=list(history.losses),
            stages=records(self.stages, done),
        )


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class _Run:
    """A run on this rank: what its stages share, and the walk through them."""

    def __init__(self, config: RunConfig, info: ProcessInfo, device: torch.device, heart: Heartbeat) -> None:
        self.config, self.info, self.device, self.heart = config, info, device, heart
        self.stages = stage_runs(config)
        self.total = self.stages[-1].end_step
        self.root = config.run_dir / CHECKPOINTS
        self.grids: Grids | None = None
        self._say: Say = _print
        if info.rank == 0:
            check_recorders(config)
            check_disk_space(config, self.root)
        check_layouts(self.stages, info.world_size)
        start = find_start(config, self.stages, self.say)
        self.say(choose_compilation(config, device))
        stage = self._open(start.step)
        self.writer = self._make_writer(stage)
        if start.path is not None:
            self._provide_references(stage)
        if stage.episodes is not None:
            stage.episodes.check_models(begins=start.path is None)
        self.history = restore(stage.config, start, stage.trainer, stage.inputs, self.total, self.say)
        if start.path is None:
            provide_reference(stage.config, stage.trainer, stage.inputs, self.say)
        self.done = start.step
        self.writer.retention.went_back_to(self.done)
        if info.rank == 0:
            record_attempt(config, info, device, resumed_step=self.done)
        self.recorder = open_recorder(config, resumed_step=self.done)
        self._say = self.recorder.say
        self.peak = _matmul_peak(config, device)
        self.stage: _Stage | None = stage

    def say(self, message: str) -> None:
        """Print a message on rank 0, above the progress bar once there is one."""
        if self.info.rank == 0:
            self._say(message)

    def _open(self, done: int) -> _Stage:
        """Build the stage of the step after ``done``. Its layout may be another than that of the stage before."""
        config = stage_of(self.stages, done)
        layout = run_layout(config, self.info.world_size)
        needed = (layout.layout, layout.context.heads)
        if self.grids is None or (self.grids.layout, self.grids.cp_heads.size) != needed:
            self.grids = make_grids(config, layout, self.device)
        if config.place.name and done < config.end_step:
            self.say(
                f"stage {config.place.index + 1} of {len(self.stages)}, {config.place.name}: steps "
                f"{config.place.first_step + 1:,} to {config.end_step:,} of {config.data.sequence_length:,} tokens a "
                f"sequence, layout {layout.layout}"
            )
        return _Stage(self.stages, config, self.grids, self.device, self.say)

    def _provide_references(self, stage: _Stage) -> None:
        """What the first weights give to the data of ``stage`` and of those before it that it validates on. Weights that are
        loaded for this are replaced by the checkpoint's afterwards."""
        config = stage.config
        if COLUMN not in stage.trainer.objective.fields:
            return
        for run in earlier_lengths(self.stages, config):
            provide_reference(run, stage.trainer, open_inputs(run, stage.trainer.grids.dp), self.say, load_start)
        provide_reference(config, stage.trainer, stage.inputs, self.say, load_start)

    def _make_writer(self, stage: _Stage) -> CheckpointWriter:
        config = stage.config
        return CheckpointWriter(
            self.root,
            keep=config.checkpoint.keep,
            keep_steps=kept_steps(self.config),
            asynchronous=config.checkpoint.asynchronous,
            config=config.model,
            compute_dtype="bf16" if config.precision.compute == "fp8" else config.precision.compute,
            hf_files=stage.inputs.tokenizer,
        )

    def _enter(self) -> _Stage:
        """Build the stage of the next step and load the newest checkpoint into it: the optimizer's state goes on."""
        self.heart.phase("starting")  # building and reading may take longer than a step
        self.writer.finish()
        gc.collect()  # the stage before, whose modules refer to each other
        start = find_start(self.config, self.stages, self.say, at_most=self.done)
        if start.path is None or start.state is None:
            raise UserError(f"{self.root} holds no undamaged checkpoint of the stage before: see the messages above")
        stage = self._open(start.step)
        self.writer.config = stage.config.model
        enters = begins_at(stage.config, start.step)
        trainer = stage.trainer
        self._provide_references(stage)
        resume(start.path, trainer.model, trainer.optimizer, stage.config.model, WITHOUT_WEIGHTS if enters else ())
        self.history.losses = history_of(stage.config, start.state).losses
        if start.step < self.done:
            self.recorder.go_back(start.step, {"step": start.step}, f"back to step {start.step}")
            self.writer.retention.went_back_to(start.step)
        self.done = start.step
        return stage

    def _roll_back(self, stage: _Stage, bad: BadStep) -> None:
        """Go back to the newest checkpoint and skip the batches of this stage up to the bad one. Raises BadStep after too
        many skips, or if there is no checkpoint. All ranks must call it."""
        config, history, step = stage.config, self.history, self.done
        if len(history.skips) >= config.training.max_skips:
            raise BadStep(
                f"{bad}. Batches were already skipped {counted(len(history.skips), 'time')}; training.max_skips "
                "allows no more"
            )
        self.writer.finish()
        # A checkpoint after ``step`` was damaged when the run fell back, so it is not of this trajectory even if it is
        # readable now.
        path, _ = newest_valid(self.root, at_most=step)
        if path is None:
            raise bad
        stage.trainer.abandon_step()
        first, saved = config.place.first_step, read_train_state(path).step
        if saved >= first:
            may_differ = WITHOUT_WEIGHTS if begins_at(config, saved) else ()
            state = resume(path, stage.trainer.model, stage.trainer.optimizer, config.model, may_differ)
            history.losses = history_of(config, state).losses
        # Else the checkpoint at the stage's begin is damaged: the walk enters the stage before again.
        skipped = history.skip(max(saved, first), step)
        self.writer.retention.went_back_to(saved)
        message = f"{bad}. Back to step {saved}, without the {counted(skipped, 'batch')} since"
        self.recorder.go_back(saved, {"step": saved, "skipped_batches": skipped, "reason": str(bad)}, message)
        self.done = saved

    def walk(self, stop: StopRequest) -> bool:
        """Train to the end, stage after stage. Returns whether the run was stopped before."""
        stopped = False
        while self.done < self.total and not stopped:
            stage = self.stage or self._enter()
            self.stage = None
            stopped = self._train(stage, stop)
            del stage
        self.writer.finish()
        self.recorder.close()
        return stopped

    def _train(self, stage: _Stage, stop: StopRequest) -> bool:
        """Train to the end of ``stage``. Returns whether the run was stopped before its own end."""
        config, recorder = stage.config, self.recorder
        assert self.grids is not None
        episodes = stage.episodes
        validation = Validation(self.stages, config, stage.trainer, stage.inputs, self.grids.dp)
        clock = _Clock(config, self.peak)
        recorder.begin("compiling" if compiling() else "first step")
        slow = SlowStepNotice(recorder.say, config, clock.peak)
        if episodes is not None and self.done == config.place.first_step:
            episodes.after(self.done, recorder)
        stopped = False
        while config.place.first_step <= self.done < config.end_step and not stopped:
            start = time.perf_counter()
            slow.begin_step(self.done + 1, compiling() and clock.steps == 0)
            batches = stage.batches(self.done, self.history)
            try:
                result = stage.trainer.step(self.done, batches, self.history.highest_loss(config.training.spike_nats))
            except BadStep as bad:
                self._roll_back(stage, bad)
                continue
            self.done += 1
            if result.count:  # a step without anything to learn has no loss
                self.history.losses.append(result.loss)
            self.heart.beat(self.done)
            if config.parallel.check_collectives:
                _check_collectives(self.done)
            slow.end_step()
            record = _step_record(config, self.done, result, self.device)
            if episodes is not None:
                clock.tokens = episodes.tokens
                record |= episodes.facts()
            recorder.step(record | clock.record(time.perf_counter() - start))
            if clock.steps == 1:
                recorder.first_step_done()
            validation.after(self.done, recorder)
            if episodes is not None:
                episodes.after(self.done, recorder)
            stopped = stop.agreed() and self.done < self.total
            self._save_if_due(stage, stopped)
        slow.close()
        if episodes is not None:
            episodes.close()
        return stopped

    def _save_if_due(self, stage: _Stage, stopped: bool) -> None:
        config, done = stage.config.checkpoint, self.done
        last = done == stage.config.end_step
        if last or stopped or done % config.interval == 0 or done in config.keep_steps:
            with self.heart.saving():
                self.writer.save(stage.trainer.model, stage.trainer.optimizer, stage.state(done, self.history))
            _note_progress(self.config.run_dir, done, self.info)


def train(
    config: RunConfig,
    info: ProcessInfo,
    device: torch.device,
    heart: Heartbeat | None = None,
    stop_signals: Sequence[int] = (),
) -> int:
    """Train to the end or until asked to stop. Returns 0 if the run is complete, 130 if it was stopped before that."""
    stop = StopRequest(device, stop_signals)
    if config.training.epochs:
        prepared_on_all_ranks(config)
        config = with_length(config)
    run = _Run(config, info, device, heart or Heartbeat())
    if run.walk(stop):
        run.say(f"stopped after step {run.done} of {run.total}; the same command resumes from there")
        return INTERRUPTED
    return 0


def _note_progress(run_dir: Path, step: int, info: ProcessInfo) -> None:
    """Let rank 0 tell the supervisor that this attempt made progress, so that a restart begins later."""
    if info.rank == 0:
        (run_dir / PROGRESS).write_text(f"{step}\n", encoding="utf-8")
