"""A training method of your own: TRADES-like training in one class, from Python and from the command line.

    python examples/own_method.py
    afd train own_method:Consistent --beta 3 --attack-steps 5        (in this folder)

`losses` returns the terms whose sum is differentiated. Micro-batches, precision, several processes, clipping, averages
of the weights, CUDA graphs and checkpoints are done once for all methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import Trainer, data, nn
from afd.attacks import PGDSettings
from afd.data import Batches
from afd.methods import Batch, Supervised, TrainedModel


@dataclass(frozen=True, kw_only=True)
class Consistent(Supervised):
    """Cross-entropy on clean images, and predictions that attacked images must keep.

    Attributes:
        beta: weight of the second term.
    """

    beta: float = 6.0
    attack: PGDSettings = PGDSettings(loss="kl", init="gaussian", eps=0.1, steps=3)
    validation_attack: str | None = "pgd-20"

    def losses(self, model: TrainedModel, batch: Batch) -> dict[str, Tensor]:
        """Both terms."""
        clean = model(batch.x)
        attacked = model(self.attack(model, batch))
        kept = F.kl_div(attacked.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        return {"task": self.cross_entropy(clean, batch.y), "kept": self.beta * kept}


def main(epochs: int = 5) -> float:
    """Trains on digits; returns the accuracy under PGD-20 on validation images at the end."""
    torch.manual_seed(0)
    splits = data.load("digits")
    model = nn.build_model("convnet", (1, 8, 8), splits.train.num_classes, 8)
    trainer = Trainer(model, Consistent(lr=0.1, beta=3), epochs=epochs)
    history = trainer.fit(Batches(splits.train, 64, shuffle=True), Batches(splits.validation, 500))
    for report in history:
        print(f"epoch {report.epoch}: {report.natural:.1%} clean, {report.robust:.1%} under attack")
    assert history[-1].robust is not None
    return history[-1].robust


if __name__ == "__main__":
    main()
