"""A training loop of your own: adversarial training of any classifier without afd's Trainer.

    python examples/own_loop.py

A method builds a step for a model; the step attacks, passes, differentiates and updates. Everything else is yours.
"""

from __future__ import annotations

import torch
from torch import nn

from afd import data, evaluation
from afd.attacks import PGD, PGDSettings
from afd.data import Batches
from afd.methods import AT

EPS = 0.2


def main(epochs: int = 8) -> tuple[float, float]:
    """Trains on digits; returns test accuracies, clean and under PGD-20."""
    torch.manual_seed(0)
    splits = data.load("digits")
    train, test = Batches(splits.train, 64, shuffle=True, seed=0), Batches(splits.test, 500)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    method = AT(lr=0.05, attack=PGDSettings(eps=EPS, steps=5))
    step = method.build(model)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizers["task"], T_max=epochs)
    for epoch in range(epochs):
        train.set_epoch(epoch)
        model.train()  # the mode is yours; the attack leaves it as it was
        losses = [step(x, y)["task"] for x, y in train]
        decay.step()
        print(f"epoch {epoch + 1}: loss {torch.stack(losses).mean():.3f}")

    clean = evaluation.accuracy(model, test)
    robust = evaluation.accuracy(model, test, PGD(model, eps=EPS, alpha=EPS / 8, steps=20))
    print(f"test: {clean:.1%} clean, {robust:.1%} under PGD-20 at eps {EPS}")
    return clean, robust


if __name__ == "__main__":
    main()
