"""How FSDP cuts a rank's experts where there are fewer of them than ranks: nothing is padded and no rank has nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.data import cut_dim, local
from parallel.mesh import Layout
from qwen_moe.config import RunConfig
from qwen_moe.verify.ranks import Report, make_trainer, record_step
from tests.checkpoint.test_layouts import SAVED, _writer
from tests.distributed import run_distributed
from tests.verify.cases import case


def test_the_dim_that_is_cut() -> None:
    assert cut_dim((8, 2, 6, 16), 4) == 0  # a multiple of the ranks
    assert cut_dim((2, 2, 6, 16), 4) == 3
    assert cut_dim((2, 16, 6), 4) == 1
    assert cut_dim((3, 2, 6, 16), 2) == 1
    assert cut_dim((6, 16, 8), 4) == 1  # dim 0 would be padded to 8
    assert cut_dim((3, 2, 5, 7), 4) == 0  # nothing else divides
    assert cut_dim((5, 8), 4) == cut_dim((3,), 4) == 0  # matrices and vectors
    assert cut_dim((3, 2, 5), 1) == 0


class Gathers(TorchDispatchMode):
    """Elements that each all-gather into one tensor returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::_allgather_base_":
            self.elements.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def _held_and_gathered(config: RunConfig) -> tuple[dict[str, int], list[int]]:
    """This rank's elements of each expert weight, and the size of every all-gather of a forward."""
    (part,) = make_trainer(config).model.parts
    held = {name: local(p).numel() for name, p in part.named_parameters() if ".experts." in name}
    ids = torch.zeros(1, config.data.sequence_length // config.parallel.tp, dtype=torch.int64)
    with torch.no_grad(), Gathers() as gathers:
        part(ids, ids)
    return held, gathers.elements


@pytest.mark.parametrize(
    ("layout", "experts"),
    [(Layout(dp=4), 2), (Layout(dp=4), 6), (Layout(dp=4, etp=2), 3)],
    ids=["two", "six", "three with etp"],
)
def test_no_gather_is_padded_and_every_rank_holds_its_part(layout: Layout, experts: int) -> None:
    config = case(layout, model__num_experts=experts, model__num_experts_per_tok=2)
    model = config.model
    matrix = model.hidden_size * model.moe_intermediate_size // layout.etp
    whole = {"gate_up_proj": 2 * experts * matrix, "down_proj": experts * matrix}
    for held, gathered in run_distributed(_held_and_gathered, layout.world_size, config):
        assert len(held) == 2 * len(model.moe_layers)
        assert all(count * layout.edp == whole[name.rpartition(".")[2]] for name, count in held.items()), held
        # A padded gather has another size. No dense unit of this model has this one.
        assert gathered.count(sum(whole.values())) == len(model.moe_layers), gathered


def _tensors(trainer: Any) -> list[tuple[str, list[int], torch.Tensor]]:
    """This rank's pieces of weights and moments."""
    model, state = trainer.model, trainer.optimizer.state
    found = []
    for name, parameter in model.named_parameters():
        offsets = model.range_of(name, parameter)[0]
        for what, tensor in {"weight": parameter, **state[parameter]}.items():
            if what != "step":
                found.append((f"{name} {what}", offsets, local(tensor).detach().clone()))
    return found


def _initial_and_saved(config: RunConfig, root: Path) -> tuple[list[Any], list[Any]]:
    from qwen_moe.checkpoint.train_state import TrainState

    trainer = make_trainer(config)
    initial = _tensors(trainer)
    for step in range(SAVED):
        record_step(trainer, Report(), step)
    state = TrainState(step=SAVED, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer = _writer(config, root, False)
    writer.save(trainer.model, trainer.optimizer, state)
    writer.finish()
    return initial, _tensors(trainer)


def _resumed(config: RunConfig, root: Path) -> tuple[list[Any], list[Any]]:
    from qwen_moe.checkpoint.directory import step_directory
    from qwen_moe.checkpoint.distributed import resume

    trainer = make_trainer(config)
    initial = _tensors(trainer)
    resume(step_directory(root, SAVED), trainer.model, trainer.optimizer, config.model)
    return initial, _tensors(trainer)


def _whole(ranks: list[list[tuple[str, list[int], torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Every tensor, put together from the ranks' pieces."""
    ends: dict[str, list[int]] = {}
    for name, offsets, piece in (one for pieces in ranks for one in pieces if one[2].numel()):
        reach = [begin + size for begin, size in zip(offsets, piece.shape, strict=True)]
        ends[name] = [max(pair) for pair in zip(ends.get(name, reach), reach, strict=True)]
    found = {name: torch.full(end, math.nan, dtype=torch.float64) for name, end in ends.items()}
    for name, offsets, piece in (one for pieces in ranks for one in pieces if one[2].numel()):
        at = tuple(slice(begin, begin + size) for begin, size in zip(offsets, piece.shape, strict=True))
        found[name][at] = piece.double()
    return found


@pytest.mark.parametrize("cut_first", [True, False])
def test_initial_values_and_checkpoints_are_the_same_bytes_however_experts_are_cut(
    cut_first: bool, tmp_path: Path
) -> None:
    """Six experts on four ranks of their data-parallel axis are cut along another dim; on one or two they are not."""
    layouts = [Layout(dp=4), Layout(dp=2, ep=2)]
    saved, resumed = layouts if cut_first else layouts[::-1]
    batch = {"training__global_batch_size": 16, "training__micro_batch_size": 1, "balance__scope": "sequence"}
    first, second = (case(layout, model__num_experts=6, **batch) for layout in (saved, resumed))
    before = run_distributed(_initial_and_saved, saved.world_size, first, tmp_path)
    after = run_distributed(_resumed, resumed.world_size, second, tmp_path)
    for moment in (0, 1):
        expected, found = (_whole([rank[moment] for rank in ranks]) for ranks in (before, after))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert not tensor.isnan().any(), name
            assert torch.equal(found[name], tensor), name
