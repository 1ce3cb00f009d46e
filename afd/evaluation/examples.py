"""Which adversarial images a report shows."""

from __future__ import annotations

from afd.evaluation.epsilon import Epsilon
from afd.evaluation.plots import NORM_SIGNS, Example
from afd.evaluation.protocol import Stage
from afd.evaluation.runner import Runner
from afd.evaluation.state import Unit

SHOWN = 8
Ranked = tuple[tuple[bool, bool, bool, float], int, int, Stage, Epsilon, Unit]


def examples(runner: Runner) -> tuple[str, list[Example]]:
    """A title and up to eight adversarial images of this process, from the first attack that has any.

    Scoring attacks in the protocol's norm come first, and of their radii the largest that does not exceed the
    reference; images at larger radii follow only where there are no others.
    """
    protocol = runner.protocol
    ranked: list[Ranked] = []
    for number, stage, positions, unit in runner.saved():
        if not len(unit.rows) or stage.role != "score":
            continue
        eps = stage.epsilons[positions[-1]]
        beyond = eps > protocol.reference and not stage.minimal
        place = (stage.norm != protocol.norm, beyond, stage.minimal, -float(eps) if not beyond else float(eps))
        ranked.append((place, number, len(ranked), stage, eps, unit))
    if not ranked:
        return runner.protocol.name, []
    _, number, _, stage, eps, unit = min(ranked, key=lambda entry: entry[:3])
    rows, shown = unit.rows[:SHOWN], unit.images[:SHOWN].to(runner.images.device)
    index = rows + number * runner.batch_size
    clean, labels = runner.images.images(index), runner.images.labels[index.to(runner.images.device)]
    said = runner.predict(shown).classes
    radius = "nearest" if stage.minimal else f"ε = {eps}"
    found = [
        Example(clean[i], shown[i], int(labels[i]), int(said[i]), float(unit.lengths[i])) for i in range(len(rows))
    ]
    return f"{stage.name}, {NORM_SIGNS[stage.norm]}, {radius}: true class → what the model says", found
