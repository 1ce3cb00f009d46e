"""Pictures of accuracies. Matplotlib is imported here only, and draws without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def plot_curves(
    path: Path, epsilons: Sequence[float], curves: Mapping[str, Sequence[float]], *, title: str, trained_at: float
) -> None:
    """Writes a PNG of accuracy against ε, one line a model.

    Args:
        path: file to write.
        epsilons: radii in units of the image, ascending.
        curves: accuracies in [0, 1], one for each radius, by the name of the model.
        title: says data, attack and settings.
        trained_at: the radius used in training, marked by a vertical line.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, accuracies in curves.items():
        axes.plot(epsilons, [100 * value for value in accuracies], marker="o", label=name)
    axes.axvline(trained_at, color="grey", linestyle=":", linewidth=1)
    axes.annotate(f" ε in training: {trained_at:g}", (trained_at, 101), fontsize=8, color="grey")
    axes.set(xlabel="ε (L∞ radius, images in [0, 1])", ylabel="accuracy (%)", ylim=(0, 106), title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path)
