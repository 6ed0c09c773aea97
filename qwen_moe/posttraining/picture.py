"""The picture of a walk: the held-out score after each step, and the reward of GRPO's samples at each of its steps."""

from collections.abc import Sequence
from pathlib import Path

from launchers.folder.atomic import replaced

_BLUE, _GRAY = "#2a6f97", "#9aa5b1"
_SMOOTH = 10  # steps


def draw(
    scores: Sequence[tuple[str, float, float]], rewards: tuple[Sequence[int], Sequence[float]], path: Path
) -> None:
    """``scores``: title, score and standard error of each model. ``rewards``: steps of GRPO and their mean rewards; the
    right half is left out without them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps, values = rewards
    both = len(steps) > 1
    figure, axes = plt.subplots(1, 1 + both, figsize=(5.5 + 5.5 * both, 3.8), layout="constrained", squeeze=False)
    left = axes[0][0]
    heights = [score for _, score, _ in scores]
    left.bar(
        range(len(scores)),
        heights,
        yerr=[error for *_, error in scores],
        width=0.6,
        color=_BLUE,
        ecolor="black",
        capsize=4,
    )
    top = max([*(score + error for _, score, error in scores), 0.0]) or 1.0
    bottom = min([*(score - error for _, score, error in scores), 0.0])
    left.set_ylim(bottom * 1.1, top + 0.12 * (top - bottom))
    for place, (_, score, error) in enumerate(scores):
        left.annotate(
            f"{score:.3f}", (place, max(score + error, 0.0)), xytext=(0, 3), textcoords="offset points", ha="center"
        )
    left.set_xticks(range(len(scores)), [title for title, *_ in scores])
    left.set_ylabel("mean reward")
    left.set_title("held-out queries, greedy answers", fontsize=10)
    if both:
        right = axes[0][1]
        right.plot(steps, values, color=_GRAY, linewidth=1, label="each step")
        smooth = [
            sum(part) / len(part) for n in range(len(values)) if (part := values[max(0, n + 1 - _SMOOTH) : n + 1])
        ]
        if len(values) > _SMOOTH:
            right.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"mean of {_SMOOTH} steps")
            right.legend(fontsize=8, loc="lower right")
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_xlabel("step of GRPO")
        right.set_ylabel("mean reward of sampled answers")
        right.set_title("GRPO's own samples", fontsize=10)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
    with replaced(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
