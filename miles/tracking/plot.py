"""``reward.png``: reward of training and accuracy of evaluation over a run. ``python -m miles.tracking.plot RUN_DIR``.

A process of its own draws it: matplotlib is large, and the controller is small.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from miles.tracking.metrics_file import FILE_NAME, eval_means, read_metrics

PLOT_NAME = "reward.png"
REWARD = "rollout/raw_reward"


def main(argv: list[str]) -> int:
    """Draw the plot of one run; returns the exit code."""
    run_dir = Path(argv[0])
    draw(read_metrics(run_dir / FILE_NAME), run_dir / PLOT_NAME)
    return 0


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture: one line for the training reward, one for each evaluation set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for label, points, style in curves(rows):
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label, markersize=4)
    axes.set_xlabel("rollouts trained on")
    axes.set_ylabel("mean reward")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(rows: list[dict[str, Any]]) -> list[tuple[str, list[tuple[float, float]], str]]:
    """Label, points and line style of each curve. Training reward at the policy that generated (``rollout_id``),
    evaluations at the number of iterations that the weights had seen."""
    training = [
        (row["rollout_id"], row[REWARD]) for row in rows if row["event"] == "rollout" and row.get(REWARD) is not None
    ]
    found = [("training", training, "-")] if training else []
    for name in dict.fromkeys(name for row in rows if row["event"] == "eval" for name in eval_means(row)):
        points = [(row["rollouts_done"], row[name]) for row in rows if row.get(name) is not None]
        found.append((name, points, "o-"))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
