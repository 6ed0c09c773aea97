"""A small model with a tokenizer, as a Hugging Face directory and as a checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_moe.checkpoint.huggingface.convert import convert_from_hf, save_pretrained
from qwen_moe.config import ModelConfig
from tests.models.hf_reference import draw_weights
from tests.small import small_model


def small_config(**changes: Any) -> ModelConfig:
    return small_model(**{"max_position_embeddings": 64} | changes)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, enough to be read by AutoTokenizer."""
    letters = [*"abcdefghijklmnopqrstuvwxyz \u0120.", "<|endoftext|>"]
    inner = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def folders() -> Any:
    """A Hugging Face directory with a tokenizer and a checkpoint made from it."""
    with tempfile.TemporaryDirectory() as folder:
        hf, checkpoint = Path(folder) / "hf", Path(folder) / "checkpoint"
        save_pretrained(draw_weights(small_config(), 4, torch.float32), hf, tokenizer=tokenizer())
        convert_from_hf(hf, checkpoint)
        yield hf, checkpoint
