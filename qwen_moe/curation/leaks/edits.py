"""Counts the words that must be replaced, inserted or deleted to turn a stretch of one text into another text.

Myers, "A fast bit-vector algorithm for approximate string matching based on dynamic programming" (1999), in
the bits of Python integers: bit j says by how much the count for the first j + 1 tokens of the pattern
differs from that for the first j.
"""

from collections.abc import Iterable

from qwen_moe.curation.leaks.lcs import Masks


def least_edits(masks: Masks, length: int, text: Iterable[int]) -> int:
    """The least number of tokens to replace, put in or leave out so that some stretch of ``text`` is the pattern of
    ``length`` tokens with those ``masks``."""
    full, last = (1 << length) - 1, 1 << length - 1
    more, less = full, 0  # where a column grows from one token of the pattern to the next, and where it shrinks
    count = best = length  # of the empty stretch: all tokens are put in
    for token in text:
        same = masks.get(token, 0)
        vertical = same | less
        horizontal = (((same & more) + more) ^ more) | same
        grows = less | (full & ~(horizontal | more))
        shrinks = more & horizontal
        if grows & last:
            count += 1
        elif shrinks & last:
            count -= 1
        # A stretch may begin anywhere, so the row of no tokens is 0 everywhere.
        grows, shrinks = grows << 1, shrinks << 1
        more = full & (shrinks | ~(vertical | grows))
        less = full & grows & vertical
        best = min(best, count)
    return best
