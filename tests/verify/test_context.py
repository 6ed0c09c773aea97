"""Context parallelism of every kind, with every other axis and feature, equals one process."""

import pytest

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify import reference
from qwen_moe.verify.case import global_batch
from qwen_moe.verify.ranks import make_trainer
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.context_cases import (
    BATCHES,
    DOCUMENTS,
    MORE,
    QUICK,
    Case,
    context_case,
    differences,
    use_batches,
)
from tests.verify.known_bugs import evaluation_times_cp


def check(case: Case) -> None:
    layout, kind, batches, probe, changes = case
    config = context_case(layout, kind, **changes)
    needs(config.parallel.schedule)
    found = differences(config, layout, batches, probe)
    assert found.equal, found


@pytest.mark.parametrize("name", QUICK)
def test_context_equals_one_process(name: str) -> None:
    check(QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_each_kind_equals_one_process(name: str) -> None:
    check(MORE[name])


KINDS = ("ring", "all_gather", "ulysses", "ring+2", "all_gather+2")


def _evaluated(layout: Layout, kinds: tuple[str, ...], batches: str, broken: bool) -> list[float]:
    """The evaluation loss with each kind in turn."""
    from qwen_moe.verify import ranks

    use_batches(batches, ranks)
    if broken:
        evaluation_times_cp(setattr)
    losses = []
    for kind in kinds:
        trainer = make_trainer(_evaluation_case(layout, kind))
        losses.append(trainer.evaluate(ranks.micro_batches(trainer, 0)))
    return losses


def _evaluation_case(layout: Layout, kind: str) -> RunConfig:
    # Capacity drops choices in training only.
    return context_case(layout, kind, **DOCUMENTS, balance__capacity_factor=0.5, training__global_batch_size=8)


def _evaluated_once(layout: Layout, batches: str) -> float:
    config = _evaluation_case(layout, "ring")
    model = reference.reference_model(config).eval()
    batch = BATCHES[batches](config, global_batch(config, 0))
    return reference._losses(config, model, batch, layout.dp, False)["loss"].item()


@pytest.mark.parametrize(("layout", "batches"), [(Layout(cp=4), "both"), (Layout(cp=4, pp=2), "documents")], ids=str)
def test_evaluation_equals_one_process(layout: Layout, batches: str) -> None:
    kinds = KINDS if layout.pp == 1 else ("ring+2",)
    expected = _evaluated_once(layout, batches)
    for losses in run_distributed(_evaluated, layout.world_size, layout, kinds, batches, False):
        assert losses == pytest.approx([expected] * len(kinds), rel=1e-12, abs=0)


def test_an_evaluation_times_cp_is_seen() -> None:
    """transformers #48167 and ms-swift #9152."""
    layout = Layout(cp=2)
    losses = run_distributed(_evaluated, 2, layout, ("ring",), "labels", True)
    assert losses[0][0] > 1.5 * _evaluated_once(layout, "labels")
