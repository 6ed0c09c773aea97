"""Scorers that tests share."""

from pathlib import Path

import pytest
import torch

from tests.curation.scoring import save_scorer


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct model in float64."""
    return save_scorer(tmp_path_factory.mktemp("scorer") / "hf")


@pytest.fixture(scope="session")
def scorer_32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_scorer(tmp_path_factory.mktemp("scorer") / "hf", torch.float32)


@pytest.fixture(scope="session")
def base_scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without a chat template."""
    return save_scorer(tmp_path_factory.mktemp("scorer") / "hf", chat=False)
