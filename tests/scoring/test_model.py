"""`ScoringModel`: the scores of each conversation by itself, whatever it is read with."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from parallel.sequence import SequenceShard
from qwen_moe.errors import UserError
from qwen_moe.objectives.reward import answer_scores
from qwen_moe.scoring.model import ScoringModel
from tests.models.hf_reference import draw_weights
from tests.scoring.conftest import CRITERIA, VOCABULARY, reward_model
from tests.small import small_model

LENGTHS = (5, 1, 17, 3, 9, 40)


def conversations() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("batch_tokens", [1, 20, 16384])
def test_scores_are_those_of_each_conversation_by_itself(batch_tokens: int) -> None:
    model = reward_model(torch.float64)
    with torch.no_grad():
        alone = torch.stack([model(torch.tensor([ids]))[0, -1] for ids in conversations()])
    found = ScoringModel(model, batch_tokens=batch_tokens).scores(conversations())
    assert found.shape == (6, 2)
    torch.testing.assert_close(found, alone, rtol=1e-11, atol=1e-11)


def test_what_it_is_scored_with_changes_nothing() -> None:
    scoring = ScoringModel(reward_model(torch.float64))
    whole, order = scoring.scores(conversations()), [4, 0, 3]
    some = scoring.scores([conversations()[i] for i in order])
    torch.testing.assert_close(some, whole[order], rtol=1e-11, atol=1e-11)


def test_read_one_at_a_time_they_have_the_same_bits() -> None:
    scoring = ScoringModel(reward_model(), batch_tokens=1)
    whole = scoring.scores(conversations())
    assert torch.equal(scoring.scores(conversations()[::-1]), whole.flip(0))


def test_they_are_the_scores_that_training_reads() -> None:
    """Two answers as documents of one row, judged at their last tokens."""
    model, (first, second) = reward_model(torch.float64), (conversations()[0], conversations()[2])
    ids = torch.tensor([first + second])
    starts = torch.tensor([[0] * len(first) + [len(first)] * len(second)])
    positions = torch.arange(ids.shape[1]) - starts
    judged = torch.zeros(1, ids.shape[1], 2)
    judged[0, len(first) - 1], judged[0, -1] = 1.0, -1.0
    with torch.no_grad():
        of_tokens = model(ids, positions, starts)
    found = answer_scores(of_tokens, {"preferences": judged, "document_starts": starts}, SequenceShard())
    expected = ScoringModel(model).scores([first, second])
    torch.testing.assert_close(torch.cat(found)[:, 0], expected, rtol=1e-11, atol=1e-11)


def test_done_is_called_in_order() -> None:
    seen: list[int] = []
    ScoringModel(reward_model(), batch_tokens=20).scores(conversations(), lambda i, scores: seen.append(i))
    assert seen == list(range(6))


def test_weights() -> None:
    scoring = ScoringModel(reward_model(), (3.0, 1.0))
    assert float(scoring.weighted(torch.tensor([2.0, -2.0]))) == 1.0
    assert scoring.weighted_by((0.0, 2.0)).weighted(torch.tensor([[2.0, -2.0]])).tolist() == [-2.0]


WRONG: list[tuple[Sequence[Sequence[int]], str]] = [
    ([[1], []], "conversation 1 is empty"),
    ([[1, VOCABULARY]], f"conversation 0 has token {VOCABULARY} but the model's vocabulary has {VOCABULARY}"),
    ([[-1]], "has token -1"),
    ([[1] * 257], "has 257 tokens, more than the 256 that the model reads"),
]


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_cannot_be_read_is_refused(given: Sequence[Sequence[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ScoringModel(reward_model()).scores(given)


def test_scores_that_are_not_finite_are_refused() -> None:
    model = reward_model()
    with torch.no_grad():
        model.score.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite"):
        ScoringModel(model).scores([[1, 2]])


def test_a_language_model_has_none(folders: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="it is a language model"):
        ScoringModel(draw_weights(small_model(), 1))
    assert ScoringModel.load(folders[0]).criteria == CRITERIA
