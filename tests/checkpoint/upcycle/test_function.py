"""The first forward of an upcycled model is the dense one's where it is promised, and only there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen_moe
from qwen_moe.checkpoint.upcycle.convert import upcycle
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings
from tests.checkpoint.upcycle.cases import ONE_COPY, SAME, SHARED, WIDTH, dense, relative
from tests.small import VOCAB


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("qwen3", ONE_COPY, {}),
        ("qwen3", replace(ONE_COPY, norm_topk_prob=False), {}),
        ("qwen3", replace(ONE_COPY, method="fine_grained", reinitialize=0.0, norm_topk_prob=False), {}),
        ("qwen2", replace(ONE_COPY, shared_expert=WIDTH, norm_topk_prob=False), {}),
        ("qwen3", SAME, {"qkv_bias": True}),
        ("qwen3", replace(SAME, num_experts=16, top_k=8), {"tie_word_embeddings": True}),
        ("qwen3", replace(SAME, expert_size=None), {}),
        ("qwen3", replace(SAME, expert_size=None, router="even", norm_topk_prob=False), {}),
        ("qwen3", replace(SAME, top_k=8, norm_topk_prob=False), {}),
        ("qwen2", SHARED, {"tie_word_embeddings": True}),
        ("qwen2", SHARED, {"criteria": ["helpful", "concise"]}),
        ("qwen2", replace(SHARED, shared_share=0.2, dense_layers=(0,)), {}),
        ("qwen2", replace(SHARED, shared_expert=6), {}),
        ("qwen2", replace(SHARED, shared_expert=6, shared_share=1.0), {}),
        ("qwen2", replace(SHARED, shared_expert=47), {}),
        ("qwen2", replace(SHARED, expert_size=7, top_k=3, shared_share=1.0, norm_topk_prob=False, router="random"), {}),
    ],
    ids=str,
)
def test_the_first_forward_is_the_dense_models(
    family: str, settings: UpcycleSettings, changes: dict[str, Any], tmp_path: Path
) -> None:
    dense(tmp_path / "dense", family, **changes)
    upcycle(tmp_path / "dense", tmp_path / "moe", settings)
    ids = torch.randint(0, VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))
    expected, found = (qwen_moe.from_pretrained(tmp_path / name, dtype=None)(ids) for name in ("dense", "moe"))
    assert found.dtype == torch.float64
    assert relative(found, expected) < 1e-12


def test_the_function_changes_without_what_makes_it_the_same(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    dense(tmp_path / "dense", "qwen3")
    ids = torch.arange(VOCAB)[None]
    expected = qwen_moe.from_pretrained(tmp_path / "dense", dtype=None)(ids)
    for name, settings in {
        "random": replace(SAME, method="fine_grained", reinitialize=0.0, router="random"),
        "not scaled": replace(SAME, method="fine_grained", reinitialize=0.0, router="groups", scale="none"),
        "new weights": replace(SAME, method="fine_grained", router="groups", reinitialize=0.2),
    }.items():
        upcycle(tmp_path / "dense", tmp_path / name, settings)
        found = qwen_moe.from_pretrained(tmp_path / name, dtype=None)(ids)
        assert relative(found, expected) > 1e-3, name
