"""Runs of stages: one run, equal to the bit to the same stages by hand and to itself after kills, in any layouts."""

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen_moe.config import RunConfig
from qwen_moe.runs.records import read_lines
from tests.distributed import run_distributed
from tests.training.staged_runs import (
    LONG,
    SHORT,
    STAGES,
    figures,
    last,
    settings,
    train,
    write_tokens,
)
from tests.training.test_run import _kill_workers_at_random_moments, corpus, write_recipe

__all__ = ["corpus"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "d")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(run_dir, tokens))
    return run_dir


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
MOMENTS = ["step 3", "saved 4", "step 5", "save 8"]
MORE_MOMENTS = ["step 1", "save 4", "step 4", "save 6", "step 7", "saved 8"]


@pytest.mark.parametrize("moment", [*MOMENTS, *(pytest.param(m, marks=pytest.mark.slow) for m in MORE_MOMENTS)])
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


@pytest.mark.parametrize(
    ("short", "long", "said"),
    [
        ({"tp": 2}, {"tp": 1, "ep": 2}, ["sequence, layout tp=2", "sequence, layout dp=2,ep=2"]),
        (
            {"cp": 2, "cp_kind": "ulysses"},
            {"cp_kind": "ring"},
            ["context parallelism over 2: ulysses", "context parallelism over 2: ring"],
        ),
    ],
    ids=str,
)
def test_layouts_may_change_between_stages(
    tmp_path: Path, tokens: Path, undisturbed: Path, short: dict[str, Any], long: dict[str, Any], said: list[str]
) -> None:
    """A split of another kind over the same two processes: equal to one process."""
    stages = [STAGES[0] | {"parallel": short}, STAGES[1] | {"parallel": long}]
    printed = train(settings(tmp_path / "run", tokens, stages=stages), processes=2)
    assert "stage 1 of 2, short: steps 1 to 4 of 16 tokens a sequence" in printed
    assert "stage 2 of 2, long: steps 5 to 8 of 32 tokens a sequence" in printed
    assert printed.index(said[0]) < printed.index(said[1])
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
