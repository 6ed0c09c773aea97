"""Any objective in any layout: the probe needs a gradient per token, whole sequences and another field of the batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.case import STEPS
from qwen_moe.verify.compare import Differences, compare
from qwen_moe.verify.probe import Probe
from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, train_rank
from qwen_moe.verify.reference import train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import QWEN3, case

CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "one process": (Layout(), {}),
    "tp, odd vocabulary, tied head": (Layout(tp=4), {}),
    "tp, untied head, ZeRO-3": (Layout(tp=2, dp=2), QWEN3 | {"parallel__sharding": "zero3"}),
    "interleaved stages with tp": (Layout(pp=2, tp=2, ep=2), {"parallel__schedule": "interleaved_1f1b"}),
    "1f1b, recomputed": (Layout(pp=4), {"training__recompute": "full"}),
    "dualpipev over dp": (Layout(pp=2, dp=2, ep=2), {"parallel__schedule": "dualpipev"}),
}


def differences(layout: Layout, config: RunConfig, rank: Callable[..., Report], *args: Any) -> Differences:
    reports = run_distributed(rank, layout.world_size, config, *args)
    return compare(reports, train_reference(config, layout.dp, STEPS, True))


@pytest.mark.parametrize("name", CASES)
def test_the_probe_equals_one_process(name: str) -> None:
    layout, changes = CASES[name]
    config = case(layout, **changes)
    needs(config.parallel.schedule)
    found = differences(layout, config, train_rank, STEPS, True)
    assert found.equal, found


def _sums_without_gradient(patch: Any) -> None:
    """Each rank differentiates its own part of a sequence's sum only."""
    from parallel import sequence

    def forward_only(x: torch.Tensor, axis: Any) -> torch.Tensor:
        return x + (sequence.all_reduce_sum(x.detach(), axis) - x.detach())

    patch(sequence, "all_reduce_with_gradient", forward_only)


def _loss_of_every_rank(patch: Any) -> None:
    """Every rank of a sequence counts its loss as its own."""
    from parallel.sequence import SequenceShard

    patch(SequenceShard, "share", lambda shard, loss: loss)


def _field_of_another_part(patch: Any) -> None:
    """A field of the batch cut to the tokens of the first rank, on all."""
    from parallel.sequence import SequenceShard

    patch(SequenceShard, "held", lambda shard, field: field.chunk(shard.tp.size, dim=1)[0])


def _batch_of_another_micro_batch(patch: Any) -> None:
    """The loss of a pipeline's output reads the first micro-batch, whichever the output is of."""
    from parallel.pipeline import Pipeline

    patch(Pipeline, "_loss_of", lambda pipeline, output, number: pipeline.loss(output, pipeline._running[0]))


def _gradient_of_own_columns(patch: Any) -> None:
    """Backward of the log-probabilities with every rank's own upstream gradient for all rows."""
    from parallel import vocab_head

    original = vocab_head._gather

    def gather(x: torch.Tensor, axis: Any) -> torch.Tensor:
        return x.repeat(axis.size) if x.ndim == 1 else original(x, axis)

    patch(vocab_head, "_gather", gather)


MISTAKES: dict[str, tuple[Callable[[Any], None], Layout]] = {
    "sums of sequences differentiated on one rank": (_sums_without_gradient, Layout(tp=2)),
    "loss of a sequence counted on every rank": (_loss_of_every_rank, Layout(tp=2)),
    "fields cut alike on every rank": (_field_of_another_part, Layout(tp=2)),
    "fields of another micro-batch": (_batch_of_another_micro_batch, Layout(pp=2)),
    "upstream gradients of one rank": (_gradient_of_own_columns, Layout(tp=2)),
}


def _broken(config: RunConfig, mistake: str) -> Report:
    MISTAKES[mistake][0](setattr)
    return train_rank(config, STEPS, True)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    layout = MISTAKES[mistake][1]
    found = differences(layout, case(layout), _broken, mistake)
    assert not found.equal and (found.wrong or found.largest > 1e-6), found


def _without_weights() -> str:
    trainer = make_trainer(case(Layout()), Probe())
    batches = [{name: x for name, x in batch.items() if name != "weights"} for batch in micro_batches(trainer, 0)]
    with pytest.raises(UserError) as caught:
        trainer.step(0, batches)
    return str(caught.value)


def test_a_field_that_the_data_lacks_is_named() -> None:
    assert "the data has no weights" in run_distributed(_without_weights, 1)[0]
