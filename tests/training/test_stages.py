"""Runs of stages: one run, equal to the bit to the same stages by hand and to itself after kills, in any layouts."""

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen_moe.config import RunConfig, stage_runs
from qwen_moe.errors import UserError
from qwen_moe.runs.records import read_lines
from qwen_moe.training.stages import check_layouts, processes_for
from tests.distributed import run_distributed
from tests.small import changed
from tests.training.stage_cases import LONG, SHORT, STAGES, figures, last, refused, settings, tokens, train, undisturbed
from tests.training.test_run import _kill_workers_at_random_moments, corpus, write_recipe

__all__ = ["corpus", "tokens", "undisturbed"]


def test_one_run_with_its_figures_at_every_length(undisturbed: Path) -> None:
    records = read_lines(undisturbed / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert [r["tokens"] for r in steps] == [64 * n for n in range(1, 9)]
    assert [r["stage"] for r in steps] == ["short"] * 4 + ["long"] * 4
    assert [r["sequence_length"] for r in steps] == [SHORT] * 4 + [LONG] * 4
    validated = {r["step"]: {key for key in r if "validation" in key} for r in records if "validation_loss" in r}
    short, long = "validation_loss_16", "validation_loss_32"
    assert validated == {
        3: {"validation_loss", short},
        4: {"validation_loss", short},
        6: {"validation_loss", short, long},
        8: {"validation_loss", short, long},
    }
    for record in records:
        if long in record:
            assert record["validation_loss"] == record[long] != record[short]
    # One newest checkpoint is kept, and the end of each stage.
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000008"]


def by_hand(first: RunConfig, second: RunConfig) -> list[tuple[float, float, float]]:
    """Train ``first`` to its end, load its checkpoint into a run with ``second``'s settings, and take its steps."""
    from parallel.process import process_info
    from qwen_moe.checkpoint.distributed import WITHOUT_WEIGHTS, CheckpointWriter, resume
    from qwen_moe.checkpoint.train_state import TrainState
    from qwen_moe.data.inputs import open_inputs
    from qwen_moe.sharding.build import build_model, make_grids
    from qwen_moe.sharding.layout import run_layout
    from qwen_moe.training.loop import train as train_run
    from qwen_moe.training.optimizer import build_optimizer
    from qwen_moe.training.step import Trainer

    with contextlib.redirect_stderr(io.StringIO()):
        assert train_run(first, process_info(), torch.device("cpu")) == 0
    layout = run_layout(second, 1)
    grids = make_grids(second, layout, torch.device("cpu"))
    inputs = open_inputs(second, grids.dp)
    model = build_model(second, layout, grids, torch.device("cpu"))
    trainer = Trainer(second, layout, model, build_optimizer(model, second.optimizer), torch.device("cpu"))
    checkpoint = first.run_dir / "checkpoints" / "step_00000004"
    resume(checkpoint, model, trainer.optimizer, second.model, WITHOUT_WEIGHTS)
    found = []
    for step in range(4):
        result = trainer.step(step, inputs.train_micro_batches(step))
        found.append((result.loss, result.grad_norm, result.learning_rate))
    writer = CheckpointWriter(
        second.run_dir / "checkpoints", keep=1, asynchronous=False, config=second.model, compute_dtype="fp64"
    )
    state = TrainState(step=8, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer.save(model, trainer.optimizer, state)
    return found


def test_two_stages_are_the_same_two_runs_by_hand(tmp_path: Path, tokens: Path) -> None:
    constant = {"schedule__kind": "constant", "schedule__warmup_tokens": 0, "schedule__min_learning_rate": 0}
    train(settings(tmp_path / "stages", tokens, **constant))
    first = settings(tmp_path / "first", tokens, **constant, stages=[], training__train_tokens=256)
    second = settings(
        tmp_path / "second",
        tokens,
        **constant,
        stages=[],
        training__train_tokens=256,
        training__micro_batch_size=1,
        training__global_batch_size=2,
        data__sequence_length=LONG,
        data__long_share=0.5,
        data__seed=1235,  # the recipe's and one, so that stages of equal data read other samples
        model__rope_theta=5e5,
    )
    (expected,) = run_distributed(by_hand, 1, first, second)
    steps = [r for r in read_lines(tmp_path / "stages" / "metrics.jsonl") if "loss" in r]
    assert [(r["loss"], r["grad_norm"], r["learning_rate"]) for r in steps[4:]] == expected
    ours, theirs = last(tmp_path / "stages"), last(tmp_path / "second")
    assert ours.keys() == theirs.keys() and len(ours) > 30
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# In the middle of each stage, while a checkpoint is written, and around the border.
MOMENTS = ["step 1", "step 3", "save 4", "saved 4", "step 4", "step 5", "save 6", "step 7", "save 8", "saved 8"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_does_not_change_the_run(tmp_path: Path, tokens: Path, undisturbed: Path, moment: str) -> None:
    config = settings(tmp_path / "run", tokens)
    train(config, dies=moment)
    said = train(config)
    assert ("resumed from" in said) == (moment not in ("step 1",))
    assert figures(tmp_path / "run") == figures(undisturbed)
    ours, theirs = last(tmp_path / "run"), last(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step_00000004", "step_00000008"}


def _phases(config: RunConfig) -> list[str]:
    """The phases of a run's heart, in order."""
    from launchers.job.heartbeat import Heartbeat
    from parallel.process import process_info
    from qwen_moe.training import loop

    class Recording(Heartbeat):
        def beat(self, step: int) -> None:
            super().beat(step)
            seen.append("training")

        def phase(self, name: str) -> None:
            super().phase(name)
            seen.append(name)

    seen: list[str] = []
    with contextlib.redirect_stderr(io.StringIO()):
        assert loop.train(config, process_info(), torch.device("cpu"), Recording()) == 0
    return seen


def test_asynchronous_checkpoints_and_the_heart_at_a_border(tmp_path: Path, tokens: Path, undisturbed: Path) -> None:
    config = settings(tmp_path / "run", tokens, checkpoint__asynchronous=True)
    (seen,) = run_distributed(_phases, 1, config)
    assert figures(tmp_path / "run") == figures(undisturbed)
    # A new stage may take as long to begin as a run.
    changes = [name for name, _ in itertools.groupby(seen)]
    assert changes.count("starting") == 1 and "training" in changes[changes.index("starting") :]
    assert seen[: seen.index("starting")].count("training") >= 4


def _trainers_alive(config: RunConfig) -> list[int]:
    """How many trainers there are in memory at each one's first step."""
    import weakref

    from parallel.process import process_info
    from qwen_moe.training import loop
    from qwen_moe.training.step import Trainer

    made: list[weakref.ref[Trainer]] = []
    alive: dict[int, int] = {}
    build, step = Trainer.__init__, Trainer.step

    def noted(self: Any, *arguments: Any, **more: Any) -> None:
        build(self, *arguments, **more)
        made.append(weakref.ref(self))

    def counting(self: Any, *arguments: Any) -> Any:
        alive.setdefault(id(self), sum(trainer() is not None for trainer in made))
        return step(self, *arguments)

    Trainer.__init__, Trainer.step = noted, counting  # type: ignore[method-assign]
    with contextlib.redirect_stderr(io.StringIO()):
        assert loop.train(config, process_info(), torch.device("cpu")) == 0
    return list(alive.values())


def test_a_stage_is_gone_from_memory_when_the_next_begins(tmp_path: Path, tokens: Path) -> None:
    assert run_distributed(_trainers_alive, 1, settings(tmp_path / "run", tokens)) == [[1, 1]]


def test_the_base_goes_into_exports_and_into_runs_from_its_weights(
    tmp_path: Path, tokens: Path, undisturbed: Path
) -> None:
    from qwen_moe.checkpoint.huggingface.convert import convert_to_hf

    for step, base in ((4, 1e4), (8, 5e5)):
        convert_to_hf(undisturbed / "checkpoints" / f"step_{step:08d}", tmp_path / str(step))
        written = json.loads((tmp_path / str(step) / "config.json").read_text())
        assert written.get("rope_theta", written.get("rope_parameters", {}).get("rope_theta")) == base
    one = {"stages": [], "training__train_tokens": 64, "schedule__warmup_tokens": 0}
    said = train(settings(tmp_path / "run", tokens, **one, checkpoint__load_from=undisturbed, model__rope_theta=1e6))
    assert "its model.rope_theta was 500000, and this run trains with 1e+06" in said


def test_layouts_may_change_between_stages(tmp_path: Path, tokens: Path, undisturbed: Path) -> None:
    """tp=2, then ep=2 over two data-parallel ranks: equal to one process."""
    stages = [
        STAGES[0] | {"parallel": {"tp": 2}},
        STAGES[1] | {"parallel": {"tp": 1, "ep": 2}},
    ]
    said = train(settings(tmp_path / "run", tokens, stages=stages), processes=2)
    assert "stage 1 of 2, short: steps 1 to 4 of 16 tokens a sequence, layout tp=2" in said
    assert "stage 2 of 2, long: steps 5 to 8 of 32 tokens a sequence, layout dp=2,ep=2" in said
    ours, theirs = figures(tmp_path / "run"), figures(undisturbed)
    assert len(ours) == len(theirs)
    for mine, one in zip(ours, theirs, strict=True):
        for a, b in zip(mine, one, strict=True):
            assert a == b or a == pytest.approx(b, abs=1e-10)
    mine, one = last(tmp_path / "run"), last(undisturbed)
    assert all((mine[name] - one[name]).abs().max() < 1e-10 for name in one)


def test_a_pipeline_validates_at_every_length(tmp_path: Path, tokens: Path, undisturbed: Path) -> None:
    stages = [STAGES[0], STAGES[1] | {"parallel": {"pp": 2}}]
    train(settings(tmp_path / "run", tokens, stages=stages), processes=2)
    for mine, one in zip(figures(tmp_path / "run"), figures(undisturbed), strict=True):
        assert [x for x in mine if isinstance(x, float)] == pytest.approx(
            [x for x in one if isinstance(x, float)], abs=1e-10
        )


@pytest.fixture
def middle(tmp_path: Path, tokens: Path, undisturbed: Path) -> Iterator[Any]:
    """The run as it was when the second stage began, under other settings."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")

    def config(**changes: Any) -> RunConfig:
        return settings(tmp_path / "run", tokens, **changes)

    yield config


def other(index: int, **changes: Any) -> list[dict[str, Any]]:
    """The stages with changes of one: ``key`` or ``section__key``."""
    return [changed(stage, changes) if index == number else stage for number, stage in enumerate(STAGES)]


def test_a_stage_that_has_not_begun_may_change(middle: Any) -> None:

    config = middle(stages=other(1, model__rope_theta=1e6, data__sequence_length=64, training__micro_batch_size=2))
    said = train(config)
    assert "(step 4 of 6)" in said
    records = [r for r in read_lines(config.run_dir / "metrics.jsonl") if r["step"] > 4]
    assert [r["sequence_length"] for r in records if "loss" in r] == [64, 64]
    assert "validation_loss_64" in records[-1] and "validation_loss_16" in records[-1]


def test_what_has_begun_must_stay(middle: Any, tokens: Path, undisturbed: Path) -> None:
    said = refused(middle(stages=other(0, optimizer__learning_rate=0.02)))
    assert "stages.0 (short): optimizer.learning_rate was 0.01, is now 0.02" in said and "only later ones may" in said
    said = refused(middle(stages=other(0, name="brief")))
    assert "stages.0 (brief): it was short, which began after step 0" in said
    said = refused(middle(stages=other(0, model__rope_theta=2e4)))
    assert "stages.0 (short): model.rope_theta was 10000.0, is now 20000.0" in said
    said = refused(middle(stages=other(0, tokens=128)))
    assert "stages.1 (long): it now begins after step 2, within short" in said
    # The cosine spanned both stages: with another length, or a schedule of the later stage's own, it would have been lower.
    said = refused(middle(stages=other(1, tokens=512)))
    assert "the learning rate of step 4, which is done" in said and "schedule spanned 512 tokens" in said
    said = refused(middle(stages=other(1, schedule={"kind": "constant"})))
    assert "and now spans 256" in said
    said = refused(middle(stages=[], training__train_tokens=512))
    assert "holds a run of stages (short), and this recipe has none" in said
    whole = settings(undisturbed, tokens, stages=other(1, model__rope_theta=1e6))
    assert "stages.1 (long): model.rope_theta was 500000.0, is now 1000000.0" in refused(whole)
    whole = settings(undisturbed, tokens, stages=STAGES[:1], training__train_tokens=256)
    assert "all stages together now have 4 steps" in refused(whole)


def test_a_run_without_stages_goes_on_as_the_first_of_several(tmp_path: Path, tokens: Path) -> None:
    """And a complete run of stages gets one more."""
    constant = {"schedule__kind": "constant"}
    plain = settings(tmp_path / "run", tokens, stages=[], training__train_tokens=256, **constant)
    train(plain)
    said = train(settings(tmp_path / "run", tokens, **constant))
    assert "(step 4 of 8)" in said
    whole = tmp_path / "whole"
    train(settings(whole, tokens, **constant))
    assert [f[:5] for f in figures(tmp_path / "run")] == [f[:5] for f in figures(whole)]
    more = [*STAGES, {"name": "longest", "tokens": 128, "data": {"sequence_length": 64, "long_share": 0}}]
    said = train(settings(whole, tokens, stages=more, **constant))
    assert "(step 8 of 9)" in said and "stage 3 of 3, longest" in said
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"step_00000004", "step_00000008", "step_00000009"}


def test_a_damaged_border_falls_back_into_the_stage_before(tmp_path: Path, tokens: Path, undisturbed: Path) -> None:
    config = settings(tmp_path / "run", tokens, checkpoint__keep=3)
    train(config, dies="step 5")
    (tmp_path / "run" / "checkpoints" / "step_00000004" / "train_state.json").write_text("{}")
    said = train(config)
    assert "falling back to step_00000003" in said
    assert figures(tmp_path / "run") == figures(undisturbed)


@pytest.mark.parametrize(("moment", "back"), [("bad 4", 4), ("bad 5", 4), ("broken 5", 3)])
def test_a_bad_step_skips_batches_of_its_own_stage(
    tmp_path: Path, tokens: Path, undisturbed: Path, moment: str, back: int
) -> None:
    """Back to the border, or into the stage before if the border's checkpoint is damaged; what was done there stays."""
    more = [STAGES[0], STAGES[1] | {"tokens": 640}]
    config = settings(tmp_path / "run", tokens, stages=more, schedule__kind="constant", checkpoint__keep=3)
    said = train(config, dies=moment)
    skipped = int(moment.split()[1]) - 4 + 1
    assert f"Back to step {back}, without the {skipped} batches since" in said
    whole = settings(tmp_path / "whole", tokens, stages=more, schedule__kind="constant")
    train(whole)
    records = [read_lines(run / "metrics.jsonl") for run in (config.run_dir, whole.run_dir)]
    ours, theirs = ([r for r in found if "loss" in r] for found in records)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, 15))
    assert [r["loss"] for r in ours[:4]] == [r["loss"] for r in theirs[:4]]
    assert all(a["loss"] != b["loss"] for a, b in zip(ours[4:], theirs[4:], strict=True))
    # The first step of the second stage took the batch after the skipped ones: its loss is of that batch.
    ((expected, plain),) = run_distributed(first_losses, 1, config, skipped)
    assert ours[4]["loss"] == expected and theirs[4]["loss"] == plain


def test_batches_skipped_in_one_stage_are_read_in_the_next(tmp_path: Path, tokens: Path) -> None:
    config = settings(tmp_path / "run", tokens)
    said = train(config, dies="bad 3")
    assert "Back to step 3, without the 1 batches since" in said
    ((expected, _),) = run_distributed(first_losses, 1, config, 0)
    losses = {r["step"]: r["loss"] for r in read_lines(config.run_dir / "metrics.jsonl") if "loss" in r}
    assert losses[5] == expected


def first_losses(config: RunConfig, skipped: int) -> tuple[float, float]:
    """Losses of the model at the border on the second stage's batches ``skipped`` and 0."""
    from qwen_moe.checkpoint.distributed import WITHOUT_WEIGHTS, resume
    from qwen_moe.data.inputs import open_inputs
    from qwen_moe.sharding.build import build_model, make_grids
    from qwen_moe.sharding.layout import run_layout
    from qwen_moe.training.optimizer import build_optimizer
    from qwen_moe.training.step import Trainer

    stage = stage_runs(config)[1]
    layout, device = run_layout(stage, 1), torch.device("cpu")
    grids = make_grids(stage, layout, device)
    inputs = open_inputs(stage, grids.dp)
    found = []
    for batch in (skipped, 0):
        model = build_model(stage, layout, grids, device)
        trainer = Trainer(stage, layout, model, build_optimizer(model, stage.optimizer), device)
        resume(config.run_dir / "checkpoints" / "step_00000004", model, trainer.optimizer, stage.model, WITHOUT_WEIGHTS)
        found.append(trainer.step(4, inputs.train_micro_batches(batch)).loss)
    return found[0], found[1]


def test_layouts_are_checked_for_every_stage() -> None:
    def stages(*parallel: dict[str, int], length: int = 32) -> tuple[RunConfig, ...]:
        listed = [
            STAGES[0] | {"parallel": parallel[0]},
            STAGES[1] | {"parallel": parallel[1], "data": {"sequence_length": length}},
        ]
        return stage_runs(settings(Path("run"), Path("unused"), stages=listed))

    assert processes_for(stages({"tp": 2}, {"tp": 1, "ep": 3}), gpus=0) == 6
    assert processes_for(stages({}, {"tp": 4}), gpus=0) == 4
    with pytest.raises(UserError, match=r"stages\.1 \(long\): .*num_experts 6 is not a multiple of ep 4"):
        check_layouts(stages({"tp": 4}, {"ep": 4}), 4)
    odd = [STAGES[0] | {"data": {"sequence_length": 15}}, STAGES[1] | {"parallel": {"tp": 2}}]
    with pytest.raises(UserError, match=r"sequence_length 15 is not a multiple of tp 2 .*earlier length 15 too"):
        check_layouts(stage_runs(settings(Path("run"), Path("unused"), stages=odd)), 2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_eight_kills_at_random_moments_of_a_command_with_two_processes(tmp_path: Path, corpus: Path) -> None:
    """`qwen-moe train` itself; its workers die by kill -9, and its layout changes at the border."""
    stages = [
        {"name": "short", "tokens": 150 * 8 * 32},
        {
            "name": "long",
            "tokens": 150 * 4 * 64,
            "data": {"sequence_length": 64},
            "model": {"rope_theta": 2e6},
            "training": {"global_batch_size": 4},
            "parallel": {"tp": 2},
        },
    ]
    found = []
    for name, kills in (("undisturbed", 0), ("killed", 8)):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, corpus, training__validation_interval=50, checkpoint__interval=7)
        values = yaml.safe_load(recipe.read_text())
        del values["training"]["train_tokens"]
        recipe.write_text(yaml.safe_dump(values | {"stages": stages}))
        assert _kill_workers_at_random_moments(recipe, kills, seed=1, steps=300) == kills
        found.append(figures(folder / "run"))
    assert len(found[0]) == 306 and found[0] == found[1]
