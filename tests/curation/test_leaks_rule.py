"""The decision equals brute force; the index of words loses nothing, and that of 3-grams no copy with a fifth changed."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_moe.curation.leaks.edits import least_edits
from qwen_moe.curation.leaks.finder import windows
from qwen_moe.curation.leaks.index import Seeds
from qwen_moe.curation.leaks.lcs import alignment, longest_common, masks_of
from tests.curation.leaks_data import brute_force, changed, draw, finder, leaked, table_edits, table_lcs

SHORT = st.lists(st.integers(0, 4), max_size=90)  # beyond the 64 bits of a machine's word


@given(SHORT, SHORT)
def test_the_bits_equal_the_table(first: list[int], second: list[int]) -> None:
    assert longest_common(first, second) == table_lcs(first, second)


@given(SHORT.filter(bool), SHORT)
def test_the_bits_count_edits_as_the_table_does(pattern: list[int], text: list[int]) -> None:
    assert least_edits(masks_of(pattern), len(pattern), text) == table_edits(pattern, text)


@given(SHORT, SHORT)
def test_an_alignment_is_a_longest_common_subsequence(first: list[int], second: list[int]) -> None:
    pairs = alignment(first, second)
    assert len(pairs) == table_lcs(first, second)
    assert all(first[a] == second[b] for a, b in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))


def _case(rng: random.Random) -> tuple[list[list[str]], list[str]]:
    """Tests, and a document that has parts of them: changed, cut, torn apart by other words, or none."""
    words = rng.choice((6, 20, 60, 112))
    tests = [draw(rng, rng.randint(13, rng.choice((16, 40, 120))), words) for _ in range(rng.randint(1, 6))]
    document = draw(rng, rng.randint(0, 60), words)
    for _ in range(rng.randint(0, 2)):
        test = rng.choice(tests)
        start = rng.randrange(len(test) - 12)
        part = changed(rng, test[start : rng.randint(start + 13, len(test))], rng.choice((0, 0.2, 0.4, 0.5)))
        if rng.random() < 0.4:
            part = [word for one in part for word in (one, *draw(rng, rng.randint(0, 2), words))]
        document += part + draw(rng, rng.randint(0, 60), words)
    return tests, document


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(("windowed", "close", "report")))
def test_the_index_of_words_decides_as_brute_force(seed: int, rule: str) -> None:
    tests, document = _case(random.Random(seed))
    expected = {number for number, test in enumerate(tests) if brute_force(document, test, rule)}
    assert leaked(finder(tests, rule), document) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_the_index_of_3_grams_decides_as_brute_force_in_the_windows_that_it_names(seed: int) -> None:
    tests, document = _case(random.Random(seed))
    found = finder(tests, seeds="3-grams")
    expected = set()
    for at, starts in found._index.candidates(found.numbers(document)):
        test = tests[found._order[at]]
        parts = [document[n * len(test) : (n + 2) * len(test)] for n in starts] or [document]
        # What is left at the end, and is in the window before, is no window of its own.
        parts = [part for n, part in enumerate(parts) if len(part) > len(test) or not starts or starts[n] == 0]
        if any(brute_force(part, test, "windowed") for part in parts):
            expected.add(found._order[at])
    assert leaked(found, document) == expected
    assert expected <= {number for number, test in enumerate(tests) if brute_force(document, test, "windowed")}


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(13, 200))
def test_the_index_of_3_grams_finds_every_copy_with_a_fifth_changed(seed: int, length: int) -> None:
    rng = random.Random(seed)
    tests = [draw(rng, length), *(draw(rng, rng.randint(13, 60)) for _ in range(3))]
    copy = changed(rng, tests[0], 0.2)
    document = draw(rng, rng.randint(0, 250)) + copy + draw(rng, rng.randint(0, 250))
    # Of 13 to 15 words, a fifth changed leaves fewer than 13: then the rule holds only if a word elsewhere helps.
    for rule in ("windowed", "close"):
        if length >= 16 or brute_force(document, tests[0], rule):
            assert 0 in leaked(finder(tests, rule, "3-grams"), document)


@pytest.mark.parametrize("length", range(16, 80))
def test_the_worst_places_for_changes_lose_nothing(length: int) -> None:
    """Every fifth word is replaced, so no five words in a row are left: an index of 5-grams would lose these."""
    rng = random.Random(length)
    test = draw(rng, length)
    copy = list(test)
    for place in range(4, length, 5):
        copy[place] = "new"
    runs = " ".join(copy).split("new")
    assert max(len(run.split()) for run in runs) < 5
    assert 0 in leaked(finder([test, draw(rng, 30)], seeds="3-grams"), draw(rng, 100) + copy + draw(rng, 33))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(16, 60))
def test_a_document_that_is_a_part_of_a_long_test_is_found(seed: int, length: int) -> None:
    rng = random.Random(seed)
    test = draw(rng, rng.randint(length + 1, 400))
    start = rng.randrange(len(test) - length + 1)
    document = changed(rng, test[start : start + length], 0.2)
    for rule in ("windowed", "close"):
        assert 0 in leaked(finder([test, draw(rng, 20)], rule, "3-grams"), document)


@pytest.mark.parametrize(
    ("length", "common", "leak"), [(13, 13, True), (13, 12, False), (40, 24, True), (40, 23, False)]
)
def test_both_conditions_of_the_rule(length: int, common: int, leak: bool) -> None:
    test = [f"word{n}" for n in range(length)]
    document = ["x"] * 5 + test[:common] + ["y"] * 90
    for seeds in ("words", "3-grams"):
        assert leaked(finder([test], seeds=seeds), document) == ({0} if leak else set())
    assert brute_force(document, test, "windowed") is leak


@pytest.mark.parametrize("seeds", ["words", "3-grams"])
@pytest.mark.parametrize("more", [-1, 0, 1, 20, 21])
def test_a_document_that_is_a_test_and_a_few_words_more_or_less(seeds: str, more: int) -> None:
    test = draw(random.Random(4), 20)
    for rule in ("windowed", "report"):
        assert leaked(finder([test], rule, seeds), (test + ["more"] * more)[: 20 + more]) == {0}


def test_rare_words_in_the_last_block_bring_the_window_before_it_into_question() -> None:
    """Frequent words, which the index leaves out, then rare ones; the last block of the document has all of the latter."""
    frequent, rare = [f"often{n}" for n in range(16)], [f"rare{n}" for n in range(24)]
    test = frequent + rare
    others = [frequent * 4 for _ in range(5)]
    document = ["filler"] * 24 + test
    assert brute_force(document, test, "windowed") and 0 in leaked(finder([test, *others]), document)


def test_the_literal_rule_matches_where_the_windowed_one_does_not() -> None:
    """The words of a test, in order, far apart in a long document."""
    test = [f"word{n}" for n in range(20)]
    document = [word for one in test for word in (one, *["other"] * 10)]
    assert leaked(finder([test], "report"), document) == {0}
    assert leaked(finder([test], "windowed"), document) == set()


@pytest.mark.parametrize("edit", ["replaced", "put in", "left out"])
@pytest.mark.parametrize(("length", "edits", "leak"), [(20, 4, True), (20, 5, False), (29, 5, True), (60, 13, False)])
def test_a_close_copy_has_at_most_a_fifth_of_its_words_changed(edit: str, length: int, edits: int, leak: bool) -> None:
    test = [f"word{n}" for n in range(length)]
    copy = list(test)
    for n in range(edits):
        place = 1 + n * (length - 2) // edits
        copy[place] = {"replaced": "other", "put in": f"other {copy[place]}", "left out": ""}[edit]
    document = ["filler"] * length + " ".join(copy).split() + ["filler"] * (2 * length)
    assert leaked(finder([test], "windowed", "3-grams"), document) == {0}, "it is a leak by the other condition"
    assert leaked(finder([test], "close", "3-grams"), document) == ({0} if leak else set())
    assert brute_force(document, test, "close") is leak


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_stretch_as_long_as_the_shorter_text_is_in_a_window(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    spans = windows(longer, shorter)
    assert spans[0][0] == 0 and spans[-1][1] == longer and all(b - a <= 2 * shorter for a, b in spans)
    for start in range(longer - shorter + 1):
        assert any(a <= start and start + shorter <= b for a, b in spans)


@pytest.mark.parametrize("kind", ["words", "3-grams"])
def test_what_is_asked_for_is_there(kind: str) -> None:
    seeds = Seeds(kind)  # type: ignore[arg-type]
    for tokens in range(13, 3000):
        assert 1 <= seeds.wanted(tokens) <= seeds.shared(tokens) <= tokens - seeds.n + 1 >= seeds.kept(tokens) >= 1


def test_unknown_tokens_are_zero() -> None:
    found = finder([[f"word{n}" for n in range(13)]])
    assert np.array_equal(found.numbers(["word3", "nowhere", "word0"]), [4, 0, 1])
