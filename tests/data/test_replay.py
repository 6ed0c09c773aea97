"""The experts of packed rows, and what is refused."""

import re
from typing import Any

import pytest
import torch

from qwen_moe.data.replay import check_experts, experts_of_row
from qwen_moe.errors import UserError
from tests.small import small_model

LAYERS, TOP_K = 2, 2


def numbered(tokens: int, first: int) -> torch.Tensor:
    return torch.arange(first, first + tokens * LAYERS * TOP_K, dtype=torch.int16).view(tokens, LAYERS, TOP_K)


def test_documents_lie_at_their_places_in_the_row() -> None:
    one, other = numbered(3, 0), numbered(2, 100)
    row = experts_of_row(8, [(0, one), (4, other)])
    assert row.dtype == torch.int16 and torch.equal(row[:3], one) and torch.equal(row[4:6], other)
    assert bool((row[[3, 6, 7]] == -1).all())


@pytest.mark.parametrize("begin", [-1, 6])
def test_a_document_beyond_the_row_is_refused(begin: int) -> None:
    with pytest.raises(ValueError, match=rf"3 tokens begins at token {begin} of a row of 8"):
        experts_of_row(8, [(begin, numbered(3, 0))])


def batch(experts: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": torch.zeros(1, 3, dtype=torch.int64), "experts": experts}


def told(changed: tuple[int, int, int] = (0, 0, 0), choice: tuple[int, int] = (5, 0), **kind: Any) -> torch.Tensor:
    experts = torch.tensor([1, 3], **kind).expand(1, 3, LAYERS, TOP_K).clone()
    experts[changed] = torch.tensor(choice, **kind)
    return experts


GOOD = {
    "int16": told(dtype=torch.int16),
    "int64": told(dtype=torch.int64),
    "some unknown": told(choice=(-1, -1)),
}
BAD = {
    "too large": (told((0, 2, 1), (0, 6)), "an expert to replay is 6, but the model has 6: give 0 to 5"),
    "too small": (told((0, 2, 1), (0, -2)), "an expert to replay is -2"),
    "half unknown": (told((0, 2, 1), (0, -1)), "token 2 of row 0 in MoE layer 1 are [0, -1]: give all 2"),
    "twice": (told((0, 1, 0), (4, 4)), "token 1 of row 0 in MoE layer 0 are [4, 4]: give each expert once"),
    "of another depth": (told()[:, :, :1], "[1, 3, 1, 2], but the rows' tokens, 2 MoE layers and 2 experts"),
    "of other tokens": (told()[:, :2], "integers [1, 3, 2, 2]"),
    "not whole numbers": (told().double(), "are torch.float64"),
}


@pytest.mark.parametrize("name", GOOD)
def test_experts_of_the_model_pass(name: str) -> None:
    check_experts(batch(GOOD[name]), small_model())


@pytest.mark.parametrize("name", BAD)
def test_other_experts_are_refused(name: str) -> None:
    experts, message = BAD[name]
    with pytest.raises(UserError, match=re.escape(message)):
        check_experts(batch(experts), small_model())


def test_a_dense_model_has_nothing_to_replay() -> None:
    with pytest.raises(UserError, match="the model has none"):
        check_experts(batch(told()), small_model("qwen3"))
