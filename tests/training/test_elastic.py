"""The agent's processes: what they import, and when."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_moe.training import elastic, worker

ROOT = Path(__file__).parents[2]


def test_the_command_checks_and_prepares_a_run_without_torch() -> None:
    """The processes that train import it, once for all of them; not the command before them."""
    script = (
        "import sys, pathlib; from qwen_moe.config import load_config; from qwen_moe.training import command; "
        "from qwen_moe.data.inputs import prepare_inputs; from qwen_moe.sharding.layout import processes, run_layout; "
        "from qwen_moe.checkpoint.preflight import check_disk_space; from parallel.process import started_by_launcher; "
        "config = load_config(pathlib.Path('recipes/demo.yaml')); run_layout(config, processes(config)); "
        "check_disk_space(config, pathlib.Path('.')); started_by_launcher(); "
        "print([m for m in ('torch', 'transformers', 'megatron', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert outcome.stdout.strip() == "[]", outcome.stderr


def test_workers_are_forked_only_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert elastic._entry("c", "f")[1:] == (("-u", "-m", "qwen_moe.training.worker", "c", "f"), "spawn")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert elastic._entry("c", "f") == (elastic._forked_worker, ("c", "f"), "fork")


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_a_forked_worker_ends_with_the_workers_exit_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a success returns, which is how elastic learns of it."""
    from multiprocessing import get_context

    monkeypatch.setattr(worker, "main", lambda config, failure: code)
    process = get_context("fork").Process(target=elastic._forked_worker, args=("c", "f"))
    process.start()
    process.join(30)
    assert process.exitcode == code
