"""megatron-core's datasets without the rest of it: the same datasets, in a fraction of the time."""

import subprocess
import sys

import pytest

RANDOM = """
import hashlib, sys, tempfile
import numpy as np
import torch
{first}
from qwen_moe.data.megatron import BlendedMegatronDatasetBuilder, GPTDataset, GPTDatasetConfig, IndexedDatasetBuilder
from qwen_moe.data.batches import _MegatronTokenizer
import torch.distributed as dist
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=0, world_size=1)
    rng = np.random.default_rng(1)
    for name in "ab":
        builder = IndexedDatasetBuilder(f"{{folder}}/{{name}}.bin", dtype=np.uint16)
        for _ in range(200):
            builder.add_item(torch.tensor(rng.integers(5, 60_000, rng.integers(1, 80))))
            builder.end_document()
        builder.finalize(f"{{folder}}/{{name}}.idx")
    settings = GPTDatasetConfig(
        random_seed=3, sequence_length=32, path_to_cache=f"{{folder}}/cache", tokenizer=_MegatronTokenizer(3),
        reset_position_ids=True, reset_attention_mask=False, eod_mask_loss=True, create_attention_mask=False,
        blend=([f"{{folder}}/a", f"{{folder}}/b"], [0.3, 0.7]), split="90,10,0",
    )
    train, validation, _ = BlendedMegatronDatasetBuilder(GPTDataset, [300, 20, 0], lambda: True, settings).build()
    samples = [dataset[n] for dataset, count in ((train, 300), (validation, 20)) for n in range(count)]
    digest = hashlib.sha256()
    for sample in samples:
        for key in sorted(sample):
            digest.update(np.asarray(sample[key]).tobytes())
    dist.destroy_process_group()
print(digest.hexdigest(), "megatron.core.transformer" in sys.modules, "torch._inductor" in sys.modules)
"""


def run(first: str) -> list[str]:
    script = RANDOM.format(first=first)
    return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()


def test_the_rest_of_megatron_core_is_not_imported() -> None:
    digest, transformer, inductor = run("")
    assert len(digest) == 64 and (transformer, inductor) == ("False", "False")


@pytest.mark.slow
def test_samples_are_those_of_the_whole_of_megatron_core() -> None:
    digest, transformer, _ = run("import megatron.core")
    assert transformer == "True" and digest == run("")[0]


@pytest.mark.slow
def test_the_whole_of_megatron_core_can_be_imported_afterwards() -> None:
    script = (
        "import qwen_moe.data.megatron as ours; import megatron.core; from megatron.core import parallel_state; "
        "from megatron.core.datasets import gpt_dataset; from megatron.core.utils import get_model_config; "
        "print(gpt_dataset.GPTDataset is ours.GPTDataset, megatron.core.__version__)"
    )
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert found[0] == "True" and found[1][0].isdigit()
