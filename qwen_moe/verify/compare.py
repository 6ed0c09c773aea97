"""The largest relative difference between a layout's ranks and the run in one process."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from qwen_moe.verify.ranks import Report
from qwen_moe.verify.reference import Trajectory

TOLERANCE = 1e-10


@dataclass(frozen=True, kw_only=True)
class Differences:
    """The largest relative differences over all steps, ranks and tensors; NaN counts as infinity. ``evaluated`` is the loss
    of a batch that is evaluated after the last step. ``worst`` names the tensors. ``wrong`` lists mismatches of values that
    must be equal (counts, biases) and elements that no rank holds."""

    loss: float
    auxiliary: float
    gradients: float
    grad_norm: float
    parameters: float
    evaluated: float
    worst: dict[str, str]
    wrong: list[str]

    @property
    def largest(self) -> float:
        return max(self.loss, self.auxiliary, self.gradients, self.grad_norm, self.parameters, self.evaluated)

    @property
    def equal(self) -> bool:
        return not self.wrong and self.largest <= TOLERANCE


def _relative(got: float, expected: float) -> float:
    return _ordered(abs(got - expected) / abs(expected) if expected else abs(got))


def _ordered(difference: float) -> float:
    """``difference``, with infinity in the place of NaN, which compares with nothing and would be lost in a maximum."""
    return math.inf if math.isnan(difference) else difference


def compare_pieces(
    reports: Iterable[Sequence[tuple[str, list[int], torch.Tensor]]], whole: dict[str, torch.Tensor], wrong: list[str]
) -> tuple[float, str]:
    """(largest difference, name of the tensor) between pieces and wholes, relative to the whole's largest element.

    A tensor that is almost zero consists of rounding errors; its difference is relative to a millionth of the largest
    element of all tensors instead.
    """
    floor = 1e-6 * max(float(tensor.abs().max()) for tensor in whole.values())
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in whole.items()}
    worst, where = 0.0, ""
    for pieces in reports:
        for name, offsets, held in pieces:
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, held.shape, strict=True))
            expected = whole[name][place]
            seen[name][place] = True
            if not held.numel():
                continue
            # All gradients may be 0, where all ratios are clipped.
            scale = max(float(whole[name].abs().max()), floor) or 1.0
            difference = _ordered(float((held - expected).abs().max()) / scale)
            if difference > worst:
                worst, where = difference, name
    wrong += [f"no rank holds all of {name}" for name, mask in seen.items() if not bool(mask.all())]
    return worst, where


def compare(reports: Sequence[Report], reference: Trajectory) -> Differences:
    """Compare every rank's figures and pieces with the reference."""
    wrong: list[str] = []
    largest = dict.fromkeys(reference.figures[0], 0.0)
    for report in reports:
        for got, expected in zip(report.figures, reference.figures, strict=True):
            for key in largest:
                largest[key] = max(largest[key], _relative(got[key], expected[key]))
        if report.counts != reference.counts:
            wrong.append("expert counts or dropped choices differ")
        for name, bias in report.biases.items():
            if not torch.equal(bias, reference.biases[name]):
                wrong.append(f"{name} differs")
    worst = {}
    gradients = 0.0
    metrics = largest.keys() - {"loss", "balance loss", "z-loss", "gradient norm"}
    for step, whole in enumerate(reference.gradients):
        difference, name = compare_pieces([report.gradients[step] for report in reports], whole, wrong)
        if difference > gradients:
            gradients, worst["gradients"] = difference, f"{name} (step {step})"
    parameters, name = compare_pieces([report.parameters for report in reports], reference.parameters, wrong)
    worst["parameters"] = name
    return Differences(
        loss=max([largest["loss"], *(largest[name] for name in metrics)]),
        auxiliary=max(largest["balance loss"], largest["z-loss"]),
        gradients=gradients,
        grad_norm=largest["gradient norm"],
        parameters=parameters,
        evaluated=max(_relative(report.evaluated, reference.evaluated) for report in reports),
        worst=worst,
        wrong=sorted(set(wrong)),
    )


def sensitivity(reference: Trajectory, nudged: Trajectory) -> float:
    """The largest relative difference between two runs in one process whose first weights differ in their last digit. A
    layout, which sums in another order, cannot be expected to be closer than that."""
    found = 0.0
    for one, other in zip(
        [*reference.gradients, reference.parameters], [*nudged.gradients, nudged.parameters], strict=True
    ):
        pieces = [(name, [0] * tensor.dim(), tensor) for name, tensor in other.items()]
        found = max(found, compare_pieces([pieces], one, [])[0])
    return found
