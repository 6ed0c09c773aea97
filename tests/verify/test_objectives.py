"""Any objective in any layout: the probe needs a gradient per token, whole sequences and another field of the batch. Those
of post-training equal unpacked documents in one process."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel.context import join_chunks
from parallel.mesh import Layout
from parallel.sequence import SequenceShard
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.case import draw, global_batch
from qwen_moe.verify.compare import Differences, compare
from qwen_moe.verify.probe import Probe
from qwen_moe.verify.ranks import Report, make_trainer, micro_batches, train_rank
from qwen_moe.verify.reference import train_reference
from tests.distributed import run_distributed
from tests.schedules import needs
from tests.verify.cases import QWEN3, STEPS, case

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


def post_training(kind: str, layout: Layout, **changes: Any) -> RunConfig:
    """A case whose batches are packed documents with padding."""
    length = 24
    batch = case(layout).training.global_batch_size
    own = {"data__sequence_length": length, "training__train_tokens": STEPS * batch * length}
    return case(layout, objective__kind=kind, **(own | changes))


KINDS = ["sft", "dpo", "reward_model", "grpo"]
POLICY = {"ratio": "sequence", "kl": "rho_k3", "kl_coefficient": 0.1}
PREFERENCE = {"length_normalized": True, "sft_weight": 0.5}
REWARD = {"criteria": ["helpful", "concise"], "weights": [2.0, 0.5], "center": 0.1}
PADDED = {"seed": 26, "balance__scope": "micro_batch"}  # a seed with empty rows
POST_TRAINING: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "sft, capacity, tp": ("sft", Layout(tp=2, ep=2), {"balance__capacity_factor": 0.75}),
    "sft, sequence balance, cp and tp": ("sft", Layout(cp=2, tp=2), {"balance__scope": "sequence"}),
    "sft, micro-batches of padding, micro-batch balance": ("sft", Layout(dp=2, ep=2), PADDED),
    "reward model, micro-batches of padding, stages": ("reward_model", Layout(pp=2, dp=2), PADDED),
    "dpo, cp and tp": ("dpo", Layout(cp=2, tp=2), {"objective__preference": PREFERENCE}),
    "dpo, parts that are no power of two": ("dpo", Layout(cp=3), {"parallel__cp_kind": "ring"}),
    "dpo, stages and dp, micro-batch balance": ("dpo", Layout(pp=2, dp=2), {"balance__scope": "micro_batch"}),
    "reward model, cp and tp, two criteria": ("reward_model", Layout(cp=2, tp=2), {"objective__reward": REWARD}),
    "reward model, stages, tied embeddings": ("reward_model", Layout(pp=2, dp=2), {"objective__reward": REWARD}),
    "reward model, ZeRO-3 and more ranks than criteria": (
        "reward_model",
        Layout(dp=4, ep=2),
        {"parallel__sharding": "zero3", "model__tie_word_embeddings": False},
    ),
    "grpo, cp and dp, transformers' balance": ("grpo", Layout(cp=2, dp=2), {"balance__scope": "huggingface"}),
    "grpo by sequences, tp and stages, recomputed": (
        "grpo",
        Layout(tp=2, pp=2),
        {"objective__policy": POLICY, "training__recompute": "full"},
    ),
}


@pytest.mark.parametrize("name", POST_TRAINING)
def test_packed_documents_equal_each_by_itself_in_one_process(name: str) -> None:
    kind, layout, changes = POST_TRAINING[name]
    config = post_training(kind, layout, **changes)
    reports = run_distributed(train_rank, layout.world_size, config, STEPS)
    found = compare(reports, train_reference(config, layout.dp, STEPS))
    assert found.equal, found


def test_some_micro_batches_are_nothing_but_padding() -> None:
    """And those of a rank in a whole step."""
    layout = Layout(dp=2)
    config = post_training("sft", layout, **PADDED)
    found = [global_batch(config, step)["counted"].any(1) for step in range(STEPS)]
    by_rank = torch.stack(found).view(STEPS, -1, layout.dp, config.training.micro_batch_size).any(3).any(1)
    assert by_rank.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_layouts(kind: str, index: int) -> None:
    config, layout, _ = draw(2027, index, 8, kind)
    reports = run_distributed(train_rank, layout.world_size, config, STEPS)
    found = compare(reports, train_reference(config, layout.dp, STEPS))
    assert found.equal, (str(layout), found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_random_layouts(kind: str) -> None:
    bad = []
    for index in range(50):
        config, layout, _ = draw(1, index, 8, kind)
        found = compare(
            run_distributed(train_rank, layout.world_size, config, STEPS), train_reference(config, layout.dp, STEPS)
        )
        if not found.equal:
            bad.append((index, str(layout), found))
    assert not bad, bad


def _loss_of_the_reference_itself(config: RunConfig) -> tuple[float, dict[str, float]]:
    """A first step whose reference is the model, its log-probabilities computed in this layout."""
    trainer = make_trainer(config)
    batches = micro_batches(trainer, 0)
    with torch.no_grad():
        outputs = trainer.engine.forward([trainer.sequence.of_batch(batch) for batch in batches])
    trainer.model.reshard()
    for batch, output in zip(batches, outputs, strict=True):
        batch["reference_log_probs"] = _whole(output, trainer.sequence)
    result = trainer.step(0, batches)
    return result.loss, {name: result.metrics[name] for name in ("margin", "reward_chosen", "reward_rejected")}


def _whole(held: torch.Tensor, sequence: SequenceShard) -> torch.Tensor:
    """``[B, S]`` from the parts ``[B, S / parts]`` of all ranks of a sequence."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, held)
    by_cp = [torch.cat(parts[first : first + sequence.tp.size], 1) for first in range(0, len(parts), sequence.tp.size)]
    return by_cp[0] if sequence.cp.size == 1 else join_chunks(torch.stack(by_cp))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(tp=2, cp=2, ep=4)], ids=str)
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_dpo_begins_at_ln_2_in_every_layout(layout: Layout, precision: str) -> None:
    """NeMo-Aligner #227: under tensor parallelism, the policy differed from the reference that it was."""
    config = post_training("dpo", layout, precision__compute=precision, precision__master=precision)
    for loss, metrics in run_distributed(_loss_of_the_reference_itself, layout.world_size, config):
        assert abs(loss - math.log(2)) <= math.ulp(math.log(2)) and set(metrics.values()) == {0.0}


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


def _padding_counted(patch: Any) -> None:
    """Routers and the tokens of the step count padding."""
    from parallel.sequence import SequenceShard

    original = SequenceShard.of_batch
    patch(
        SequenceShard,
        "of_batch",
        lambda shard, batch: original(shard, {**batch, "counted": torch.ones_like(batch["counted"])}),
    )


def _documents_of_one_rank(patch: Any) -> None:
    """An answer's sum over the tokens of one rank."""
    from parallel import sequence

    patch(sequence, "all_reduce_with_gradient", lambda x, axis: x)


def _packing_seen(patch: Any) -> None:
    """Documents see the documents before their own (TRL #1230 and #3526)."""
    from qwen_moe.models.decoder import DecoderLM

    original = DecoderLM.hidden_states
    patch(
        DecoderLM,
        "hidden_states",
        lambda model, x, positions, starts, *rest: original(model, x, positions, torch.zeros_like(starts), *rest),
    )


def _mean_of_each_micro_batch(patch: Any) -> None:
    """Each micro-batch divides by its own tokens (TRL #3021 and #3231, verl #593, mlx-lm #1413)."""
    from qwen_moe.training.step import Trainer

    def loss(trainer: Trainer, output: torch.Tensor, batch: Any) -> torch.Tensor:
        whole, _ = trainer.objective.loss(output, batch, trainer.sequence)
        return whole / (batch["labels"] >= 0).sum() / trainer.grids.dp.size

    patch(Trainer, "_loss", loss)


def _first_label_lost(patch: Any) -> None:
    """The first token of every response is not learned (fw-ai/cookbook #388)."""
    from parallel.sequence import SequenceShard

    original = SequenceShard.of_batch

    def of_batch(shard: Any, batch: Any) -> Any:
        labels = batch["labels"]
        first = (labels >= 0) & (torch.nn.functional.pad(labels, (1, 0), value=-100)[:, :-1] < 0)
        return original(shard, {**batch, "labels": labels.masked_fill(first, -100)})

    patch(SequenceShard, "of_batch", of_batch)


def _score_of_one_rank(patch: Any) -> None:
    """Each tp rank keeps the head's gradient of its own tokens."""
    from qwen_moe.sharding import parallelize

    original = parallelize.placement

    def placed(name: str, shape: Any, grids: Any) -> Any:
        place = original(name, shape, grids)
        return replace(place, replicas=()) if name == "score.weight" else place

    patch(parallelize, "placement", placed)


def _score_at_the_last_token(patch: Any) -> None:
    """Scores are read at the last token of a document, whatever the batch says (transformers #35352)."""
    from qwen_moe.objectives import reward

    original = reward.answer_scores

    def answer_scores(scores: torch.Tensor, batch: Any, sequence: Any) -> Any:
        starts = torch.nn.functional.pad(batch["document_starts"], (0, 1), value=-1)
        last = (starts[:, 1:] != starts[:, :-1]).unsqueeze(-1)
        return original(scores, {**batch, "preferences": last.long()}, sequence)

    patch(reward, "answer_scores", answer_scores)


POST_TRAINING_MISTAKES: dict[str, tuple[Callable[[Any], None], str, Layout]] = {
    "padding counted": (_padding_counted, "sft", Layout(dp=2)),
    "sums of answers over one rank's tokens": (_documents_of_one_rank, "dpo", Layout(tp=2)),
    "sums of answers over one cp rank's tokens": (_documents_of_one_rank, "dpo", Layout(cp=2)),
    "documents seen by the next": (_packing_seen, "sft", Layout(dp=2)),
    "mean of each micro-batch": (_mean_of_each_micro_batch, "sft", Layout(dp=2)),
    "gradient of the head of scores of one rank": (_score_of_one_rank, "reward_model", Layout(tp=2)),
    "scores at the last token": (_score_at_the_last_token, "reward_model", Layout(dp=2)),
    "answers scored on one rank": (_documents_of_one_rank, "reward_model", Layout(tp=2)),
    "first label lost": (_first_label_lost, "grpo", Layout(dp=2)),
}


def _broken_post_training(config: RunConfig, mistake: str) -> Report:
    POST_TRAINING_MISTAKES[mistake][0](setattr)
    return train_rank(config, STEPS)


@pytest.mark.parametrize("mistake", POST_TRAINING_MISTAKES)
def test_a_mistake_of_post_training_is_seen(mistake: str) -> None:
    _, kind, layout = POST_TRAINING_MISTAKES[mistake]
    config = post_training(kind, layout)
    reports = run_distributed(_broken_post_training, layout.world_size, config, mistake)
    found = compare(reports, train_reference(config, layout.dp, STEPS))
    assert not found.equal and (found.wrong or found.largest > 1e-6), found


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
