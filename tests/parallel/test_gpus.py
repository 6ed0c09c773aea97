"""How many GPUs a run may use, and what is said when there are fewer than its processes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import parallel.gpus
from parallel.gpus import visible_gpus
from parallel.process import ProcessError, ProcessInfo, _claim_gpu


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 3),
    ],
)
def test_gpus_are_counted_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia7", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    package = tmp_path / "torch" / "__init__.py"
    package.parent.mkdir()
    monkeypatch.setattr(parallel.gpus, "find_spec", lambda _: SimpleNamespace(origin=str(package)))
    for cuda, gpus in (("'13.0'", expected), ("None", 0)):
        (package.parent / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
        assert visible_gpus(environ, tmp_path) == gpus


def test_torch_here_is_asked_by_its_version_file() -> None:
    import torch

    assert parallel.gpus._torch_has_cuda() == (torch.version.cuda is not None)


def test_two_ranks_on_one_gpu_are_told_so() -> None:
    store = dist.HashStore()
    first, second = (ProcessInfo(rank=rank, world_size=2, local_rank=rank, local_world_size=2) for rank in (0, 1))
    _claim_gpu(store, "GPU-1", first, 1)
    with pytest.raises(ProcessError, match=r"rank 1 has the same GPU .* 2 processes .* sees 1 GPU\. .*launch\.nproc"):
        _claim_gpu(store, "GPU-1", second, 1)
    _claim_gpu(store, "GPU-2", second, 2)
