"""The longest common subsequence of two sequences. One Python integer holds a row of the table, so its bits are computed
together.

Crochemore, Iliopoulos, Pinzon and Reid, "A fast and practical bit-vector algorithm for the longest common subsequence
problem" (2001), in the form of Hyyrö, "Bit-parallel LCS-length computation revisited" (2004). Bit j of the
integer is column j of the table of dynamic programming. It is 0 where the length grows from column j to j + 1. A row costs a
few operations on integers, whatever the number of columns.
"""

from collections.abc import Iterable, Sequence

Masks = dict[int, int]


def masks_of(tokens: Sequence[int]) -> Masks:
    """For each token, the bits of the places where it stands."""
    masks: Masks = {}
    for place, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << place
    return masks


def common(masks: Masks, length: int, rows: Iterable[int]) -> int:
    """The length of the longest common subsequence of a text of ``length`` tokens with those ``masks``, and another one,
    whose tokens have the masks ``rows``. Tokens that the text does not have may be left out of ``rows``."""
    bits = full = (1 << length) - 1
    for mask in rows:
        both = bits & mask
        bits = (bits + both) | (bits - both)
    return length - (bits & full).bit_count()


def longest_common(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the longest common subsequence of two sequences."""
    masks = masks_of(first)
    return common(masks, len(first), [masks[token] for token in second if token in masks])


def alignment(first: Sequence[int], second: Sequence[int]) -> list[tuple[int, int]]:
    """Places (in ``first``, in ``second``) of one longest common subsequence, ascending."""
    masks = masks_of(first)
    bits = full = (1 << len(first)) - 1
    table = []
    for token in second:
        both = bits & masks.get(token, 0)
        bits = ((bits + both) | (bits - both)) & full
        table.append(bits)
    pairs = []
    row, column = len(second), len(first)
    while row and column:
        if table[row - 1] >> (column - 1) & 1:
            column -= 1
            continue
        row -= 1
        if row == 0 or table[row - 1] >> (column - 1) & 1:
            column -= 1
            pairs.append((column, row))
    return pairs[::-1]
