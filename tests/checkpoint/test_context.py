"""A run goes on with another cp and another kind of it, and from that with yet another, as one process would."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify import ranks
from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import Report, make_trainer, record_step
from qwen_moe.verify.reference import Trajectory, train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.context_cases import DOCUMENTS, context_case

STEPS = 4  # cp and kind change after each of the first three
# Scopes and drops that do not depend on how the global batch is cut into micro-batches.
MODEL: dict[str, Any] = {
    "training__micro_batch_size": 1,
    "training__global_batch_size": 8,
    "balance__scope": "sequence",
    "balance__capacity_factor": 0.75,
    "data__sequence_length": 32,
} | DOCUMENTS


def _config(layout: Layout, kind: str, **changes: Any) -> RunConfig:
    return context_case(layout, kind, STEPS, **MODEL, **changes)


def _one_step(config: RunConfig, root: Path, step: int) -> Report:
    """Resume from the checkpoint of ``step``, take one step and save."""
    from qwen_moe.checkpoint.directory import step_directory
    from qwen_moe.checkpoint.distributed import CheckpointWriter, resume
    from qwen_moe.checkpoint.train_state import TrainState

    trainer, report = make_trainer(config), Report()
    if step:
        resume(step_directory(root, step), trainer.model, trainer.optimizer, config.model)
    trainer.on_gradients = lambda: report.gradients.append(ranks._pieces(trainer.model, True))
    record_step(trainer, report, step)
    ranks.record_end(trainer, report, step + 1)
    state = TrainState(step=step + 1, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer = CheckpointWriter(root, keep=9, asynchronous=False, config=config.model, compute_dtype="fp64")
    writer.save(trainer.model, trainer.optimizer, state)
    writer.finish()
    return report


def _last_step(whole: Trajectory) -> Trajectory:
    return replace(whole, figures=whole.figures[-1:], counts=whole.counts[-1:], gradients=whole.gradients[-1:])


Way = tuple[Layout, str, dict[str, Any]]
WAYS: dict[str, list[Way]] = {
    "ring over 2, ulysses inside all_gather over 4, none, ulysses with tp": [
        (Layout(cp=2, dp=2, ep=2), "ring", {}),
        (Layout(cp=4, ep=4), "all_gather+2", {"parallel__sharding": "zero3"}),
        (Layout(dp=2), "auto", {}),
        (Layout(cp=2, tp=2), "ulysses", {}),
    ],
    "stages, tp with fewer KV heads, ring over 4": [
        (Layout(cp=2, pp=2), "all_gather", {"parallel__schedule": "zbv"}),
        (Layout(cp=2, tp=4, etp=2), "ring", {}),
        (Layout(), "auto", {}),
        (Layout(cp=4, dp=2, ep=8), "ring+2", {}),
    ],
}


@pytest.mark.parametrize(
    "way", [next(iter(WAYS)), *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[1:])]
)
def test_another_cp_goes_on_the_same(way: str, tmp_path: Path) -> None:
    for step, (layout, kind, changes) in enumerate(WAYS[way]):
        config = _config(layout, kind, **changes)
        needs(config.parallel.schedule)
        reports = run_distributed(_one_step, layout.world_size, config, tmp_path, step)
        # Learning rates are those of the whole run, which both configs share.
        found = compare(reports, _last_step(train_reference(_config(Layout(), "auto"), 1, step + 1)))
        assert found.equal, (step, str(layout), kind, found)
