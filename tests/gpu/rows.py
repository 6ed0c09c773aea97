"""What the parts of the GPU report find, and on what device."""

from dataclasses import dataclass

import torch


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


def error_of(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    expected = expected.double().cpu()
    return float((got.double().cpu() - expected).norm() / expected.norm())
