"""The flight recorder sees the messages of context parallelism: ranks that differ or do not come are named."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from parallel.hang_watch import HUNG
from tests.distributed import run_distributed

ROOT = Path(__file__).parents[2]
# kind, ranks that exchange heads, cp, a collective that must be seen
KINDS = [
    ("ring", 1, 2, "all_to_all"),
    ("all_gather", 1, 2, "all_gather"),
    ("all_gather", 2, 2, "all_to_all"),  # heads alone
    ("ring", 2, 4, "all_to_all"),
]


def _attention(kind: Any, heads: int) -> Any:
    """Attention of this rank of a cp of all ranks, and its inputs."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import Grids, Layout
    from qwen_moe.sharding.context import ContextAttention

    grids = Grids(Layout(cp=dist.get_world_size()), "cpu", cp_heads=heads)
    q, k, v = (torch.randn(1, 8, n, 4, requires_grad=True) for n in (4, 2, 2))
    return ContextAttention(kind, grids.cp_outer, grids.cp_heads), (q, k, v)


def _compared(kind: Any, heads: int, odd: bool) -> tuple[str, list[str]]:
    """What check mode says after attention, forward and backward, and the names of the recorded collectives."""
    import torch
    import torch.distributed as dist

    from parallel.hang_watch import MismatchError, compare_collectives
    from parallel.trace import recorded
    from qwen_moe.models.attention.mask import Visibility

    attention, (q, k, v) = _attention(kind, heads)
    if odd and dist.get_rank() == 1:  # as many bytes in another dtype: nothing fails by itself
        _lie(torch.int32)
    attention(q, k, v, Visibility(), 0.5).sum().backward()
    names = [call.name for call in recorded() if "context.py" in call.called_from]
    try:
        compare_collectives()
    except MismatchError as error:
        return str(error), names
    return "", names


def _lie(dtype: Any) -> None:
    """From now on this rank's messages of context parallelism have another dtype of the same size."""
    import torch.distributed as dist

    import parallel.context
    import qwen_moe.sharding.context as core

    def exchange(out: Any, x: Any, *splits: Any, **options: Any) -> Any:
        return original(out.view(dtype), x.view(dtype), *splits, **options)

    def gather(out: Any, x: Any, **options: Any) -> Any:
        return original_gather(out.view(dtype), x.view(dtype), **options)

    original, original_gather = dist.all_to_all_single, core.all_gather_single
    parallel.context.dist.all_to_all_single = exchange  # type: ignore[assignment]
    core.all_gather_single = gather  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "heads", "cp", "collective"), KINDS)
def test_check_mode_sees_every_kind(
    monkeypatch: pytest.MonkeyPatch, kind: str, heads: int, cp: int, collective: str
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "200")
    for message, names in run_distributed(_compared, cp, kind, heads, False):
        assert message == ""
        assert any(collective in name for name in names), names
    for message, _ in run_distributed(_compared, cp, kind, heads, True):
        assert "Float" in message and "Int" in message and "context.py" in message


SCRIPT = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from parallel.process import process_info, start
from parallel.threads import Threads
from parallel.hang_watch import HangWatch
from qwen_moe.models.attention.mask import Visibility
from tests.parallel.test_context_watch import _attention

def never_comes():
    time.sleep(600)

info = process_info()
start(info, Threads(count=1, why="test"))
watch = HangWatch(Path(sys.argv[1]), info.rank, info.world_size, limit=4.0, poll=1.0)
attention, tensors = _attention(sys.argv[2], int(sys.argv[3]))
attention(*tensors, Visibility(), 0.5)
y = attention(*tensors, Visibility(), 0.5)
watch.start()
try:
    if info.rank == 1:
        never_comes()
    y.sum().backward()
finally:
    watch.stop()
"""


@pytest.mark.parametrize(("kind", "heads", "cp", "collective"), KINDS[:3])
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, kind: str, heads: int, cp: int, collective: str) -> None:
    """It misses backward's messages."""
    script = tmp_path / "hang.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(cp), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "hang"), kind, str(heads)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PATH": os.environ["PATH"]},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(cp)
    ]
    try:
        told = "".join(process.communicate(timeout=120)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert {process.returncode for process in processes} == {HUNG}, told
    assert "ranks [1] have not reached collective" in told, told
    assert collective in told and "context.py" in told and "never_comes" in told
