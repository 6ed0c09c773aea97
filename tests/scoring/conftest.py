"""A small reward model with a tokenizer that has a chat template."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, save_pretrained
from qwen_moe.data.tokenizer import read_tokenizer, train_tokenizer
from qwen_moe.models.decoder import DecoderLM
from tests.models.hf_reference import draw_weights
from tests.small import small_model

CRITERIA = ("helpful", "concise")
VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["alpha beta gamma def return import"] * 3, 290, path)
    return path


def reward_model(dtype: torch.dtype = torch.float32, **changes: Any) -> DecoderLM:
    changes = {"criteria": CRITERIA, "vocab_size": VOCABULARY, "max_position_embeddings": 256} | changes
    return draw_weights(small_model(**changes), 4, dtype)


@pytest.fixture(scope="session")
def folders(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face directory and a checkpoint made from it, in float64."""
    hf, checkpoint = (tmp_path_factory.mktemp("reward") / name for name in ("hf", "checkpoint"))
    save_pretrained(reward_model(torch.float64), hf, tokenizer=read_tokenizer(tokenizer))
    convert_from_hf(hf, checkpoint)
    return hf, checkpoint
