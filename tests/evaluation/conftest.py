"""A tokenizer that knows the words of the tasks, so that completions have room for the answers."""

from pathlib import Path
from typing import Any

import pytest

from qwen_moe.data.tokenizer import train_tokenizer
from qwen_moe.evaluation.tasks.common_words import WORDS
from qwen_moe.evaluation.tasks.haystack import NOISE


@pytest.fixture(scope="session")
def tokenizer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "tokenizer"
    train_tokenizer([" ".join(WORDS), NOISE, "VAR One of the special magic numbers for is:"] * 3, 2800, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_files: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_files)
