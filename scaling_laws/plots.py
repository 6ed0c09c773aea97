"""Pictures of a fit: the surface over learning rate and batch, predicted against measured loss, held-out errors."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scaling_laws.fitting import Fit
from scaling_laws.surface import WINDOW, group_excess, profiled_minima

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: "Figure", path: Path) -> Path:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120, bbox_inches="tight")
    _pyplot().close(figure)
    os.replace(partial, path)
    return path


def draw_surface(fit: Fit, frame: pd.DataFrame, path: Path) -> Path:
    """Up to six groups, from the least to the most compute: runs coloured by excess loss, the surface's contours, its
    optimum, and the published or fitted Step Law's point."""
    assert fit.surface is not None and fit.step_law is not None
    plt = _pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    finished = frame[~frame["diverged"]].copy()
    finished["excess"] = group_excess(finished)
    order = finished.groupby("group").first().eval("n_active * tokens").sort_values().index
    chosen = [order[i] for i in np.unique(np.linspace(0, len(order) - 1, 6).round().astype(int))]
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns + 0.6, 3.7 * rows), squeeze=False)
    levels = [0.0025, 0.005, 0.01, 0.02, 0.05]
    points = None
    for axes, group in zip(grid.flat, chosen, strict=False):
        runs = finished[finished["group"] == group]
        first = runs.iloc[0]
        sizes = (first["n_total"], first["n_active"], first["tokens"])
        rate = np.geomspace(runs["learning_rate"].min() / 1.3, runs["learning_rate"].max() * 1.3, 90)
        batch = np.geomspace(runs["batch_tokens"].min() / 1.3, runs["batch_tokens"].max() * 1.3, 90)
        x, y = np.meshgrid(rate, batch)
        n_total, n_active, tokens = (np.full(x.size, size) for size in sizes)
        z = fit.surface.excess(n_total, n_active, tokens, x.ravel(), y.ravel()).reshape(x.shape)
        lines = axes.contour(x, y, z, levels=levels, colors="#555555", linewidths=0.8)
        axes.clabel(lines, fmt=lambda value: f"{value:.2%}".replace(".00%", "%"), fontsize=6)
        axes.contourf(x, y, z, levels=[-1, 0.0025], colors=["#6aa56a"], alpha=0.18)
        shown = np.clip(runs["excess"], 1e-4, WINDOW)
        points = axes.scatter(
            runs["learning_rate"], runs["batch_tokens"], c=shown, cmap="viridis_r", s=22, vmin=0, vmax=WINDOW
        )
        best_rate, best_batch = fit.surface.optimum(*sizes)
        axes.plot(best_rate, best_batch, "*", color="#d62728", markersize=13, label="recommended")
        other_rate, other_batch = fit.step_law.optimum(*sizes)
        axes.plot(other_rate, other_batch, "x", color="#1f4e8c", markersize=8, label="Step Law, fitted")
        axes.set_xscale("log")
        axes.set_yscale("log")
        share = "" if sizes[0] == sizes[1] else f", {sizes[1] / sizes[0]:.0%} activated"
        axes.set_title(f"N {sizes[0]:.3g}{share}, D {sizes[2]:.3g} tokens", fontsize=9)
        axes.set_xlabel("learning rate", fontsize=8)
        axes.set_ylabel("batch size, tokens", fontsize=8)
        axes.tick_params(labelsize=7)
        for scale in (axes.xaxis, axes.yaxis):  # a decade on each axis, so that labels do not run into each other
            scale.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
            scale.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:.0e}".replace("-0", "-").replace("+0", ""))
            )
            scale.set_minor_formatter(NullFormatter())
    for axes in list(grid.flat)[len(chosen) :]:
        axes.axis("off")
    grid.flat[0].legend(fontsize=7, loc="lower right")
    figure.suptitle("Excess loss over the group's best (green: within 0.25%)", fontsize=11)
    figure.tight_layout(rect=(0, 0, 0.93, 0.97))
    if points is not None:
        bar = figure.colorbar(points, cax=figure.add_axes((0.945, 0.12, 0.012, 0.75)))
        bar.set_label(f"measured excess (5% and more alike, window {WINDOW:.0%})", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return _save(figure, path)


def draw_loss(fit: Fit, frame: pd.DataFrame, path: Path) -> Path:
    """Predicted against measured loss of every group (or run), and the residuals over compute."""
    assert fit.loss_law is not None
    plt = _pyplot()
    points = profiled_minima(fit.surface, frame) if fit.surface is not None else frame
    predicted = fit.loss_law.predict(points["n_total"], points["n_active"], points["tokens"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    colour = np.log10(points["n_total"])
    dots = left.scatter(predicted, points["loss"], c=colour, s=18, cmap="plasma")
    ends = [min(predicted.min(), points["loss"].min()), max(predicted.max(), points["loss"].max())]
    left.plot(ends, ends, color="#888888", linewidth=0.8)
    left.set_xlabel("predicted loss, nats per token")
    left.set_ylabel("measured loss, nats per token")
    compute = 6 * points["n_active"] * points["tokens"]
    right.scatter(compute, 100 * (points["loss"] / predicted - 1), c=colour, s=18, cmap="plasma")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("compute, 6 N D FLOPs")
    right.set_ylabel("measured over predicted, %")
    figure.colorbar(dots, ax=right, label="log10 of N_total")
    law = fit.loss_law
    figure.suptitle(f"{law.form}: E {law.e:.3f}, exponents N {law.a:.3f}, D {law.b:.3f}", fontsize=11)
    figure.tight_layout()
    return _save(figure, path)


def draw_validation(fit: Fit, path: Path) -> Path:
    """Held-out errors: the recommendation's excess loss against Step Law's, and the loss law's error."""
    plt = _pyplot()
    rows = [row for row in fit.validation if "loss_error" in row]
    names = [f"{row['held_out']}\n({row['compute_ratio']:.1f}x compute)" for row in rows]
    place = np.arange(len(rows))
    figure, axes = plt.subplots(figsize=(max(6, 2.2 * len(rows)), 3.8))
    bars = [("loss_error", "predicted loss, mean error", "#7f7f7f")]
    if fit.surface is not None:
        bars = [
            ("excess", "excess loss of the recommended run", "#d62728"),
            ("excess_step_law", "the same, Step Law fitted", "#1f4e8c"),
            *bars,
        ]
    width = 0.8 / len(bars)
    for turn, (key, label, colour) in enumerate(bars):
        values = [100 * row.get(key, float("nan")) for row in rows]
        drawn = axes.bar(place + (turn - (len(bars) - 1) / 2) * width, values, width, label=label, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(place, names, fontsize=8)
    axes.set_ylabel("%")
    axes.set_title("Fitted without, tried on", fontsize=11)
    axes.legend(fontsize=8)
    figure.tight_layout()
    return _save(figure, path)
