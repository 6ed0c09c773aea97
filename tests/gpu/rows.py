"""What the parts of the GPU report find, and on what device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qwen_moe.errors import UserError


@dataclass(frozen=True)
class Row:
    what: str
    outcome: str  # ok, failed, skipped
    value: str


@dataclass(frozen=True)
class Where:
    """The device, and whether sizes are small."""

    device: torch.device
    tiny: bool

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def check(what: str, value: float, bound: float) -> Row:
    """ok when ``value`` is a number of at most ``bound``."""
    return Row(what, "ok" if value <= bound else "failed", f"{value:.3g} (at most {bound:g})")


def skipped(what: str, reason: object) -> Row:
    return Row(what, "skipped", str(reason)[:300])


def guarded(what: str, rows: Iterator[Row]) -> Iterator[Row]:
    """``rows``; a message for users makes a row that is skipped, any other error one that failed, and the part goes on."""
    try:
        yield from rows
    except UserError as error:
        yield skipped(what, error)
    except Exception as error:
        yield Row(what, "failed", f"{type(error).__name__}: {error}"[:300])


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    expected = expected.double().cpu()
    return float((got.double().cpu() - expected).norm() / expected.norm())
