"""The scores `words` and `variety`, which need no model."""

import random

import pytest

from qwen_moe.curation.scores.plain import plain

PROSE = "The river runs past the old mill, and on its far bank somebody has planted a row of young poplars."


@pytest.mark.parametrize(
    ("text", "share"), [("ab 12 c", 2 / 5), ("ab\n\tcd", 1.0), ("1.0 2.5", 0.0), (" ", 0.0), ("größer", 1.0)]
)
def test_the_share_of_words(text: str, share: float) -> None:
    assert plain(text, {})["words"] == pytest.approx(share)


def test_text_that_repeats_itself_has_little_variety() -> None:
    rng = random.Random(0)
    words = [f"{rng.choice('bdfglmnprst')}{rng.choice('aeiou')}{rng.choice('lmnrst')}" for _ in range(2000)]
    once, again = " ".join(words), PROSE * 80
    assert plain(again, {})["variety"] < 0.05 < 0.3 < plain(once, {})["variety"] < 0.6
    assert plain(PROSE, {})["variety"] > 0.7


def test_long_and_empty_texts() -> None:
    long = PROSE * 2000
    assert plain(long, {})["variety"] == plain(long * 2, {})["variety"], "only the beginning is compressed"
    assert plain("", {}) == {"words": 0.0, "variety": 1.0}
    assert 0 < plain("half of a pair: \ud800", {})["variety"] <= 1
