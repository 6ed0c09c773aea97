"""Writes the report of a fit: what was fitted, how well, how far to trust it, with pictures."""

from pathlib import Path

import numpy as np

from scaling_laws.atomic import write_text
from scaling_laws.counted import counted
from scaling_laws.fitting import Fit
from scaling_laws.forms import FORMS
from scaling_laws.laboratories import NAMES
from scaling_laws.prior_text import assumed_spread, prior_of
from scaling_laws.recommend import LEAST_GROUPS
from scaling_laws.surface import power_law
from scaling_laws.surface_fit import ASSUMED

CONVENTIONS = {
    "non_vocabulary": "parameters without embedding and head",
    "with_vocabulary": "parameters with embedding and head",
}
PAGE = "report.md"


def _law(fit: Fit, which: str) -> str:
    assert fit.surface is not None
    law = power_law(fit.surface, which)
    found = [power_law(sample, which) for sample in fit.surface_samples]

    share = dict(zip(NAMES, fit.surface.prior_share[which], strict=True))

    def spread(key: str) -> str:
        if share[key] > ASSUMED:
            return f" (assumed, +- {assumed_spread(fit, which, key):.2f} between laboratories)"
        if len(found) < 20 or fit.groups < LEAST_GROUPS:
            return ""
        low, high = np.percentile([sample[key] for sample in found], [2.5, 97.5])
        return f" [{low:.2f}, {high:.2f}]"

    terms = f"N_total^{law['n_total']:.3f}{spread('n_total')} · D^{law['tokens']:.3f}{spread('tokens')}"
    if share["sparsity"] <= ASSUMED:
        terms += f" · (N_active/N_total)^{law['sparsity']:.3f}{spread('sparsity')}"
    return f"{law['scale']:.4g} · {terms}"


def report_text(fit: Fit, pictures: list[str]) -> str:
    """The report as Markdown."""
    least, most = fit.ranges["compute"]
    lines = [
        "# Scaling fit",
        "",
        f"{counted(fit.runs, 'run')} in {counted(fit.groups, 'group')} of equal size and duration; "
        f"{counted(fit.sizes, 'size')}, {least:.2g} to {most:.2g} "
        f"FLOPs (6 N_active D); N counts {CONVENTIONS[fit.convention]}.",
        "",
    ]
    if fit.surface is not None:
        lines += [
            "## Learning rate and batch size",
            "",
            f"* learning rate = {_law(fit, 'learning_rate')}",
            f"* batch size in tokens = {_law(fit, 'batch')}",
            f"* intervals: 95% of {len(fit.surface_samples)} {fit.intervals_of}"
            if fit.groups >= LEAST_GROUPS
            else f"* no intervals: {counted(fit.groups, 'group is', 'groups are')} too few to resample",
            *(f"* {line}" for line in prior_of(fit)["text"]),
            "",
        ]
    if fit.loss_law is not None:
        law = fit.loss_law
        exponents = ""
        if len(fit.loss_samples) >= 20 and fit.groups >= LEAST_GROUPS:
            told = []
            for name in FORMS[law.form].exponents:
                low, high = np.percentile([sample.values[name] for sample in fit.loss_samples], [2.5, 97.5])
                told.append(f"{name} [{low:.3f}, {high:.3f}]")
            exponents = f"95%: {', '.join(told)}. "
        lines += [
            "## Loss",
            "",
            f"{law.form}: {law.text} (N in 1e9, D in 1e10 tokens). {exponents}"
            f"Huber objective {law.objective:.6f}; spread of exponents over starts {law.spread:.1g}; "
            f"condition {law.condition:.3g}.",
            "",
        ]
    if fit.validation:
        lines += [
            "## Held out",
            "",
            "| fitted without | groups | compute ratio | excess loss of the nearest run | Step Law's | loss error |",
            "|---|---|---|---|---|---|",
        ]
        for row in fit.validation:
            if "not_possible" in row:
                lines.append(f"| {row['held_out']} | {row['groups']} | not possible: {row['not_possible']} | | | |")
                continue
            excess = "".join(f" {row[key]:.3%} |" if key in row else " |" for key in ("excess", "excess_step_law"))
            excess += f" {row['loss_error']:.3%} |" if "loss_error" in row else f" {row['no_loss_error']} |"
            lines.append(f"| {row['held_out']} | {row['groups']} | {row['compute_ratio']:.1f} |{excess}")
        lines.append("")
    if fit.warnings:
        lines += ["## Notes", "", *(f"* {note}" for note in fit.warnings), ""]
    lines += [f"![{name}]({name})" for name in pictures]
    return "\n".join(lines) + "\n"


def write_report(fit: Fit, folder: Path, pictures: list[str]) -> Path:
    """Write report.md beside the fit."""
    path = folder / PAGE
    write_text(path, report_text(fit, pictures))
    return path
