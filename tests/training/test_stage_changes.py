"""Runs of stages whose list changes, whose checkpoints are damaged, and whose steps are bad."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.counted import counted
from qwen_moe.checkpoint.train_state import read_train_state
from qwen_moe.config import RopeScaling, RunConfig, stage_runs
from qwen_moe.errors import UserError
from qwen_moe.runs.records import read_lines
from qwen_moe.training.stages import check_layouts, check_model, may_have_grown, processes_for
from tests.distributed import run_distributed
from tests.small import changed
from tests.training.staged_runs import STAGES, figures, refused, settings, train, write_tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "d")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(run_dir, tokens))
    return run_dir


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("rope_scaling", {"type": "linear", "factor": 2.0}), ("dual_chunk", {"chunk_size": 32, "local_size": 8})],
)
def test_at_a_border_the_model_of_the_stage_before_is_no_other(middle: Any, name: str, value: Any) -> None:
    """No weight depends on these settings, and the stage that begins may not have others than the one that has ended."""
    said = refused(middle(**{f"model__{name}": value}))
    assert "stages.0 (short): checkpoint" in said and f"step_00000004 is of another model: {name} is None there" in said


def test_later_stages_may_need_longer_texts(tmp_path: Path, tokens: Path) -> None:
    """The length that a model reaches decides nothing of what is done, within a stage and at a border, unless the angles
    depend on it."""
    constant: dict[str, Any] = {"schedule__kind": "constant"}
    train(settings(tmp_path / "run", tokens, **constant), dies="saved 6")
    more = [*STAGES, {"name": "longest", "tokens": 256, "data": {"sequence_length": 128, "long_share": 0}}]
    longer = settings(tmp_path / "run", tokens, stages=more, model__max_position_embeddings=128, **constant)
    border = tmp_path / "run" / "checkpoints" / "step_00000004"
    check_model(border, stage_runs(longer), read_train_state(border))
    yarn = longer.model.model_copy(update={"rope_scaling": RopeScaling(type="yarn", factor=2.0)})
    assert may_have_grown(border, longer.model) == ("max_position_embeddings",) and may_have_grown(border, yarn) == ()
    assert "(step 6 of 9)" in train(longer)


def test_a_run_without_stages_becomes_no_first_stage_of_another_base(tmp_path: Path, tokens: Path) -> None:
    constant = {"schedule__kind": "constant"}
    train(settings(tmp_path / "run", tokens, stages=[], training__train_tokens=256, **constant))
    said = refused(settings(tmp_path / "run", tokens, stages=other(0, model__rope_theta=2e4), **constant))
    assert "stages.0 (short): checkpoint" in said and "rope_theta is 10000.0 there, 20000.0 here" in said


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
    assert f"Back to step {back}, without the {counted(skipped, 'batch')} since" in said
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
    assert "Back to step 3, without the 1 batch since" in said
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
