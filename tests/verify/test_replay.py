"""Routing replay in every layout equals every document by itself in one process; deliberate mistakes do not."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.case import draw, global_batch
from qwen_moe.verify.compare import compare
from qwen_moe.verify.examples import replays
from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, train_rank
from qwen_moe.verify.reference import Trajectory, train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import QWEN3, STEPS
from tests.verify.test_objectives import post_training

CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "capacity, cp and tp": (Layout(cp=2, tp=2, ep=2), {"balance__capacity_factor": 0.75}),
    "interleaved stages, normalized weights": (
        Layout(pp=2, dp=2, ep=2),
        QWEN3 | {"parallel__schedule": "interleaved_1f1b", "model__norm_topk_prob": True},
    ),
    "stages of zbv, recomputed in part, balance of sequences": (
        Layout(pp=2, tp=2, etp=2),
        {"parallel__schedule": "zbv", "training__recompute": "selective", "balance__scope": "sequence"},
    ),
    "ZeRO-3, recomputed": (Layout(dp=4, ep=2), {"parallel__sharding": "zero3", "training__recompute": "full"}),
}


def replay_case(layout: Layout, **changes: Any) -> RunConfig:
    config = post_training("grpo", layout, **changes)
    assert replays(config)
    return config


@pytest.mark.parametrize("name", CASES)
def test_replay_equals_one_process(name: str) -> None:
    layout, changes = CASES[name]
    config = replay_case(layout, **changes)
    needs(config.parallel.schedule)
    found = compare(
        run_distributed(train_rank, layout.world_size, config, STEPS), train_reference(config, layout.dp, STEPS)
    )
    assert found.equal, found


def test_a_part_of_the_random_cases_replays_a_part_of_the_routing() -> None:
    cases = [draw(3, index, 8, "grpo").config for index in range(30)]
    replaying = [config for config in cases if replays(config)]
    assert 5 <= len(replaying) <= 20
    for config in cases:
        experts = global_batch(config, 0).get("experts")
        assert (experts is not None) == (config in replaying)
        if experts is not None:
            assert 0.1 < (experts < 0).double().mean() < 0.4
    assert not any(replays(draw(3, index, 8, "dpo").config) for index in range(30))


def _ignored(patch: Any) -> None:
    """The field does not reach the model."""
    from parallel.sequence import SequenceShard

    original = SequenceShard.of_batch
    patch(
        SequenceShard,
        "of_batch",
        lambda shard, batch: original(shard, {name: x for name, x in batch.items() if name != "experts"}),
    )


def _of_another_layer(patch: Any) -> None:
    from qwen_moe.models.decoder import DecoderLM

    original = DecoderLM._by_layer
    patch(DecoderLM, "_by_layer", lambda model, experts: original(model, experts.roll(1, dims=2)))


def _of_the_stage(patch: Any) -> None:
    """Layers counted from the beginning of the stage instead of the model."""
    from qwen_moe.models.decoder import DecoderLM

    def by_layer(model: Any, experts: torch.Tensor) -> dict[int, torch.Tensor]:
        here = [layer.self_attn.layer for layer in model.model.layers if layer.is_moe]
        return {index: model.sequence.held(experts)[:, :, place] for place, index in enumerate(here)}

    patch(DecoderLM, "_by_layer", by_layer)


def _of_the_next_token(patch: Any) -> None:
    from parallel.sequence import SequenceShard

    original = SequenceShard.of_batch
    patch(
        SequenceShard,
        "of_batch",
        lambda shard, batch: original(shard, {**batch, "experts": batch["experts"].roll(-1, dims=1)}),
    )


def _of_the_first_rank(patch: Any) -> None:
    from parallel.sequence import SequenceShard

    original = SequenceShard.held
    patch(
        SequenceShard,
        "held",
        lambda shard, field: field.chunk(shard.tp.size, dim=1)[0] if field.ndim == 4 else original(shard, field),
    )


def _of_the_first_context_rank(patch: Any) -> None:
    from parallel import sequence
    from parallel.context import own_chunks
    from parallel.mesh import Axis

    def first(x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return own_chunks(x, Axis(axis.name, axis.size, 0, None) if x.ndim == 4 else axis)

    patch(sequence, "own_chunks", first)


def _without_gradient(patch: Any) -> None:
    """Weights gathered from probabilities that are 0 outside the router's own choice (ISEEKYAN/Megatron-LM #49 and #79)."""
    from qwen_moe.models.moe import router

    original = router.picked_and_sums

    def of_own_choices(
        x: torch.Tensor,
        weight: torch.Tensor,
        found: tuple[torch.Tensor, torch.Tensor],
        indices: torch.Tensor,
        counted: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        picked, *sums = original(x, weight, found, indices, counted)
        own = torch.zeros_like(found[0]).scatter(1, found[0].topk(indices.shape[1]).indices, 1.0)
        return picked * own.gather(1, indices), *sums

    patch(router, "picked_and_sums", of_own_choices)


def _own_choices_counted(patch: Any) -> None:
    """Balance counts what the router would have chosen."""
    from qwen_moe.models.moe.router import Router

    original = Router.forward

    def forward(router: Router, x: torch.Tensor, counted: Any = None, experts: Any = None) -> Any:
        return (*original(router, x, counted, experts)[:2], original(router, x, counted)[2])

    patch(Router, "forward", forward)


MISTAKES: dict[str, tuple[Callable[[Any], None], Layout]] = {
    "field ignored": (_ignored, Layout(dp=2)),
    "experts of another layer": (_of_another_layer, Layout(dp=2)),
    "layers counted in the stage": (_of_the_stage, Layout(pp=2)),
    "experts of the next token": (_of_the_next_token, Layout(dp=2)),
    "experts of the first tp rank": (_of_the_first_rank, Layout(tp=2)),
    "experts of the first cp rank": (_of_the_first_context_rank, Layout(cp=2)),
    "no gradient beyond the own choice": (_without_gradient, Layout(dp=2)),
    "own choices counted": (_own_choices_counted, Layout(dp=2)),
}


def _broken(config: RunConfig, mistake: str) -> Report:
    MISTAKES[mistake][0](setattr)
    return train_rank(config, STEPS)


@functools.cache
def reference_for(layout: Layout) -> Trajectory:
    return train_reference(replay_case(layout), layout.dp, STEPS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str) -> None:
    layout = MISTAKES[mistake][1]
    reports = run_distributed(_broken, layout.world_size, replay_case(layout), mistake)
    found = compare(reports, reference_for(layout))
    assert not found.equal and (found.wrong or found.largest > 1e-6), found


def _with_an_expert_too_many() -> str:
    trainer = make_trainer(replay_case(Layout()))
    batches = micro_batches(trainer, 0)
    batches[1]["experts"][0, 2, 1] = trainer.config.model.num_experts
    with pytest.raises(UserError) as caught:
        trainer.step(0, batches)
    return str(caught.value)


def test_experts_that_the_model_lacks_are_refused_before_the_step() -> None:
    assert "an expert to replay is 8, but the model has 8" in run_distributed(_with_an_expert_too_many, 1)[0]
