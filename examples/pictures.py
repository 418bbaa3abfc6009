"""What came of a run, as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def draw_curves(path: Path, losses: list[float], evaluations: list[tuple[int, float]], bigram: float) -> None:
    """Training and validation loss over the steps, and the bigram model as a line to get below."""
    # No pyplot: it would pick a window system.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="#8ecae6", linewidth=1.2, label="training, one batch each")
    axes.plot(*zip(*evaluations, strict=True), color="#d1495b", marker="o", markersize=4, label="validation")
    axes.axhline(bigram, color="#444444", linestyle="--", linewidth=1, label="bigram model, validation")
    step, final = evaluations[-1]
    for height, color in ((final, "#d1495b"), (bigram, "#444444")):
        axes.annotate(
            f"{height:.2f}",
            (step, height),
            xytext=(0, 6 if height == bigram else -14),
            textcoords="offset points",
            color=color,
            ha="right",
        )
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Next-byte loss on Python's standard library")
    axes.set_xlim(0, len(losses) * 1.01)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def draw_progress(
    path: Path,
    losses: list[float],
    points: list[tuple[int, float]],
    *,
    title: str,
    loss: str,
    right: str,
    label: str,
    scale: str = "linear",
) -> None:
    """Training loss over the steps, and beside it how many answers are right.

    Args:
      points: (step, percentage).
      loss, right: what stands at the two axes; `label` is what the points are.
      scale: of the loss.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.add_subplot()
    left.plot(losses, color="#8ecae6", label="training loss")
    left.set(xlabel="step", ylabel=loss, title=title, yscale=scale)
    other = left.twinx()
    other.plot(*zip(*points, strict=True), color="#d1495b", marker="o", markersize=4, label=label)
    other.set(ylabel=right, ylim=(0, 102))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
