"""Pictures of accuracies and of adversarial images. Matplotlib draws without a screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from afd.attacks.ball import NORMS
from afd.evaluation.attacks import WorkItem
from afd.evaluation.outcome import ItemResult
from afd.evaluation.runner import Runner
from afd.installation import needed_by, save_picture

with needed_by("the pictures of an evaluation"):
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
    save_picture(figure, path)


def plot_sweeps(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG of accuracy against ε: one panel for each scoring attack, one line a model.

    Args:
        path: file to write.
        results: of finished evaluations, in the form of results.json.
    """
    attacks: dict[str, dict[str, Any]] = {}
    for one in results:
        for attack in one["attacks"]:
            if attack["role"] == "score":
                attacks.setdefault(attack["name"], attack)
    unions = [one for one in results if one.get("union")]
    count = len(attacks) + bool(unions)
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(5.0, 3.2 * columns), 2.8 * rows + 0.7), dpi=130, layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for name, attack in attacks.items():
        axes = next(panels)
        for number, one in enumerate(results):
            _line(axes, one, name, f"C{number}")
        chance = 100 / results[0]["data"]["classes"]
        axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        axes.set_title(f"{name} ({NORMS[attack['norm']].sign})", fontsize=10)
        axes.set(xlabel="ε", ylim=(-2, 102), xlim=(0, None))
        axes.grid(alpha=0.3)
    if unions:
        _bars(next(panels), unions, results)
    for axes in panels:
        axes.set_axis_off()
    for row in range(rows):
        figure.axes[row * columns].set_ylabel("accuracy (%)")
    drawn: list[Any] = [line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]]
    lines = {(line.get_label(), line.get_color()): line for line in drawn}  # of all panels: one may lack a model
    names = [name for name, _ in lines]
    figure.legend(
        [*lines.values()], names, loc="outside lower center", ncols=min(4, len(names)), fontsize=9, frameon=False
    )
    images = {f", {one['data']['images']} {one['data']['split']} images" for one in results}
    told = images.pop() if len(images) == 1 else ""
    figure.suptitle(f"{results[0]['data']['name']}{told}; dotted: chance", fontsize=10)
    save_picture(figure, path)


def _line(axes: Any, results: dict[str, Any], name: str, colour: str) -> None:
    """One model's line in one panel; a model without that attack has none."""
    for attack in results["attacks"]:
        if attack["name"] == name:
            radii = [0.0, *(point["float"] for point in attack["accuracies"])]
            accuracies = [results["clean"], *(point["accuracy"] for point in attack["accuracies"])]
            axes.plot(
                radii, [100 * value for value in accuracies], marker="o", markersize=4, color=colour,
                label=results["subject"]["name"], clip_on=False,
            )  # fmt: skip


def _bars(axes: Any, unions: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> None:
    """Accuracy in each ball of a union, and in all of them: a bar for each model that was evaluated so."""
    places = dict.fromkeys(ball["norm"] for one in unions for ball in one["union"]["balls"])
    names = [*(NORMS[norm].sign for norm in places), "union"]
    for number, one in enumerate(unions):
        found = {NORMS[ball["norm"]].sign: ball["accuracy"] for ball in one["union"]["balls"]}
        found["union"] = one["union"]["accuracy"]
        width = 0.8 / len(unions)
        left = [names.index(name) - 0.4 + (number + 0.5) * width for name in found]
        axes.bar(left, [100 * value for value in found.values()], width, color=f"C{results.index(one)}")
    axes.set_title("each ball, and their union", fontsize=10)
    axes.set_xticks(range(len(names)), names)
    axes.grid(alpha=0.3, axis="y")


def plot_divergence(path: Path, results: dict[str, Any]) -> None:
    """Writes a PNG of HΔH distance against error gap, a point for each attack and radius.

    Args:
        path: file to write.
        results: of a finished evaluation, in the form of results.json.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(dict.fromkeys(one["attack"] for one in results["divergence"])):
        points = [one for one in results["divergence"] if one["attack"] == name]
        gaps, distances = [one["gap"] for one in points], [one["distance"] for one in points]
        axes.plot(gaps, distances, "osD^vPX*"[number % 8], alpha=0.8, label=name)
    axes.set(
        xlabel="error gap (attacked - natural)", ylabel="estimated HΔH distance", xlim=(-0.02, 1.02), ylim=(-0.04, 2.04)
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    save_picture(figure, path)


@dataclass(frozen=True)
class Example:
    """An adversarial image to show.

    Attributes:
        clean: the image it was made of, [C, H, W] in [0, 1].
        attacked: the adversarial image, like it.
        label: the true class.
        said: what the model says of the adversarial image; -1 if its logits hold NaN.
        length: its distance from the clean one.
    """

    clean: Tensor
    attacked: Tensor
    label: int
    said: int
    length: float


def plot_examples(path: Path, examples: Sequence[Example], *, title: str) -> None:
    """Writes a PNG with three rows: clean images, attacked ones, and their amplified differences.

    Args:
        path: file to write.
        examples: what to show; with none, the picture says so.
        title: says which attack made them.
    """
    if not examples:
        figure = Figure(figsize=(6, 1.2), dpi=110)
        figure.text(0.5, 0.5, f"{title}: no adversarial image was found", ha="center", va="center", fontsize=10)
        save_picture(figure, path)
        return
    columns = len(examples)
    figure = Figure(figsize=(max(1.35 * columns + 1.1, 5.6), 4.9), dpi=130, layout="constrained")
    panels = figure.subplots(3, columns, squeeze=False)
    largest = max(float((one.attacked - one.clean).abs().max()) for one in examples)
    gain = 0.5 / max(largest, 1e-12)
    for column, one in enumerate(examples):
        pictures = (one.clean, one.attacked, 0.5 + gain * (one.attacked - one.clean))
        words = (f"{one.label}", f"{one.label} → {'NaN' if one.said < 0 else one.said}", f"distance {one.length:.3g}")
        for row, (picture, text) in enumerate(zip(pictures, words, strict=True)):
            axes = panels[row][column]
            _show(axes, picture)
            axes.set_title(text, fontsize=9)
    for row, text in enumerate(("clean", "attacked", f"difference × {gain:.3g}\n(grey: none)")):
        panels[row][0].set_ylabel(text, fontsize=10)
    figure.suptitle(title, fontsize=10)
    save_picture(figure, path)


def _show(axes: Any, image: Tensor) -> None:
    """Draws an image [C, H, W]; grey if it has one channel."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).cpu().numpy()
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    axes.imshow(pixels[..., :3], interpolation="nearest")
    axes.set(xticks=[], yticks=[])


SHOWN = 8
Ranked = tuple[tuple[bool, bool, bool, float], int, int, WorkItem, ItemResult]


def examples(runner: Runner) -> tuple[str, list[Example]]:
    """A title and up to eight adversarial images of this process, from the first attack that has any.

    Scoring attacks in the protocol's norm come first, and of their radii the largest that does not exceed the
    reference; images at larger radii follow only where there are no others.
    """
    protocol = runner.protocol
    ranked: list[Ranked] = []
    for number, item, result in runner.saved():
        stage, eps = item.stage, item.largest
        if not len(result.rows) or stage.role != "score":
            continue
        beyond = eps > protocol.reference_in(stage.norm) and not stage.minimal
        place = (stage.norm != protocol.norm, beyond, stage.minimal, -float(eps) if not beyond else float(eps))
        ranked.append((place, number, len(ranked), item, result))
    if not ranked:
        return runner.protocol.name, []
    _, number, _, item, result = min(ranked, key=lambda entry: entry[:3])
    rows, shown = result.rows[:SHOWN], result.images[:SHOWN].to(runner.images.device)
    index = rows + number * runner.batch_size
    clean, labels = runner.images.images(index), runner.images.labels[index.to(runner.images.device)]
    said = runner.predict(shown).classes
    radius = "nearest" if item.stage.minimal else f"ε = {item.largest}"
    found = [
        Example(clean[i], shown[i], int(labels[i]), int(said[i]), float(result.lengths[i])) for i in range(len(rows))
    ]
    sign = NORMS[item.stage.norm].sign
    return f"{item.stage.name}, {sign}, {radius}: true class → what the model says", found
