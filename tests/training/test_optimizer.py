"""AdamW on shards against torch's own on DTensors."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed


def _three_updates(of_torch: bool) -> list[dict[str, Any]]:
    """This rank's parameters and state after three updates: 5 rows on two ranks, 1 row on two ranks, and a plain tensor."""
    import torch.distributed as dist

    from parallel.data import local, shard
    from parallel.mesh import Grids, Layout
    from qwen_moe.training.optimizer import ShardAdamW

    torch.manual_seed(0)
    model: Any = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (1, 4)))
    grids = Grids(Layout(dp=dist.get_world_size()), "cpu")
    dtype = torch.float32
    shard(model, [], grids.dense_shard, compute_dtype=dtype, reduce_dtype=dtype, reshard_after_forward=True)
    plain = torch.nn.Parameter(torch.randn(2, 2))
    parameters = [*model.parameters(), plain]
    groups = [{"params": parameters[:2]}, {"params": [plain], "weight_decay": 0.0}]  # torch's kernel takes one kind
    optimizer = (torch.optim.AdamW if of_torch else ShardAdamW)(groups, lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).copy_(torch.randn(local(parameter).shape))
        optimizer.step()
    return [
        {
            name: (local(tensor), tensor.shape, tensor.stride(), isinstance(tensor, DTensor) and tensor.placements)
            for name, tensor in {"weight": parameter.detach(), **optimizer.state[parameter]}.items()
        }
        for parameter in parameters
    ]


def test_shards_are_updated_as_torch_updates_dtensors() -> None:
    for ours, theirs in zip(*(run_distributed(_three_updates, 2, of_torch) for of_torch in (False, True)), strict=True):
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine.keys() == expected.keys() == {"weight", "step", "exp_avg", "exp_avg_sq"}
            for name, (values, *form) in expected.items():
                assert torch.equal(mine[name][0], values) and mine[name][1:] == tuple(form), name
    assert all(facts["step"][0] == 3 for facts in ours)
