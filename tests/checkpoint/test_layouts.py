"""A run saved in one layout goes on in another as if nothing had happened, against one process in float64."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.sharding.layout import run_layout
from qwen_moe.verify.case import layout_overrides
from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import Report, make_trainer, record_step
from qwen_moe.verify.reference import train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import case

SAVED, STEPS = 2, 4
# `sequence`: a balancing scope that does not depend on how the global batch is cut into micro-batches.
MODEL: dict[str, Any] = {
    "model__num_hidden_layers": 8,
    "model__mlp_only_layers": [2],
    "training__micro_batch_size": 1,
    "training__global_batch_size": 16,
    "balance__scope": "sequence",
}


def config_for(layout: Layout, schedule: str = "1f1b", sharding: str = "zero2") -> RunConfig:
    parallel = layout_overrides(layout, schedule) | {"sharding": sharding}
    return case(layout, STEPS, **MODEL, **{f"parallel__{key}": value for key, value in parallel.items()})


def random_layout(rng: random.Random) -> tuple[Layout, RunConfig]:
    """Any legal layout of up to 8 ranks, with any schedule and sharding."""
    while True:
        tp, pp, dp, ep, etp = (rng.choice([1, 2, 4]) for _ in range(5))
        schedule = rng.choice(["1f1b", "interleaved_1f1b", "zbv", "dualpipev"])
        try:
            layout = Layout(tp=tp, pp=pp, dp=dp, ep=ep, etp=etp)
            config = config_for(layout, schedule, rng.choice(["zero2", "zero3"]))
            run_layout(config, layout.world_size)
        except (ValueError, UserError):
            continue
        if layout.world_size <= 8:
            return layout, config


def _writer(config: RunConfig, root: Path, asynchronous: bool) -> Any:
    from qwen_moe.checkpoint.distributed import CheckpointWriter

    return CheckpointWriter(root, keep=2, asynchronous=asynchronous, config=config.model, compute_dtype="fp64")


def _save(config: RunConfig, root: Path, asynchronous: bool) -> None:
    from qwen_moe.checkpoint.train_state import TrainState

    trainer = make_trainer(config)
    for step in range(SAVED):
        record_step(trainer, Report(), step)
    state = TrainState(step=SAVED, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer = _writer(config, root, asynchronous)
    writer.save(trainer.model, trainer.optimizer, state)
    if asynchronous:  # what is saved is the state of then
        record_step(trainer, Report(), SAVED)
    writer.finish()


def _resume(config: RunConfig, root: Path, forget: str = "") -> Report:
    from qwen_moe.checkpoint.directory import step_directory
    from qwen_moe.checkpoint.distributed import resume
    from qwen_moe.verify import ranks

    trainer, report = make_trainer(config), Report()
    resume(step_directory(root, SAVED), trainer.model, trainer.optimizer, config.model)
    if forget:
        for name, parameter in trainer.model.named_parameters():
            if forget in name:
                trainer.optimizer.state[parameter]["exp_avg"].zero_()
    trainer.on_gradients = lambda: report.gradients.append(ranks._pieces(trainer.model, True))
    for step in range(SAVED, STEPS):
        record_step(trainer, report, step)
    ranks.record_end(trainer, report, STEPS)
    return report


def _check(saved: tuple[Layout, RunConfig], resumed: tuple[Layout, RunConfig], root: Path, asynchronous: bool) -> Any:
    run_distributed(_save, saved[0].world_size, saved[1], root, asynchronous)
    reports = run_distributed(_resume, resumed[0].world_size, resumed[1], root)
    return compare(reports, _reference())


def _reference() -> Any:
    whole = train_reference(config_for(Layout()), 1, STEPS)
    return replace(whole, figures=whole.figures[SAVED:], counts=whole.counts[SAVED:], gradients=whole.gradients[SAVED:])


PAIRS: list[tuple[Any, Any]] = [
    ((Layout(pp=4), "zbv"), (Layout(dp=4, ep=4), "1f1b")),
    ((Layout(tp=2, dp=2, ep=4), "1f1b"), (Layout(pp=2, tp=2), "dualpipev")),
]


@pytest.mark.parametrize("pair", [PAIRS[0], *(pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS[1:])])
def test_another_layout_goes_on_the_same(pair: tuple[Any, Any], tmp_path: Path) -> None:
    (first, first_schedule), (second, second_schedule) = pair
    needs(first_schedule, second_schedule)
    saved, resumed = config_for(first, first_schedule), config_for(second, second_schedule)
    found = _check((first, saved), (second, resumed), tmp_path, asynchronous=second.pp > 1)
    assert found.equal, found


@pytest.mark.slow
def test_stale_expert_momentum_would_be_seen(tmp_path: Path) -> None:
    layout = Layout(dp=2, ep=2)
    run_distributed(_save, 2, config_for(layout), tmp_path, False)
    assert compare(run_distributed(_resume, 2, config_for(layout), tmp_path), _reference()).equal
    broken = compare(run_distributed(_resume, 2, config_for(layout), tmp_path, ".experts."), _reference())
    assert not broken.equal and broken.parameters > 1e-6


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on a quiet machine
def test_twenty_random_pairs(tmp_path: Path) -> None:
    rng = random.Random(0)
    bad = []
    for index in range(20):
        saved, resumed = random_layout(rng), random_layout(rng)
        found = _check(saved, resumed, tmp_path / str(index), asynchronous=rng.random() < 0.3)
        if not found.equal:
            bad.append((str(saved[0]), str(resumed[0]), found))
    assert not bad, bad


def test_a_checkpoint_holds_every_tensor_whole(tmp_path: Path) -> None:
    """Names and shapes in the file are the model's own, whatever cut it."""
    import torch.distributed.checkpoint as dcp

    from qwen_moe.checkpoint.directory import step_directory
    from qwen_moe.models.init import build_model

    layout = Layout(tp=2, pp=2, ep=2)
    config = config_for(layout)
    run_distributed(_save, 4, config, tmp_path, False)
    metadata = dcp.FileSystemReader(step_directory(tmp_path, SAVED)).read_metadata().state_dict_metadata
    sizes = {name: tuple(item.size) for name, item in metadata.items() if hasattr(item, "size")}
    model = build_model(config.model, 0, torch.float64)
    for name, tensor in model.state_dict().items():
        assert sizes[f"model.{name}"] == tuple(tensor.shape)
    for name, parameter in model.named_parameters():
        assert sizes[f"optimizer.exp_avg.{name}"] == tuple(parameter.shape)
