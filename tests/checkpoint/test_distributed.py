"""Saving and resuming a sharded run: bit-identical on the same layout, equal on another, safe against damage."""

import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from qwen_moe.config import ModelConfig, RunConfig
from qwen_moe.verify.case import global_batch
from tests.distributed import run_distributed
from tests.models.hf_reference import model_configs
from tests.training.test_step import SEQ, make_config


def _setup(config: RunConfig, root: Path, asynchronous: bool = False) -> tuple[Any, Any]:
    from qwen_moe.checkpoint.distributed import CheckpointWriter
    from qwen_moe.verify.ranks import make_trainer

    trainer = make_trainer(config)
    writer = CheckpointWriter(
        root, keep=2, asynchronous=asynchronous, config=config.model, compute_dtype=config.precision.compute
    )
    return trainer, writer


def _train(trainer: Any, steps: range) -> list[tuple[float, float]]:
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    share = 8 // world
    figures = []
    for step in steps:
        batch = global_batch(trainer.config, step)
        mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in batch.items()}
        result = trainer.step(step, [mine])
        figures.append((result.loss, result.grad_norm))
    return figures


def _state(step: int) -> Any:
    from qwen_moe.checkpoint.train_state import TrainState

    return TrainState(
        step=step, consumed_samples=8 * step, consumed_tokens=8 * step * SEQ, data_fingerprint="none", settings={}
    )


def _parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in trainer.model.named_parameters()}


def _biases(trainer: Any) -> list[torch.Tensor]:
    return [router.expert_bias for _, router in trainer.routers()]


def _train_and_save(config: RunConfig, root: Path, asynchronous: bool) -> dict[str, Any]:
    """Two steps, a checkpoint, two more steps; with ``asynchronous``, these are done before anything is written."""
    trainer, writer = _setup(config, root, asynchronous)
    _train(trainer, range(2))
    write, trained = writer._write_and_keep_error, threading.Event()
    writer._write_and_keep_error = lambda *state: trained.wait(60) and write(*state)
    writer.save(trainer.model, trainer.optimizer, _state(2))
    torch.rand(3)
    figures = _train(trainer, range(2, 4))
    trained.set()
    writer.finish()
    return {
        "figures": figures,
        "parameters": _parameters(trainer),
        "biases": _biases(trainer),
    }


def _resume_and_train(config: RunConfig, root: Path) -> dict[str, Any]:
    from qwen_moe.checkpoint.distributed import resume
    from qwen_moe.checkpoint.valid import newest_valid

    trainer, _ = _setup(config, root)
    path, problems = newest_valid(root)
    assert path is not None
    state = resume(path, trainer.model, trainer.optimizer, config.model)
    figures = _train(trainer, range(state.step, 4))
    return {
        "figures": figures,
        "parameters": _parameters(trainer),
        "biases": _biases(trainer),
        "problems": problems,
        "step": state.step,
    }


CHANGES: dict[str, Any] = {"balance__scope": "sequence", "balance__bias_update_rate": 0.01}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_resume_on_the_same_layout_is_bit_identical(tmp_path: Path, asynchronous: bool, precision: str) -> None:
    master = {"fp64": "fp64", "bf16": "fp32"}[precision]
    config = make_config(
        **CHANGES, training__micro_batch_size=4, precision__compute=precision, precision__master=master
    )
    straight = run_distributed(_train_and_save, 2, config, tmp_path, asynchronous)[0]
    resumed = run_distributed(_resume_and_train, 2, config, tmp_path)[0]
    assert resumed["step"] == 2 and not resumed["problems"]
    assert resumed["figures"] == straight["figures"]
    assert all(torch.equal(got, expected) for got, expected in zip(resumed["biases"], straight["biases"], strict=True))
    for name, expected in straight["parameters"].items():
        assert torch.equal(resumed["parameters"][name], expected), name


@pytest.mark.slow
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=model_configs())
def test_resume_is_bit_identical_for_random_shapes(tmp_path: Path, shape: ModelConfig) -> None:
    scope = "sequence" if shape.is_moe_family else "none"
    config = make_config(training__micro_batch_size=4, balance__scope=scope).model_copy(update={"model": shape})
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        straight = run_distributed(_train_and_save, 2, config, Path(folder), False)[0]
        resumed = run_distributed(_resume_and_train, 2, config, Path(folder))[0]
    assert resumed["figures"] == straight["figures"]
    for name, expected in straight["parameters"].items():
        assert torch.equal(resumed["parameters"][name], expected), name


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 4), (4, 2)])
def test_resume_on_another_layout_is_equal(tmp_path: Path, saved_on: int, resumed_on: int) -> None:
    straight = run_distributed(
        _train_and_save, saved_on, make_config(**CHANGES, training__micro_batch_size=8 // saved_on), tmp_path, False
    )[0]
    resumed = run_distributed(
        _resume_and_train, resumed_on, make_config(**CHANGES, training__micro_batch_size=8 // resumed_on), tmp_path
    )[0]
    for got, expected in zip(resumed["figures"], straight["figures"], strict=True):
        assert got == pytest.approx(expected, rel=1e-10)
    for name, expected in straight["parameters"].items():
        torch.testing.assert_close(resumed["parameters"][name], expected, rtol=1e-10, atol=1e-10)


def _save_several(config: RunConfig, root: Path) -> None:
    trainer, writer = _setup(config, root)
    for step in range(3):
        _train(trainer, range(step, step + 1))
        writer.save(trainer.model, trainer.optimizer, _state(step + 1))


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path) -> None:
    config = make_config(**CHANGES, training__micro_batch_size=4)
    run_distributed(_save_several, 2, config, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]
    victim = max((tmp_path / "step_00000003").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 0x10
    victim.write_bytes(content)
    for resumed in run_distributed(_resume_and_train, 2, config, tmp_path):
        assert resumed["step"] == 2
        assert len(resumed["problems"]) == 1 and victim.name in resumed["problems"][0]


def _newest(root: Path, at_most: int) -> str:
    from qwen_moe.checkpoint.valid import newest_valid

    path, problems = newest_valid(root, at_most)
    return "" if path is None else path.name + "".join(problems)


def test_going_back_looks_at_nothing_past_the_step(tmp_path: Path) -> None:
    """A checkpoint past it may be whole again, and is of another trajectory."""
    run_distributed(_save_several, 1, make_config(**CHANGES, training__micro_batch_size=8), tmp_path)
    found = [run_distributed(_newest, 1, tmp_path, at_most)[0] for at_most in (3, 2, 1)]
    assert found == ["step_00000003", "step_00000002", ""]


def _resume_wrong_model(config: RunConfig, root: Path) -> str:
    from qwen_moe.errors import UserError

    try:
        _resume_and_train(config, root)
    except UserError as error:
        return str(error)
    return ""


def _fail_to_save(config: RunConfig, root: Path) -> str:
    """The second checkpoint meets a disk on which nothing can be written."""
    import torch.distributed.checkpoint as dcp

    from qwen_moe.errors import UserError

    trainer, writer = _setup(config, root)
    _train(trainer, range(1))
    writer.save(trainer.model, trainer.optimizer, _state(1))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    dcp.FileSystemWriter.write_data = full  # type: ignore[method-assign]
    try:
        writer.save(trainer.model, trainer.optimizer, _state(2))
    except UserError as error:
        return str(error)
    return ""


def test_a_full_disk_is_named_and_harms_nothing(tmp_path: Path) -> None:
    from qwen_moe.checkpoint.directory import verify

    config = make_config(**CHANGES, training__micro_batch_size=4)
    for message in run_distributed(_fail_to_save, 2, config, tmp_path):
        assert "no space left" in message and "step 2" in message
    assert not (tmp_path / "step_00000002").exists()
    verify(tmp_path / "step_00000001")


def test_a_checkpoint_of_another_model_is_refused_by_name_of_the_field(tmp_path: Path) -> None:
    config = make_config(**CHANGES, training__micro_batch_size=4)
    run_distributed(_train_and_save, 2, config, tmp_path, False)
    other = make_config(**CHANGES, training__micro_batch_size=4, model__rope_theta=5000.0)
    for message in run_distributed(_resume_wrong_model, 2, other, tmp_path):
        assert "rope_theta" in message and "5000.0" in message


def _save_and_start_from(config: RunConfig, root: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Expert biases of a trained model, and of another one that begins with its weights."""
    from qwen_moe.checkpoint.distributed import load_weights

    trainer, writer = _setup(config, root)
    _train(trainer, range(2))
    writer.save(trainer.model, trainer.optimizer, _state(2))
    other, _ = _setup(config.model_copy(update={"seed": config.seed + 1}), root)
    load_weights(root / "step_00000002", other.model, config.model)
    return _biases(trainer), _biases(other)


def test_weights_that_a_run_begins_from_bring_their_expert_biases(tmp_path: Path) -> None:
    """Without them tokens would be routed to other experts, in silence."""
    config = make_config(**CHANGES, training__micro_batch_size=4)
    for trained, loaded in run_distributed(_save_and_start_from, 2, config, tmp_path):
        assert all(torch.equal(one, two) and bool(one.any()) for one, two in zip(trained, loaded, strict=True))


def _save_and_load_not_finite(config: RunConfig, root: Path, where: str) -> list[str]:
    """NaN in one rank's part of a weight, or of a moment, and what loading says to it."""
    from parallel.data import local
    from qwen_moe.checkpoint.distributed import load_weights, resume
    from qwen_moe.errors import UserError

    trainer, writer = _setup(config, root)
    _train(trainer, range(1))
    parameter = dict(trainer.model.named_parameters())["model.layers.1.self_attn.q_proj.weight"]
    victim = local(parameter if where == "weight" else trainer.optimizer.state[parameter]["exp_avg"])
    with torch.no_grad():
        victim.flatten()[:2] = float("nan")
        victim.flatten()[2] = float("inf")
    writer.save(trainer.model, trainer.optimizer, _state(1))
    found = []
    for load in (
        lambda: load_weights(root / "step_00000001", trainer.model, config.model),
        lambda: resume(root / "step_00000001", trainer.model, trainer.optimizer, config.model),
    ):
        try:
            load()
        except UserError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_named_and_counted_on_every_rank(tmp_path: Path, where: str) -> None:
    config = make_config(**CHANGES, training__micro_batch_size=4)
    outcomes = run_distributed(_save_and_load_not_finite, 2, config, tmp_path, where)
    assert outcomes[0] == outcomes[1]
    weights, whole = outcomes[0]
    name = "model.layers.1.self_attn.q_proj.weight" + (" (exp_avg)" if where == "moment" else "")
    # Three values in the part of each of two ranks.
    assert f"tensor {name} of checkpoint" in whole and "holds 6 of " in whole
    assert (weights == whole) if where == "weight" else weights == ""
