"""A tokenizer that tests of prepared data share."""

from pathlib import Path

import pytest

from qwen_moe.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer(["alpha beta gamma δέλτα def return import"] * 3, 290, path)
    return path
