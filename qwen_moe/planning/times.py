"""Seconds of a training step and of its parts."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Seconds that some layers take for the forward and backward of one micro-batch. ``experts`` is the time that grows
    with the imbalance between experts."""

    compute: float = 0.0
    tp: float = 0.0
    ep: float = 0.0
    experts: float = 0.0  # already included in compute and ep
    cp: float = 0.0  # exposed communication and the copies that come with it

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.compute + other.compute,
            self.tp + other.tp,
            self.ep + other.ep,
            self.experts + other.experts,
            self.cp + other.cp,
        )

    def __mul__(self, times: float) -> "Part":
        return Part(self.compute * times, self.tp * times, self.ep * times, self.experts * times, self.cp * times)

    @property
    def total(self) -> float:
        return self.compute + self.tp + self.cp + self.ep


def total(parts: Iterable[Part]) -> Part:
    """The sum of ``parts``, added in their order."""
    compute = tp = ep = experts = cp = 0.0
    for part in parts:
        compute += part.compute
        tp += part.tp
        ep += part.ep
        experts += part.experts
        cp += part.cp
    return Part(compute, tp, ep, experts, cp)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step. ``tp``, ``cp``, ``ep``, ``pp`` and ``dp`` are exposed communication; ``cp`` includes its copies.
    ``imbalance`` is the excess of the
    slowest pipeline rank and of the busiest expert over the average ones. ``sampling``: this step's share of an episode's
    answers; ``preparing``: log-probabilities before it."""

    compute: float
    tp: float
    cp: float
    ep: float
    pp: float
    dp: float
    bubble: float
    imbalance: float
    optimizer: float
    sampling: float = 0.0
    preparing: float = 0.0

    @property
    def total(self) -> float:
        busy = self.compute + self.tp + self.cp + self.ep + self.pp + self.dp
        return busy + self.bubble + self.imbalance + self.optimizer + self.sampling + self.preparing
