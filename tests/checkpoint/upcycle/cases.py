"""Dense models with random weights, and settings that upcycle them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import qwen_moe
from qwen_moe.checkpoint.tensor_store import CheckpointTensors
from qwen_moe.checkpoint.upcycle.settings import UpcycleSettings
from qwen_moe.models.decoder import DecoderLM
from tests.checkpoint.huggingface.directories import write_side_files
from tests.models.hf_reference import draw_weights
from tests.small import small_model

WIDTH = 20  # intermediate_size of the dense models
FINE = UpcycleSettings(num_experts=6, top_k=2, expert_size=7, shared_expert=24)
SAME = UpcycleSettings(num_experts=8, top_k=4, expert_size=5, method="same_function")
SHARED = replace(SAME, shared_expert=WIDTH)
ONE_COPY = UpcycleSettings(num_experts=4, top_k=4, expert_size=5, method="same_function", router="even")


def dense(folder: Path, family: str = "qwen2", dtype: torch.dtype = torch.float64, **changes: Any) -> DecoderLM:
    """A dense model with random weights, norms and biases included, written to ``folder``."""
    model = draw_weights(small_model(family, **changes), 3, torch.float64).to(dtype)
    qwen_moe.save_pretrained(model, folder)
    write_side_files(folder)
    return model


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    source = CheckpointTensors(checkpoint)
    return {name: source.read(name) for name in source.shapes()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())
