"""The same step inside of Lightning and of Accelerate, whose loops call it.

    pip install lightning accelerate
    python examples/other_loops.py

The step does its own backward passes and updates, so Lightning's optimisation is manual, and Accelerate prepares the
loader and wraps what is trained. Several processes: Accelerate, by ``wrap=`` (Lightning wraps the whole module, which
sees no backward of the step's; give Trainer one device).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from afd import data
from afd.attacks import PGDSettings
from afd.methods import AT, Method

METHOD = AT(lr=0.05, attack=PGDSettings(eps=0.2, steps=3))


def parts() -> tuple[nn.Module, DataLoader[Any]]:
    """A network, and digits as any loader has them."""
    torch.manual_seed(0)
    train = data.load("digits").train
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, DataLoader(TensorDataset(train.images(), train.labels), 64, shuffle=True)


def with_lightning(epochs: int = 1) -> nn.Module:
    """Trains by lightning.Trainer."""
    import lightning

    class Adversarial(lightning.LightningModule):
        def __init__(self, model: nn.Module, method: Method) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model, self.method = model, method

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            self.adversarial_step = self.method.build(self.model)  # the model is on its device by now
            return list(self.adversarial_step.optimizers.values())

        def training_step(self, batch: tuple[Tensor, Tensor], _number: int) -> None:
            self.log_dict(self.adversarial_step(*batch), prog_bar=True)

    model, loader = parts()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(Adversarial(model, METHOD), loader)
    return model


def with_accelerate(epochs: int = 1) -> nn.Module:
    """Trains in a loop that Accelerate has prepared, in one process or several."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, loader = parts()
    loader = accelerator.prepare(loader)
    step = METHOD.build(model.to(accelerator.device), wrap=accelerator.prepare_model)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            step(x, y, first_sample=accelerator.process_index * len(x))
    return model


def main() -> None:
    """Trains by both, and says how well."""
    test = data.load("digits").test
    for name, train in (("Lightning", with_lightning), ("Accelerate", with_accelerate)):
        model = train(epochs=4).eval()
        right = (model(test.images()).argmax(1) == test.labels).float().mean()
        print(f"{name}: {right:.1%} of the test images")


if __name__ == "__main__":
    main()
