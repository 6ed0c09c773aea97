"""The calibration picture of a reward model: how often it is right, by how sure it is, for each criterion."""

from pathlib import Path

from launchers.counted import counted
from launchers.folder.atomic import replaced
from qwen_moe.scoring.summary import Agreement


def draw(found: dict[str, Agreement], path: Path) -> None:
    """A model on the diagonal is as sure as it should be; below it, it is too sure. Larger points have more pairs."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.4, 5.0), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1, linestyle="--", label="calibrated")
    for name, one in found.items():
        of_bins = one.calibration
        there = of_bins.judgments > 0
        sure, right = of_bins.confidence[there].tolist(), of_bins.accuracy[there].tolist()
        shares = (of_bins.judgments[there] / of_bins.judgments.sum()).tolist()
        (line,) = axes.plot(sure, right, linewidth=1)
        label = f"{name}: {one.accuracy:.0%} right, error {of_bins.error:.1%} ({counted(one.judged, 'pair')})"
        axes.scatter(sure, right, s=[15 + 250 * share for share in shares], color=line.get_color(), label=label)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("how sure the model is of its order")
    axes.set_ylabel("share of pairs in the right order")
    axes.legend(fontsize=8, loc="lower right", markerscale=0.6)
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
