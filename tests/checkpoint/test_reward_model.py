"""Checkpoints of reward models: resumed in another layout, begun from a language model, and what they cannot be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.mesh import Layout
from qwen_moe.checkpoint.directory import step_directory
from qwen_moe.checkpoint.distributed import load_weights
from qwen_moe.config import RunConfig
from qwen_moe.errors import UserError
from qwen_moe.verify.compare import compare
from qwen_moe.verify.ranks import make_trainer
from qwen_moe.verify.reference import train_reference
from tests.checkpoint.test_layouts import SAVED, STEPS, _resume, _save
from tests.distributed import run_distributed
from tests.verify.cases import case
from tests.verify.test_objectives import REWARD, post_training

# As many sequences for every layout, and a balance that does not depend on how they are cut.
SAME: dict[str, Any] = {
    "training__micro_batch_size": 1,
    "training__global_batch_size": 8,
    "training__train_tokens": STEPS * 8 * 24,
    "balance__scope": "sequence",
}


def config_for(layout: Layout, **changes: Any) -> RunConfig:
    return post_training("reward_model", layout, **({"objective__reward": REWARD} | SAME | changes))


def test_another_layout_goes_on_the_same(tmp_path: Path) -> None:
    first, second = Layout(tp=2, pp=2), Layout(cp=2, dp=2, ep=2)
    run_distributed(_save, first.world_size, config_for(first), tmp_path, False)
    reports = run_distributed(_resume, second.world_size, config_for(second), tmp_path)
    whole = train_reference(config_for(Layout()), 1, STEPS)
    rest = replace(whole, figures=whole.figures[SAVED:], counts=whole.counts[SAVED:], gradients=whole.gradients[SAVED:])
    found = compare(reports, rest)
    assert found.equal, found


def _weights(config: RunConfig, root: Path | None) -> dict[str, torch.Tensor]:
    """All weights of a run that begins, from a checkpoint if ``root`` is given."""
    trainer = make_trainer(config)
    if root is not None:
        load_weights(step_directory(root, SAVED), trainer.model, config.model)
    return {name: p.full_tensor().detach().clone() for name, p in trainer.model.named_parameters()}


def test_it_begins_from_a_language_model_with_a_new_head(tmp_path: Path) -> None:
    language = case(Layout(), **SAME, model__tie_word_embeddings=False)
    run_distributed(_save, 1, language, tmp_path, False)
    config = config_for(Layout(), model__tie_word_embeddings=False, seed=8)
    fresh = run_distributed(_weights, 1, config, None)[0]
    loaded = run_distributed(_weights, 1, config, tmp_path)[0]
    given = run_distributed(_weights, 1, language, tmp_path)[0]
    assert torch.equal(loaded["score.weight"], fresh["score.weight"])
    same = [name for name in loaded if name != "score.weight"]
    assert all(torch.equal(loaded[name], given[name]) for name in same)
    assert not all(torch.equal(loaded[name], fresh[name]) for name in same)


def _refused(config: RunConfig, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        _weights(config, root)
    return str(caught.value)


def test_a_reward_model_is_loaded_with_its_head_or_not_at_all(tmp_path: Path) -> None:
    saved = config_for(Layout())
    run_distributed(_save, 1, saved, tmp_path, False)
    fresh, loaded = (run_distributed(_weights, 1, saved, root)[0] for root in (None, tmp_path))
    assert not torch.equal(loaded["score.weight"], fresh["score.weight"])
    other = {"criteria": ["concise", "helpful"], "weights": [2.0, 0.5]}
    message = run_distributed(_refused, 1, config_for(Layout(), objective__reward=other), tmp_path)[0]
    assert "criteria is ['helpful', 'concise'] there, ['concise', 'helpful'] here" in message
    message = run_distributed(_refused, 1, case(Layout(), **SAME), tmp_path)[0]
    assert "criteria is ['helpful', 'concise'] there, [] here" in message
