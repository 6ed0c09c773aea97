"""FP8 training steps: ways of running that must not change a bit, layouts to a bound, layers that are left out."""

from typing import Any

import pytest
import torch

from parallel.kernels import quantizer
from parallel.kernels.formats import scale_of
from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.sharding import build
from qwen_moe.verify.ranks import Report, make_trainer, record_step, train_rank
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import case


def fp8(layout: Layout, recipe: str, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {"recipe": recipe} | ({"amax_history_len": 2} if recipe == "delayed" else {})
    precision = {"precision__compute": "fp8", "precision__master": "fp32", "precision__fp8": settings}
    # A selection bias steps by a fixed amount on either side of a tie: it would turn rounding into other routing.
    return case(layout, **precision, **{"balance__bias_update_rate": 0.0} | changes)


def _train(config: RunConfig) -> tuple[Report, dict[str, torch.Tensor]]:
    return train_rank(config)


def figures(config: RunConfig, layout: Layout) -> Any:
    reports: list[Any] = run_distributed(_train, layout.world_size, config)
    return [(r.figures, r.counts) for r in reports], [[value for *_, value in r.parameters] for r in reports]


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
def test_zero3_and_recomputation_change_no_bit(recipe: str) -> None:
    layout = Layout(dp=2, ep=2)
    plain, weights = figures(fp8(layout, recipe), layout)
    for changes in ({"training__recompute": "full"}, {"parallel__sharding": "zero3", "training__recompute": "full"}):
        other, found = figures(fp8(layout, recipe, **changes), layout)
        assert other == plain
        assert all(torch.equal(a, b) for x, y in zip(weights, found, strict=True) for a, b in zip(x, y, strict=True))


def _first_step(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    trainer, report = make_trainer(config), Report()
    record_step(trainer, report, 0)
    return report.figures[0]["loss"], trainer.model.kernels.state()


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_pipeline_stages_note_what_one_process_does(schedule: str) -> None:
    """Stages see, micro-batch by micro-batch, what one process has between its layers: the same loss and the same largest
    values of inputs and weights to the bit. (Later steps differ as they do in bf16: AdamW's first update makes much of
    the rounding of sums.)"""
    needs(schedule)
    layout = Layout(pp=2)
    config = fp8(layout, "delayed", parallel__schedule=schedule)
    reports = run_distributed(_first_step, 2, config)
    alone = fp8(Layout(), "delayed", training__global_batch_size=config.training.global_batch_size)
    ((loss, expected),) = run_distributed(_first_step, 1, alone)
    assert [found for found, _ in reports] == [loss, loss]
    held = [set(state) for _, state in reports]
    assert not held[0] & held[1] and held[0] | held[1] == set(expected)
    for name, value in (reports[0][1] | reports[1][1]).items():
        if "grad_output" in name:
            torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0)
        else:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("recipe", ["delayed", "current", "blockwise", "mxfp8"])
@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_halves_of_backward_train_what_a_whole_one_does(schedule: str, recipe: str) -> None:
    """With tp, whose layers gather their inputs again for the second half. The first loss is the same to the bit, and the
    norm as near as a sum in another order. Layers that are computed again change no bit."""
    needs(schedule)
    layout = Layout(pp=2, tp=2)
    whole, _ = figures(fp8(layout, recipe), layout)
    plain, weights = figures(fp8(layout, recipe, parallel__schedule=schedule), layout)
    for (found, _), (expected, _) in zip(plain, whole, strict=True):
        assert found[0]["loss"] == expected[0]["loss"]
        assert found[0]["gradient norm"] == pytest.approx(expected[0]["gradient norm"], rel=1e-3)
    again, others = figures(fp8(layout, recipe, parallel__schedule=schedule, training__recompute="full"), layout)
    assert again == plain
    assert all(torch.equal(a, b) for x, y in zip(weights, others, strict=True) for a, b in zip(x, y, strict=True))


def test_halves_note_what_whole_micro_batches_do() -> None:
    """The largest values of both halves together, as delayed scaling defines them; the loss of the first step, whose scales
    are all 1, is that of whole micro-batches."""
    layout = Layout(dp=2, ep=2)
    whole = run_distributed(_first_step, 2, fp8(layout, "delayed"))
    halves = run_distributed(_first_step, 2, fp8(layout, "delayed", parallel__ep_overlap=True))
    for (loss, expected), (found, state) in zip(whole, halves, strict=True):
        assert found == pytest.approx(loss, rel=1e-6)
        assert set(state) == set(expected)
        for name, value in state.items():
            if "grad_output" in name:
                torch.testing.assert_close(value, expected[name], rtol=0.05, atol=0)
            else:
                assert torch.equal(value, expected[name]), name


def _first_step_in_float32(config: RunConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """With FP8 operands, and everything between the products in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.DTYPES, "fp8", torch.float32)
        return _first_step(config)


CONTEXT = {"data__sequence_length": 16, "training__global_batch_size": 8}


def test_ulysses_notes_what_one_process_does() -> None:
    """Largest values are those of all cp ranks. With whole sequences of some heads, attention is what it is in one
    process."""
    reports = run_distributed(
        _first_step, 2, fp8(Layout(cp=2, ep=2), "delayed", parallel__cp_kind="ulysses", **CONTEXT)
    )
    ((loss, expected),) = run_distributed(_first_step, 1, fp8(Layout(), "delayed", **CONTEXT))
    for found, state in reports:
        assert found == pytest.approx(loss, rel=1e-6)
        for name, value in state.items():
            assert torch.equal(value, expected[name]), name


def test_a_ring_notes_what_one_process_does() -> None:
    """It sums pieces in another order. In bf16 that moves the loss by 1e-3, more or less by the processor, because FP8
    amplifies a rounding; in float32 there is nothing to amplify."""
    config = fp8(Layout(cp=2, ep=2), "delayed", parallel__cp_kind="ring", **CONTEXT)
    reports = run_distributed(_first_step_in_float32, 2, config)
    ((loss, expected),) = run_distributed(_first_step_in_float32, 1, fp8(Layout(), "delayed", **CONTEXT))
    for found, state in reports:
        assert found == pytest.approx(loss, rel=1e-6)
        for name, value in state.items():
            if name.endswith("weight.scale") or "layers.0.self_attn.input" in name:
                assert torch.equal(value, expected[name]), name
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=0, msg=name)


def _first_loss_by_powers_of_two(config: RunConfig) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer, "scale_of", lambda amax, fp8, power_of_two: scale_of(amax, fp8, True))
        return _first_step(config)[0]


def test_current_factors_differ_between_layouts_by_rounding_alone() -> None:
    """An expert's rows have one factor with ep=2, and one on each rank without. Powers of two round nothing: then the loss
    is the same to the bit."""
    losses = [
        run_distributed(_first_loss_by_powers_of_two, 2, fp8(layout, "current"))
        for layout in (Layout(dp=2), Layout(dp=2, ep=2))
    ]
    assert losses[0] == losses[1]


def _names(config: RunConfig) -> list[str]:
    return sorted(make_trainer(config).model.kernels.state())


def test_first_and_last_layers_may_stay_in_bf16() -> None:
    config = fp8(Layout(), "delayed")
    changed = config.model_dump()
    changed["precision"]["fp8"] |= {"first_layers_in_bf16": 1, "last_layers_in_bf16": 2}
    (every,) = run_distributed(_names, 1, config)
    (some,) = run_distributed(_names, 1, RunConfig(**changed))
    assert {name.split(".")[2] for name in every} == {"0", "1", "2", "3"}
    assert some == [name for name in every if ".layers.1." in name]
    forbidden = ("mlp.gate.", "norm", "embed", "lm_head", "shared_expert_gate")
    assert not [name for name in every if any(part in name for part in forbidden)]
