"""Halves of a micro-batch that take turns compute the same as one process, and what travels is behind the other's work."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel import expert
from parallel.collectives import Pending
from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.sharding.kernels import choose_kernels
from qwen_moe.sharding.layout import run_layout
from qwen_moe.verify.case import draw
from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, train_rank
from qwen_moe.verify.reference import train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import QWEN3, STEPS, case
from tests.verify.test_layouts import differences
from tests.verify.test_replay import replay_case

ON = {"parallel__ep_overlap": True}
FOUR = {"training__micro_batch_size": 4}

CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "ep over dp, four rows": (Layout(dp=4, ep=4), FOUR),
    "tp and ep, selective, capacity with drops": (
        Layout(tp=2, dp=2, ep=2),
        {"training__recompute": "selective", "balance__capacity_factor": 0.75},
    ),
    "etp, capacity with drops, recomputed": (
        Layout(tp=2, dp=2, ep=2, etp=2),
        {"training__recompute": "full", "balance__capacity_factor": 0.5},
    ),
    "cp and ep, balance of sequences": (Layout(cp=2, dp=2, ep=4), {"balance__scope": "sequence"}),
    "zero3": (Layout(dp=4, ep=2), {"parallel__sharding": "zero3", "training__global_batch_size": 16}),
    "zero3, recomputed": (Layout(dp=4, ep=2), {"parallel__sharding": "zero3", "training__recompute": "full"}),
    "zero3, selective, without a shared expert": (
        Layout(dp=4, ep=2),
        QWEN3 | {"parallel__sharding": "zero3", "training__recompute": "selective"},
    ),
    "documents, micro-batch balancing": (
        Layout(dp=2, ep=2),
        {"data__respect_document_boundaries": True, "balance__scope": "micro_batch"},
    ),
    "1f1b": (Layout(pp=2, dp=2, ep=2), {}),
    "interleaved, zero3": (
        Layout(pp=2, dp=2, ep=2),
        {"parallel__schedule": "interleaved_1f1b", "parallel__sharding": "zero3"},
    ),
    "zbv": (Layout(pp=2, dp=2, ep=2), {"parallel__schedule": "zbv"}),
    "dualpipev, recomputed": (
        Layout(pp=2, tp=2, etp=2),
        {"parallel__schedule": "dualpipev", "training__recompute": "full"},
    ),
}


def _train_without_views(config: RunConfig, steps: int, probe: bool) -> Report:
    """`train_rank`, where FSDP must not find that a layer returned a view: it would warn every user of it."""
    warnings.filterwarnings("error", message=".*returned a view tensor")
    return train_rank(config, steps, probe)


@pytest.mark.parametrize("name", CASES)
def test_halves_equal_one_process(name: str) -> None:
    layout, changes = CASES[name]
    config = case(layout, **changes | ON)
    needs(config.parallel.schedule)
    found = differences(config, layout, _train_without_views)
    assert found.equal, found


def test_replayed_routing_and_padding_are_those_of_each_half() -> None:
    config = replay_case(Layout(cp=2, dp=2, ep=2), **ON)
    found = compare(run_distributed(train_rank, 4, config, STEPS), train_reference(config, 2, STEPS))
    assert found.equal, found


def test_random_layouts_take_turns_too() -> None:
    assert 10 < sum(draw(0, index, 8).config.parallel.ep_overlap for index in range(200)) < 100


# What travels when


class _Watched(Pending):
    """A message that notes when it is waited for."""

    def __init__(self, pending: Pending, note: Callable[[], None]) -> None:
        super().__init__(pending._work, pending.buffer, pending._keep)
        self._note = note

    def wait(self) -> torch.Tensor:
        self._note()
        return super().wait()


class _Collectives(TorchDispatchMode):
    """Notes torch's collectives with the elements of the tensors that they are given."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.events.append(f"{func._schema.name} {sizes}")
        return func(*args, **(kwargs or {}))


def _messages(config: RunConfig) -> list[tuple[str, str]]:
    """One step's launches and waits of messages between experts, in order: ``("launch", "A1 out")`` is when half A's rows
    leave for the experts of the second MoE layer. The model has no pipeline and one micro-batch."""
    trainer = make_trainer(config)
    events: list[tuple[str, str]] = []
    plans: list[Any] = []
    plan_of, launch = expert.Exchange.plan, expert._launch

    def plan(*args: Any) -> Any:
        plans.append(plan_of(*args))
        return plans[-1]

    def launched(rows: torch.Tensor, of: Any, axis: Any, back: bool) -> Pending:
        number = next(place for place, one in enumerate(plans) if one is of)
        name = f"{'AB'[number % 2]}{number // 2} {'back' if back else 'out'}"
        if rows.shape[1] == 1:  # the weights of the rows that were launched just before, or their gradients
            assert events[-1] == ("launch", name)
            return launch(rows, of, axis, back)
        events.append(("launch", name))
        return _Watched(launch(rows, of, axis, back), lambda: events.append(("wait", name)))

    expert.Exchange.plan, expert._launch = plan, launched  # type: ignore[method-assign]
    trainer.step(0, micro_batches(trainer, 0))
    return events


def _one_micro_batch(**changes: Any) -> RunConfig:
    model = {"model__num_hidden_layers": 2, "model__mlp_only_layers": []}
    return case(Layout(dp=2, ep=2), **model, training__global_batch_size=4, **changes | ON)


FORWARD = """
    launch A0 out, launch B0 out, wait A0 out, launch A0 back, wait B0 out, launch B0 back,
    wait A0 back, launch A1 out, wait B0 back, launch B1 out, wait A1 out, launch A1 back, wait B1 out, launch B1 back,
    wait A1 back, wait B1 back
"""


def test_each_half_computes_while_the_other_travels_and_backward_is_forward_reversed() -> None:
    first, second = run_distributed(_messages, 2, _one_micro_batch())
    assert first == second
    forward = [tuple(event.split(maxsplit=1)) for event in " ".join(FORWARD.split()).split(", ")]
    assert first[: len(forward)] == forward
    # The gradient of rows that went out comes back, and the other way round.
    turned = {"launch": "wait", "wait": "launch", "out": "back", "back": "out"}
    backward = [(turned[kind], f"{name.split()[0]} {turned[name.split()[1]]}") for kind, name in reversed(forward)]
    assert first[len(forward) :] == backward


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_recomputed_layer_takes_turns_again(recompute: str) -> None:
    first, second = run_distributed(_messages, 2, _one_micro_batch(training__recompute=recompute))
    assert first == second
    layer = "launch A out, launch B out, wait A out, launch A back, wait B out, launch B back, wait A back, wait B back"
    backward = (
        "launch B out, launch A out, wait B out, launch B back, wait A out, launch A back, wait B back, wait A back"
    )
    named = ", ".join(f"{kind} {name[0]} {name.split()[1]}" for kind, name in first)
    assert named == ", ".join([layer, layer, layer, backward, layer, backward])


def _collectives(config: RunConfig) -> list[str]:
    trainer = make_trainer(config)
    events: list[str] = []
    with _Collectives(events):
        trainer.step(0, micro_batches(trainer, 0))
    return [name for name in events if "alltoall" not in name]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_weights_are_gathered_and_gradients_reduced_as_without_halves(sharding: str, recompute: str) -> None:
    changes = {"parallel__sharding": sharding, "training__recompute": recompute, "training__global_batch_size": 8}
    off, *_ = run_distributed(_collectives, 4, case(Layout(dp=4, ep=2), **changes))
    on, *others = run_distributed(_collectives, 4, case(Layout(dp=4, ep=2), **changes | ON))
    assert all(other == on for other in others)
    assert on == off and any("gather" in name for name in on)


# Mistakes


def _rows_of_the_first_half(patch: Any) -> None:
    from qwen_moe.models.parts import Given

    original = Given.of_rows
    patch(Given, "of_rows", lambda given, rows: original(given, slice(0, rows.stop - rows.start)))


def _results_of_the_other_half(patch: Any) -> None:
    """A half takes the message of the other."""
    from qwen_moe.models.moe.block import MoE

    original = MoE.through_experts
    patch(MoE, "through_experts", lambda block, parts: original(block, parts)[::-1])


def _statistics_of_one_half(patch: Any) -> None:
    from qwen_moe.models import decoder
    from qwen_moe.models.moe.router import RouterStatistics

    def twice(parts: Any) -> RouterStatistics:
        return RouterStatistics(*(torch.cat([one] * len(parts)) for one in parts[0]))

    patch(decoder, "join_statistics", twice)


def _halves_the_wrong_way_round(patch: Any) -> None:
    from qwen_moe.models import decoder

    original = decoder.join
    patch(decoder, "join", lambda parts: original(parts[::-1]))


DOCUMENTS = {"data__respect_document_boundaries": True}
MISTAKES: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "documents of the first half": (_rows_of_the_first_half, DOCUMENTS),
    "results of the other half": (_results_of_the_other_half, {}),
    "statistics of one half": (_statistics_of_one_half, {"balance__scope": "sequence"}),
    "halves joined the wrong way round": (_halves_the_wrong_way_round, {}),
}


def _broken(config: RunConfig, mistake: str) -> Report:
    MISTAKES[mistake][0](setattr)
    return train_rank(config, STEPS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    layout = Layout(dp=2, ep=2)
    config = case(layout, **MISTAKES[mistake][1] | ON)
    found = differences(config, layout, _broken, mistake)
    assert not found.equal and (found.wrong or found.largest > 1e-6), found


# Where it hides nothing


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (Layout(dp=2), {}, "ep and etp are 1: leave it out, or raise ep"),
        (
            Layout(dp=2, ep=2),
            {"training__micro_batch_size": 1},
            "micro_batch_size is 1: use an even number such as 2, or",
        ),
        (Layout(dp=2, ep=2), {"training__micro_batch_size": 3, "training__global_batch_size": 6}, "such as 4"),
    ],
)
def test_it_is_refused_where_it_hides_nothing(layout: Layout, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_layout(case(layout, **changes | ON), layout.world_size)


def test_transformer_engines_delayed_scaling_is_refused() -> None:
    precision = {"compute": "fp8", "master": "fp32", "kernels": "te", "fp8": {"recipe": "delayed"}}
    grids: Any = None  # it is refused before anything is made
    with pytest.raises(UserError, match="current or blockwise, or leave ep_overlap out"):
        choose_kernels(case(Layout(dp=2, ep=2), precision=precision, **ON), grids)
