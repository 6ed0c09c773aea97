"""Weights from a Hugging Face directory, trained one step in tp=2,pp=2,ep=2 and exported, equal transformers' own step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, convert_to_hf
from qwen_moe.config import RunConfig
from qwen_moe.training.schedule import learning_rate
from qwen_moe.verify.case import global_batch
from qwen_moe.verify.ranks import make_trainer, micro_batches
from tests.distributed import run_distributed
from tests.models.hf_reference import draw_weights, hf_model, true_float64
from tests.verify.cases import QWEN3, case


def _one_step(config: RunConfig, weights: Path, root: Path) -> tuple[float, float]:
    from qwen_moe.checkpoint.distributed import CheckpointWriter, load_weights
    from qwen_moe.checkpoint.train_state import TrainState

    trainer = make_trainer(config)
    load_weights(weights, trainer.model, config.model)
    result = trainer.step(0, micro_batches(trainer, 0))
    writer = CheckpointWriter(root, keep=1, asynchronous=False, config=config.model, compute_dtype="fp64")
    state = TrainState(step=1, consumed_samples=0, consumed_tokens=0, data_fingerprint="", settings={})
    writer.save(trainer.model, trainer.optimizer, state)
    return result.loss, result.grad_norm


@pytest.mark.parametrize("changes", [{}, QWEN3 | {"model__tie_word_embeddings": False}], ids=["qwen2_moe", "qwen3_moe"])
def test_load_train_export(tmp_path: Path, changes: dict[str, Any]) -> None:
    import transformers

    layout = Layout(tp=2, pp=2, ep=2)
    plain = {"balance__scope": "none", "balance__z_loss_coefficient": 0.0, "balance__bias_update_rate": 0.0}
    config = case(layout, **plain, **changes)
    with true_float64():
        theirs = hf_model(draw_weights(config.model, 5))
        theirs.save_pretrained(tmp_path / "before")
    convert_from_hf(tmp_path / "before", tmp_path / "checkpoint")
    runs = run_distributed(_one_step, 4, config, tmp_path / "checkpoint", tmp_path / "run")
    convert_to_hf(tmp_path / "run" / "step_00000001", tmp_path / "after")
    with true_float64():
        exported = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "after", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )

        batch = global_batch(config, 0)
        logits = theirs(input_ids=batch["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss.backward()
        parameters = dict(theirs.named_parameters())
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
        for p in parameters.values():
            p.grad *= min(1.0, config.optimizer.clip_grad_norm / norm.item())
        decay = config.optimizer.weight_decay
        torch.optim.AdamW(
            [
                {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=learning_rate(config, 0),
            betas=(0.9, 0.95),
            eps=config.optimizer.eps,
        ).step()
    for run in runs:
        assert run == pytest.approx((loss.item(), norm.item()), rel=1e-10)
    found = dict(exported.named_parameters())
    assert found.keys() == parameters.keys()
    for name, expected in parameters.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-10, msg=name)
    with true_float64(), torch.no_grad():
        ids = batch["input_ids"]
        torch.testing.assert_close(exported(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-9, atol=1e-9)
