"""A small model with a tokenizer that has a chat template, and queries for it."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_moe.checkpoint.huggingface.convert import save_pretrained
from qwen_moe.data.chat_template import CHAT_TEMPLATE
from qwen_moe.data.tokenizer import CONTROL_TOKENS
from tests.models.hf_reference import draw_weights
from tests.small import small_model

LETTERS = [*"abcdefghijklmnopqrstuvwxyz.", "\u0120", "\u010a"]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters and control tokens as tokens."""
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, *CONTROL_TOKENS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.add_special_tokens(list(CONTROL_TOKENS))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture(scope="session")
def hf() -> Iterator[Path]:
    """A Hugging Face directory with a tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        model = draw_weights(small_model(max_position_embeddings=64), 4, torch.float32)
        save_pretrained(model, Path(folder) / "hf", tokenizer=tokenizer())
        yield Path(folder) / "hf"


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
