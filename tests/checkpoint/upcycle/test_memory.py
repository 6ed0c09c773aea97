"""Upcycling holds a few of the largest tensors, not the model: measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_moe.config import ModelConfig
from qwen_moe.models.init import build_model
from tests.checkpoint.huggingface.directories import by_hand

_MEASURED = """
import json, sys
from pathlib import Path
from qwen_moe.checkpoint.upcycle.convert import upcycle
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings

def high_water():
    # Not ru_maxrss: that one starts from what the parent process held.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

tiny, large, work = map(Path, sys.argv[1:])
marks = []
for source, size in ((tiny, 6), (large, 192)):
    settings = UpcycleSettings(num_experts=16, top_k=2, expert_size=size, shared_expert=2 * size)
    upcycle(source, work / f"moe-{source.name}", settings)
    marks.append(high_water())
print(json.dumps(marks))
"""


def _config(layers: int, width: int) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads VmHWM of /proc/self/status")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    width = 256
    largest = 16 * 2 * 192 * width * 4  # gate and up of all experts of a layer, float32: 6.3 MB
    for name, config in (("tiny", _config(1, 8)), ("large", _config(20, width))):
        by_hand(tmp_path / name, build_model(config, 0), torch.float32, files=2)
    result = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "tiny"), str(tmp_path / "large"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    made = sum(path.stat().st_size for path in (tmp_path / "moe-large").glob("*.distcp"))
    assert made > 30 * largest
    # The tiny model has loaded all code and costs nothing itself.
    baseline, peak = json.loads(result.stdout)
    print(f"{(peak - baseline) / largest:.1f} of the largest tensor")
    assert peak - baseline < 3 * largest
