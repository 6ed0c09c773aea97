"""The same bytes from any layout, number of files and number of threads."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.distributed import CheckpointWriter
from qwen_moe.checkpoint.huggingface.convert import convert_to_hf
from qwen_moe.checkpoint.train_state import TrainState
from qwen_moe.checkpoint.upcycle.convert import upcycle
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings
from qwen_moe.config import RunConfig
from qwen_moe.verify.case import layout_overrides
from qwen_moe.verify.ranks import make_trainer
from tests.checkpoint.huggingface.directories import by_hand, files_of
from tests.checkpoint.upcycle.cases import FINE
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights
from tests.small import exact_run, model_values, small_model


def _save_dense(config: RunConfig, root: Path) -> None:
    trainer = make_trainer(config)
    writer = CheckpointWriter(root, keep=1, asynchronous=False, config=config.model, compute_dtype="fp64")
    state = TrainState(step=1, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer.save(trainer.model, trainer.optimizer, state)


def test_the_layout_of_the_source_changes_no_byte(tmp_path: Path) -> None:
    values = model_values("qwen2", initializer_range=0.2)
    for name, layout in {"one": Layout(), "split": Layout(tp=2, pp=2)}.items():
        config = exact_run(values, 12, parallel=layout_overrides(layout), training__train_tokens=96)
        run_distributed(_save_dense, layout.world_size, config, tmp_path / name)
        upcycle(step_directory(tmp_path / name, 1), tmp_path / f"moe-{name}", FINE)
    expected = files_of(tmp_path / "moe-one")
    assert files_of(tmp_path / "moe-split") == expected
    convert_to_hf(step_directory(tmp_path / "one", 1), tmp_path / "hf", max_shard_size="3KB")
    upcycle(tmp_path / "hf", tmp_path / "moe-hf", FINE)
    weights = {name: data for name, data in expected.items() if name.endswith(".distcp")}
    assert len(weights) > 20
    assert {name: data for name, data in files_of(tmp_path / "moe-hf").items() if name in weights} == weights


@pytest.mark.parametrize("what", ["indices", "elements"])
def test_files_and_threads_change_no_byte(what: str, tmp_path: Path) -> None:
    model = draw_weights(small_model("qwen2", hidden_size=64, intermediate_size=512, head_dim=4), 3, torch.float32)
    settings = UpcycleSettings(num_experts=6, top_k=2, expert_size=200, shared_expert=700, reinitialize_what=what)
    threads = torch.get_num_threads()
    try:
        for name, files, count in (("one", 1, 1), ("many", 4, 2)):
            by_hand(tmp_path / name, model, torch.bfloat16, files, seed=count)
            torch.set_num_threads(count)
            upcycle(tmp_path / name, tmp_path / f"moe-{name}", settings)
    finally:
        torch.set_num_threads(threads)
    assert files_of(tmp_path / "moe-one") == files_of(tmp_path / "moe-many")
    upcycle(tmp_path / "one", tmp_path / "other", replace(settings, seed=1))
    assert files_of(tmp_path / "other") != files_of(tmp_path / "moe-one")
