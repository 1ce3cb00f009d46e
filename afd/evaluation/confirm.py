"""What float32 makes of attacks that ran in bfloat16 (precision "auto"), so that no figure rests on bfloat16's word.

A success counts once the float32 model, no layer of it joined, confirms it: the runner judges every image so, also the
best point that an attack returns for an image it could not break. Of the images that withstand all, 100 drawn at random
meet the whole protocol once more, in float32 and with the draws that they met; one that falls then says that the figure
may be too high.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from afd.evaluation.outcome import BROKEN_IN_FP32, LEFT_IN_BF16, Outcome
from afd.evaluation.runner import Runner

DRAWN = 100  # robust images


@dataclass(frozen=True)
class Confirmation:
    """What float32 says.

    Attributes:
        points: best points of images that the model withstood in bfloat16, over all attacks; float32 looked at each.
        broke: of these, how many fool the model in float32; they count as adversarial.
        robust: images that withstand all that counts.
        drawn: how many of them were attacked again, in float32.
        fell: of the drawn, how many did not withstand it.
    """

    points: int
    broke: int
    robust: int
    drawn: int
    fell: int

    def as_json(self) -> dict[str, int]:
        """Plain types."""
        return asdict(self)


class Silent:
    """Hears of progress, and tells nobody; see `afd.evaluation.runner.Meter`."""

    def start(self, work: float) -> None:
        """All the work there is."""

    def moved(self, work: float, text: str) -> None:
        """Some of it is done."""


def confirm(runner: Runner, outcome: Outcome) -> Confirmation | None:
    """Looks at what attacks left that ran in bfloat16; None where they ran in float32. All processes must ask.

    Args:
        runner: of these attacks; its store keeps what is found here, too.
        outcome: what they found, gathered.
    """
    if not runner.low_precision:
        return None
    counts = outcome.counts.values()
    points, broke = (sum(count[name] for count in counts) for name in (LEFT_IN_BF16, BROKEN_IN_FP32))
    robust = outcome.robust_to_all().nonzero().squeeze(1)
    generator = torch.Generator("cpu").manual_seed(runner.seed)
    chosen = torch.randperm(len(robust), generator=generator, device="cpu")[:DRAWN].sort().values
    drawn = robust[chosen]
    if not len(drawn):
        return Confirmation(points, broke, 0, 0, 0)
    protocol = runner.protocol
    stages = [
        replace(stage, name=f"float32-{stage.name}", epsilons=(protocol.reference_in(stage.norm),))
        for stage in protocol.stages
        if stage.role != "probe" and stage.norm in protocol.balls
    ]
    again = replace(
        runner, images=runner.images.take(drawn), protocol=replace(protocol, stages=tuple(stages)), precision="fp32",
        count=None, places=drawn if runner.places is None else runner.places[drawn],
    ).run()  # fmt: skip
    return Confirmation(points, broke, len(robust), len(drawn), int((~again.robust_to_all()).sum()))


def confirmed_in_words(results: Mapping[str, Any]) -> list[str]:
    """What is printed beside the figures of results.json: nothing of attacks that ran in float32."""
    found = (results.get("precision") or {}).get("confirmed")
    if found is None:
        return []
    return [
        f"attacked in bfloat16; in float32, {found['fell']} of {found['drawn']} robust images fell that were drawn at "
        f"random, and {found['broke']} of {found['points']} best points that bfloat16 left fool the model, which "
        "counts as broken"
    ]
