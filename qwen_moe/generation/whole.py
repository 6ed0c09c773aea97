"""Attention of whole sequences that one pass reads: neighbors of similar length together, padded at their end.

Causal attention of a token does not see the padding behind its sequence, so nothing has to be hidden. Shapes: N tokens of
all sequences, one after another; H query heads, G key/value heads, C head dim.
"""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from qwen_moe.models.attention.reader import Reader

_WASTE = 1.5  # pairs of query and key with padding, at most, over those without


def similar(lengths: Sequence[int]) -> list[list[int]]:
    """``lengths`` in runs of neighbors that are read together."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs:
            run = [*runs[-1], length]
            if max(run) ** 2 * len(run) <= _WASTE * sum(one**2 for one in run):
                runs[-1] = run
                continue
        runs.append([length])
    return runs


def _stacked(x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """``x [N, ., C]`` -> ``[sequences, longest, ., C]``."""
    if len(set(lengths)) == 1:
        return x.unflatten(0, (len(lengths), lengths[0]))
    return pad_sequence(x.split(list(lengths)), batch_first=True)


def _flat(x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The inverse of `_stacked`."""
    if len(set(lengths)) == 1:
        return x.flatten(0, 1)
    return torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)])


def attend_whole(
    reader: Reader, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention ``[N, H, C]``, keys as they are cached ``[N, G, C]``) of sequences of ``lengths``, which begin at position
    0; ``q [N, H, C], k, v [N, G, C]`` without rotation."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    end = 0
    for run in similar(lengths):
        together = len(run) > 1 and reader.takes_several
        for part in [run] if together else [[length] for length in run]:
            begin, end = end, end + sum(part)
            asked, keys, values = (_stacked(x[begin:end], part) for x in (q, k, v))
            keys = reader.keys(keys, 0)
            found.append((_flat(reader.attend(layer, asked, keys, values, 0), part), _flat(keys, part)))
    return torch.cat([y for y, _ in found]), torch.cat([keys for _, keys in found])
