"""Pictures of a fit: the surface over learning rate and batch, predicted against measured loss, held-out errors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scaling_laws.atomic import replaced
from scaling_laws.errors import InputError
from scaling_laws.fitting import Fit
from scaling_laws.forms import FORMS, points_of
from scaling_laws.loss_law import compute_optimal
from scaling_laws.surface import STEP_LAW_B, STEP_LAW_LR, WINDOW, group_excess, power_law
from scaling_laws.surface_fit import ASSUMED
from scaling_laws.validation import compute_of, minima

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: "Figure", path: Path) -> Path:
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def _label_decades(axes: Any) -> None:
    """Label 1 and 3 of each decade on both axes, so that labels do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=12))
        scale.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.1e}".replace(".0e", "e").replace("-0", "-").replace("+0", ""))
        )
        scale.set_minor_formatter(NullFormatter())


def _around(values: pd.Series, best: np.ndarray) -> np.ndarray:
    """From below to above ``values``, and the ``best`` one, which may lie beyond them."""
    return np.geomspace(min(values.min(), best[0]) / 1.3, max(values.max(), best[0]) * 1.3, 90)


def draw_surface(fit: Fit, frame: pd.DataFrame, path: Path) -> Path:
    """Draw up to six groups, from the least to the most compute: runs colored by excess loss, the surface's contours and
    optimum, and Step Law's point."""
    assert fit.surface is not None and fit.step_law is not None
    plt = _pyplot()
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
        best_rate, best_batch = fit.surface.optimum(*sizes)
        rate, batch = (
            _around(runs[c], best) for c, best in (("learning_rate", best_rate), ("batch_tokens", best_batch))
        )
        x, y = np.meshgrid(rate, batch)
        n_total, n_active, tokens = (np.full(x.size, size) for size in sizes)
        z = fit.surface.excess(n_total, n_active, tokens, x.ravel(), y.ravel()).reshape(x.shape)
        lines = axes.contour(x, y, z, levels=levels, colors="#555555", linewidths=0.8)
        axes.clabel(lines, fmt=lambda value: f"{value:.2%}".replace(".00%", "%"), fontsize=6)
        axes.contourf(x, y, z, levels=[-1, 0.0025], colors=["#6aa56a"], alpha=0.18)
        shown = 100 * np.clip(runs["excess"], 1e-4, WINDOW)
        points = axes.scatter(
            runs["learning_rate"], runs["batch_tokens"], c=shown, cmap="viridis_r", s=22, vmin=0, vmax=100 * WINDOW
        )
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
        _label_decades(axes)
    for axes in list(grid.flat)[len(chosen) :]:
        axes.axis("off")
    grid.flat[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(
        "Dots: loss over that of the group's best run. Contours: fitted loss over that of the recommended point (green: "
        "within 0.25%)",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0, 0.93, 0.97))
    if points is not None:
        bar = figure.colorbar(points, cax=figure.add_axes((0.945, 0.12, 0.012, 0.75)))
        bar.set_label(f"loss over the group's best run, % ({WINDOW:.0%} and more alike)", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return _save(figure, path)


def draw_loss(fit: Fit, frame: pd.DataFrame, path: Path) -> Path:
    """Draw predicted against measured loss of every group (or run), and the residuals over compute."""
    assert fit.loss_law is not None
    plt = _pyplot()
    points = minima(fit.surface, frame)
    predicted = fit.loss_law.at(points_of(points))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    colour = np.log10(points["n_total"])
    dots = left.scatter(predicted, points["loss"], c=colour, s=18, cmap="plasma")
    ends = [min(predicted.min(), points["loss"].min()), max(predicted.max(), points["loss"].max())]
    left.plot(ends, ends, color="#888888", linewidth=0.8)
    left.set_xlabel("predicted loss, nats per token")
    what = "measured loss" if fit.surface is None else "loss of each group at its optimum"
    left.set_ylabel(f"{what}, nats per token")
    compute = 6 * points["n_active"] * points["tokens"]
    right.scatter(compute, 100 * (points["loss"] / predicted - 1), c=colour, s=18, cmap="plasma")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("compute, 6 N_active D FLOPs")
    right.set_ylabel(f"{what} over predicted, %")
    figure.colorbar(dots, ax=right, label="log10 of N_total")
    figure.suptitle(f"{fit.loss_law.form}: {fit.loss_law.text}  (N in 1e9, D in 1e10)", fontsize=9)
    figure.tight_layout()
    return _save(figure, path)


def draw_validation(fit: Fit, path: Path) -> Path:
    """Draw held-out errors: the excess loss of the recommendation and of Step Law, and the error of the loss law."""
    plt = _pyplot()
    rows = [row for row in fit.validation if "loss_error" in row]
    names = [row["held_out"].replace(" (", "\n(") + f"\n{row['compute_ratio']:.2g}x the compute fitted" for row in rows]
    place = np.arange(len(rows))
    figure, axes = plt.subplots(figsize=(max(6, 2.2 * len(rows)), 3.8))
    bars = [("loss_error", "predicted loss, mean error", "#7f7f7f")]
    if fit.surface is not None:
        bars = [
            ("excess", "excess loss of the run nearest to the recommendation", "#d62728"),
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
    axes.set_title("Errors where the fit was made without these runs", fontsize=11)
    axes.margins(y=0.1)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28))
    figure.tight_layout()
    return _save(figure, path)


def draw_isoflop(fit: Fit, frame: pd.DataFrame, path: Path) -> Path:
    """Draw loss over size at a few budgets, inside and beyond the runs, with each optimum and the groups of about that
    budget."""
    assert fit.loss_law is not None
    plt = _pyplot()
    low, high = fit.ranges["compute"]
    ratio = float((frame["n_active"] / frame["n_total"]).median())
    budgets = [*np.geomspace(max(low, high / 300), high, 4), 10 * high, 100 * high]
    points = minima(fit.surface, frame)
    points = points[np.isclose(points["n_active"] / points["n_total"], ratio, rtol=0.1)]
    compute = compute_of(points)
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(budgets)))
    optima = []
    for budget, colour in zip(budgets, colours, strict=True):
        try:
            best, _, least = compute_optimal(fit.loss_law, budget, ratio, granularity=fit.granularity)
        except InputError:  # by this law, every larger or every smaller model is better
            smallest, largest = fit.ranges["n_total"]
            size, least, told = np.geomspace(smallest, 12 * largest, 200), np.inf, "no best N"
        else:
            size, told = best * np.geomspace(1 / 12, 12, 200), f"N {best:.2g}"
            optima.append((best, least))
        loss = fit.loss_law.predict(size, ratio * size, budget / (6 * ratio * size), granularity=fit.granularity)
        shown = loss < least * 1.12
        style = "-" if budget <= 1.01 * high else "--"
        axes.plot(size[shown], loss[shown], style, color=colour, linewidth=1.3, label=f"{budget:.1e} FLOPs: {told}")
        near = (compute > budget / 1.4) & (compute < budget * 1.4)
        axes.plot(points["n_total"][near], points["loss"][near], "o", color=colour, markersize=4)
    if optima:
        axes.plot(
            *zip(*optima, strict=True), "*-", color="#d62728", markersize=11, linewidth=0.8, label="compute-optimal"
        )
    axes.set_xscale("log")
    axes.set_xlabel("N_total, parameters" + (f" ({ratio:.0%} activated)" if ratio < 1 else ""))
    axes.set_ylabel("loss, nats per token")
    axes.set_title(
        "Loss over size at equal compute (6 N_active D; dashed: more than any run had;\ndots: "
        + ("runs" if fit.surface is None else "groups of runs, at their optimum,")
        + " with that compute within a factor of 1.4)",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    return _save(figure, path)


def draw_extrapolation(fit: Fit, path: Path) -> Path:
    """Draw the errors of held-out groups over how many times more compute they have than the fitted runs."""
    plt = _pyplot()
    from matplotlib.ticker import LogFormatter

    kinds = [("loss_error", "error of the predicted loss", "#7f7f7f")]
    if fit.surface is not None:
        kinds += [
            ("excess", "excess loss of the run nearest to the recommendation", "#d62728"),
            ("excess_step_law", "the same, Step Law fitted", "#1f4e8c"),
        ]
    figure, axes = plt.subplots(figsize=(7.5, 4.4))
    for key, label, colour in kinds:
        found = sorted((row["ratio"], 100 * row[key]) for row in fit.extrapolation if key in row)
        if not found:
            continue
        ratio, error = (np.array(side) for side in zip(*found, strict=True))
        axes.scatter(ratio, error, s=12, color=colour, alpha=0.35, linewidths=0)
        parts = [part for part in np.array_split(np.arange(len(ratio)), min(6, max(1, len(ratio) // 6))) if len(part)]
        axes.plot(
            [np.exp(np.log(ratio[part]).mean()) for part in parts],
            [error[part].mean() for part in parts],
            "o-",
            color=colour,
            label=f"{label} (mean {error.mean():.2f}%)",
        )
    axes.set_xscale("log")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    axes.set_xlabel("compute of the group over the most that was fitted")
    axes.set_ylabel("%")
    axes.set_title("Fitted to the lesser compute, tried on the greater (lines: means of equal parts)", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    return _save(figure, path)


def draw_exponents(fit: Fit, path: Path) -> Path:
    """Draw the exponents of all samples of the fit, the fitted exponents, and Step Law's published ones."""
    plt = _pyplot()
    shown: list[tuple[str, list[float], float, float | None]] = []
    if fit.surface is not None and len(fit.surface_samples) >= 20:
        published = {"learning_rate": STEP_LAW_LR, "batch": STEP_LAW_B}
        for which, told in (("learning_rate", "learning rate"), ("batch", "batch size")):
            for name, place in (("n_total", 1), ("tokens", 2)):
                values = [power_law(sample, which)[name] for sample in fit.surface_samples]
                fitted = power_law(fit.surface, which)[name]
                assumed = " (assumed)" if fit.surface.prior_share[which][place] > ASSUMED else ""
                shown.append((f"{told} ~ {name}^{assumed}", values, fitted, published[which][place]))
    if fit.loss_law is not None and len(fit.loss_samples) >= 20:
        for name in FORMS[fit.loss_law.form].exponents:
            values = [sample.values[name] for sample in fit.loss_samples]
            shown.append((f"loss: {name}", values, fit.loss_law.values[name], None))
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), squeeze=False)
    for axes, (name, values, fitted, known) in zip(grid.flat, shown, strict=False):
        low, high = np.percentile(values, [0.5, 99.5])
        axes.hist(np.clip(values, low, high), bins=30, color="#9ecae1")
        axes.axvline(fitted, color="#d62728", linewidth=1.5, label=f"fitted {fitted:.3f}")
        if known is not None:
            axes.axvline(known, color="#1f4e8c", linestyle="--", linewidth=1.2, label=f"Step Law {known:.3f}")
        axes.set_title(name, fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=6)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    samples = max(len(fit.surface_samples), len(fit.loss_samples))
    figure.suptitle(f"Exponents over {samples} {fit.intervals_of}", fontsize=10)
    figure.tight_layout()
    return _save(figure, path)
