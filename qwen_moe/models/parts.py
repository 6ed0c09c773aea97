"""Parts of a micro-batch that pass through the layers in turn: while the rows of one travel to experts, another computes.

Shapes: B sequences of a micro-batch, b of a part, S sequence, D hidden, L MoE layers, K top-k.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from qwen_moe.models.attention.mask import Visibility
from qwen_moe.models.moe.block import Sent
from qwen_moe.models.moe.router import RouterStatistics
from qwen_moe.models.rope import RotaryTables


class Given(NamedTuple):
    """What layers are given of a part besides its hidden states: see `DecoderLM.hidden_states`. ``experts`` ``[b, S, K]`` of
    held tokens, by layer."""

    rotary: RotaryTables
    visible: Visibility
    counted: torch.Tensor | None
    experts: Mapping[int, torch.Tensor]

    def of_rows(self, rows: slice) -> "Given":
        """The same for some of the sequences."""
        cos, sin, scale = self.rotary
        if cos.shape[0] > 1:
            cos, sin = cos[rows], sin[rows]
        starts = self.visible.starts
        return Given(
            rotary=RotaryTables(cos, sin, scale),
            visible=Visibility(starts=None if starts is None else starts[rows]),
            counted=None if self.counted is None else self.counted[rows],
            experts={layer: chosen[rows] for layer, chosen in self.experts.items()},
        )


class Moving(NamedTuple):
    """Hidden states ``x [b, S, D]`` before a MoE block whose rows are on their way back from the experts."""

    x: torch.Tensor
    sent: Sent


Part = torch.Tensor | Moving  # hidden states [b, S, D]


def landed(part: Part) -> torch.Tensor:
    """The hidden states after all blocks. Waits for rows that travel."""
    return part.x + part.sent.received(part.x) if isinstance(part, Moving) else part


def split(x: torch.Tensor, given: Given, count: int) -> tuple[list[Part], list[Given]]:
    """``count`` equal parts of ``x [B, S, D]``."""
    if count == 1:
        return [x], [given]
    size = x.shape[0] // count
    assert size * count == x.shape[0], (x.shape, count)
    return list(x.split(size)), [given.of_rows(slice(begin, begin + size)) for begin in range(0, x.shape[0], size)]


def join(parts: Sequence[Part]) -> torch.Tensor:
    """``[B, S, D]`` of all parts."""
    xs = [landed(part) for part in parts]
    return xs[0] if len(xs) == 1 else torch.cat(xs)


def join_statistics(parts: Sequence[RouterStatistics]) -> RouterStatistics:
    """One layer's statistics of all parts."""
    if len(parts) == 1:
        return parts[0]
    return RouterStatistics(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
