"""What the processes of `test_distributed.py` run under torchrun; alone, it is the run that they are compared with."""

import argparse
import os
import signal
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from toy_methods import Bursting, Perturbed, Remembers, Replays

from afd.attacks import PGDSettings, UnionSettings
from afd.data import Batches, Images, MixedBatches
from afd.data.images import CropAndFlip
from afd.methods import AFD, ALP, AT, AWP, FGSMRS, GAT, JARN, LLR, MART, TRADES, Free, Natural, NormPenalty, NuAT
from afd.methods.regularized import nuclear_norm
from afd.nn import FeatureClassifier
from afd.processes import leave
from afd.runtime import join
from afd.training import Mixing, Trainer


class WithoutNorms(JARN):
    """JARN whose discriminator has no BatchNorm, whose statistics hang on how a batch is shared out."""

    def build(self, *args, **settings):
        with mock.patch("afd.methods.jarn.nn.BatchNorm2d", nn.Identity):
            return super().build(*args, **settings)


SMALL = {"lr": 0.05, "eps": 0.1, "discriminator_width": 4, "discriminator_layers": 2}
JUDGE = {"validation_attack": PGDSettings(eps=0.05, alpha=2 / 255, steps=2)}
AGAINST = {"attack": PGDSettings(eps=0.1, alpha=0.05, steps=2), **JUDGE}
GAUSSIAN = {"attack": PGDSettings(eps=0.1, alpha=0.05, steps=2, init="gaussian"), **JUDGE}
KL = {"attack": PGDSettings(eps=0.1, alpha=0.05, steps=2, init="gaussian", loss="kl"), **JUDGE}
BALLS = {"eps": 0.1, "eps_l2": 0.4, "eps_l1": 1.5, "steps": 2}
GAME = {"hidden": 8, **AGAINST}
ONE = {"attack": PGDSettings(eps=0.1, alpha=0.1, steps=1, init="coin-flip", start_scale=0.05), **JUDGE}
REMEMBERS = {"remembers": Remembers(lr=0.05)}  # by the place in each process's batch: not what one process remembers
METHODS = {
    "joint": AFD(**GAME),
    "separate": AFD.adam(loss="dcgan", lr=1e-2, lr_features=1e-2, **GAME),
    "alternating": AFD(schedule="alternating", loss="hinge", **GAME),
    "seldom": AFD(discriminator_steps=3, micro_batches=2, **GAME),
    "natural": Natural(micro_batches=2, **JUDGE),
    "at": AT(lr=0.05, **AGAINST),
    "at in parts": AT(lr=0.05, micro_batches=2, clip=1.0, **AGAINST),
    "trades": TRADES(lr=0.05, **KL),
    "mart": MART(lr=0.05, **GAUSSIAN),
    "alp": ALP(lr=0.05, micro_batches=2, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2, targeted=True), **JUDGE),
    "fgsm-rs": FGSMRS(lr=0.05, attack=PGDSettings(eps=0.1, alpha=0.125, steps=1, batchnorm="train"), **JUDGE),
    "free": Free(lr=0.05, eps=0.1, replays=2, **JUDGE),
    "norm-penalty": NormPenalty(lr=0.05, distance="squared-L2", **AGAINST),
    "llr": LLR(lr=0.02, eps=0.1, search_steps=3, micro_batches=2, **JUDGE),
    "gat": GAT(lr=0.05, growth_epoch=2, micro_batches=2, **ONE),
    "nuat": NuAT(lr=0.05, **ONE),
    "jarn": WithoutNorms(start_step=1, update_interval=2, **SMALL, **JUDGE),
    "jarn in parts": WithoutNorms(update_interval=1, micro_batches=2, clip=1.0, beta=0.5, gamma=0.7, **SMALL, **JUDGE),
    "at+awp": AWP(AT(lr=0.05, **AGAINST)),
    "trades+awp": AWP(TRADES(lr=0.05, micro_batches=2, **KL), gamma=0.05, start_epoch=2),
    "free+awp": AWP(Free(lr=0.05, eps=0.1, replays=2, **JUDGE), weight_decay_at="original"),
    "adversarial": AFD(adversarial_weight=0.5, **GAME),
    "adversarial-separate": AFD.adam(loss="dcgan", lr=1e-2, lr_features=1e-2, adversarial_weight=0.5, **GAME),
    "adversarial-alternating": AFD(schedule="alternating", adversarial_weight=0.5, micro_batches=2, **GAME),
    "divergence": AFD(divergence_weight=1.0, adversarial_weight=0.5, **GAME),
    "divergence-joint": AFD.adam(
        loss="dcgan", schedule="joint", lr=1e-2, lr_features=1e-2, divergence_weight=1.0, **GAME
    ),
    "divergence-separate": AFD.adam(
        loss="dcgan", lr=1e-2, lr_features=1e-2, divergence_weight=1.0, micro_batches=2, **GAME
    ),
    "divergence-alternating": AFD(schedule="alternating", divergence_weight=1.0, **GAME),
    **{
        f"union-{choice}": AT(lr=0.05, attack=UnionSettings(**BALLS, choice=choice), validation_attack="pgd-2")
        for choice in ("worst", "random", "average")
    },
    "union-trades": TRADES(
        lr=0.05, micro_batches=2, attack=UnionSettings(**BALLS, choice="average", loss="kl"), **JUDGE
    ),
    "union-afd": AFD(hidden=8, micro_batches=2, attack=UnionSettings(**BALLS, choice="average"), **JUDGE),
    "replays": Replays(lr=0.05),
    "mixed": AT(lr=0.05, **AGAINST),
    "undone": Bursting(lr=0.05, limit=0.03, at=2, **JUDGE),
    "wrapped": Perturbed(AT(lr=0.05, **AGAINST), gamma=0.05),
    "frozen-joint": AFD(**GAME),
    "frozen-separate": AFD.adam(loss="dcgan", lr=1e-2, **GAME),
    "frozen-alternating": AFD(schedule="alternating", **GAME),
}


class OfHalves(NuAT):
    """What `NuAT` is in two processes, in one: the mean of the nuclear norms of the halves, each over its images."""

    @staticmethod
    def guide(outputs, target):
        halves = zip(outputs.chunk(2), target.chunk(2), strict=True)
        return torch.stack([NuAT.guide(*half) for half in halves]).mean()

    def distance(self, clean, attacked):
        halves = (clean - attacked).chunk(2)
        return torch.stack([nuclear_norm(half) / len(half) for half in halves]).mean()


ALONE = {"nuat": OfHalves(lr=0.05, **ONE)}  # where one process trains as two do by another method


def images(count: int = 58) -> Images:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 1, 6, 6), generator=generator).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 3, scale=255.0, num_classes=3, name="noise")


def model(unused: bool, frozen: bool = False) -> nn.Module:
    """Without BatchNorm, whose statistics hang on how a batch is shared out."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5))
    network = FeatureClassifier(encoder, 5, 3)
    if unused:  # as a pooler of some transformers: has parameters, is never called
        encoder.register_module("pooler", nn.Linear(3, 3))
        encoder.forward = lambda x: encoder[3](encoder[2](encoder[1](encoder[0](x))))
    encoder.requires_grad_(not frozen)
    return network


def run(
    method: str, out: Path, epochs: int, kill_at: int = 0, resume: str | None = None, send: str = "SIGKILL"
) -> Trainer:
    group = join()
    trainer = Trainer(
        model(unused=method == "alternating", frozen=method.startswith("frozen")),
        {**METHODS, **REMEMBERS, **(ALONE if group.size == 1 else {})}[method],
        epochs=epochs,
        log_every=2,
        save_every=3,
        folder=out,
        resume=resume,
        mixing=Mixing(mixup=1.0, cutmix=1.0) if method == "mixed" else Mixing(),
        on_alarm="rollback" if method == "undone" else "warn",
    )
    if kill_at and group.rank == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        update = trainer.step.update

        def dying(batch):
            if trainer.position.global_step == kill_at:
                os.kill(os.getpid(), signal.Signals[send])
            return update(batch)

        trainer.step.update = dying
    validation = Batches(images(), 7)
    place = {"rank": group.rank, "world_size": group.size}
    # in a last, shorter batch the rows of a process are others than in those before, and with them its δ
    train = Batches(images(60 if method.startswith("free") else 58), 20, shuffle=True, **place)
    if method == "mixed":  # by pairs of rows, of which each process has some
        train = MixedBatches(images(), 20, extra=images(), share=0.3, epoch_images=56, augment=CropAndFlip(1), **place)
    trainer.fit(train, validation)
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--resume")
    parser.add_argument("--send", default="SIGKILL")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.methods:
        run(name, options.out / name, options.epochs, options.kill_at, options.resume, options.send)
    leave()
