"""Searches: ``python -m search STUDY TRIALS [CHANGES]`` in benchmarks, STUDY at, trades or game; it wants optuna 5.

Each trial trains a small network on MNIST for as many passes, and is judged by what APGD-CE, targeted APGD and Square,
each on what the others leave, leave of 1,000 validation images; test images are never looked at. CHANGES is a list of
dicts in Python: trials that differ by so much from `BASES`, before optuna's sampler chooses. All trials of all studies
are written to benchmarks/results/search-mnist-*.json.
"""

from __future__ import annotations

import ast
import json
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn

from afd import data
from afd.attacks import APGD, PGDSettings, Square
from afd.data import Batches, MixedBatches
from afd.machine import device_name
from afd.methods import AT, TRADES, Execution
from afd.nn import build_model
from afd.passes import counted
from afd.training import EpochReport, Trainer
from afd.training.schedules import SCHEDULES
from search.game import Game, GameAWP

RESULTS = Path(__file__).parents[1] / "results"
PASSES = 1.86e6  # of a trial: forwards, backwards to the input and to the weights of an image
EPS, WIDTH, EPOCHS, IMAGES = 0.3, 8, 4, 1000
HOPELESS = 0.5  # robust accuracy below which a trial ends after its third epoch
GAMMA = 0.003  # of AWP

BASE = {
    "eps_warmup": 0.3, "batch_size": 64, "normalize": True, "attack_steps": 5, "lr": 3e-3,
    "weight_decay": 1e-7,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "at": {**BASE, "label_smoothing": 0.0},
    "trades": {**BASE, "attack_loss": "ce", "beta": 2.0},
    "game": {
        **BASE, "optimizer": "adam", "loss": "dcgan", "game_weight": 0.2, "lr_discriminator": 3e-3,
        "adversarial_weight": 0.0, "beta": 1.0, "conditional": True, "hidden": 128, "depth": 3, "penalty": 0.0,
        "attack_on": "ce", "power_iterations": 1, "awp": False,
    },
}  # fmt: skip


def shared(trial: optuna.Trial) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every study tries: settings of the method, and of the run."""
    number, one_of = trial.suggest_float, trial.suggest_categorical
    run = {
        "eps_warmup": number("eps_warmup", 0.0, 0.6), "batch": one_of("batch_size", [64, 128]),
        "normalize": one_of("normalize", [True, False]),
    }  # fmt: skip
    attack = PGDSettings(eps=EPS, steps=one_of("attack_steps", [3, 5, 7, 10]))
    rates = {"lr": number("lr", 5e-4, 1e-2, log=True), "weight_decay": number("weight_decay", 1e-7, 1e-3, log=True)}
    return {"optimizer": "adam", "attack": attack, **rates}, run


def at(trial: optuna.Trial) -> tuple[Any, dict[str, Any]]:
    """A trial of adversarial training: the method, and settings of `trained`."""
    method, run = shared(trial)
    return AT(**method, label_smoothing=trial.suggest_categorical("label_smoothing", [0.0, 0.1])), run


def trades(trial: optuna.Trial) -> tuple[Any, dict[str, Any]]:
    """A trial of TRADES, likewise."""
    method, run = shared(trial)
    method["attack"] = replace(method["attack"], loss=trial.suggest_categorical("attack_loss", ["kl", "ce"]))
    return TRADES(**method, beta=trial.suggest_float("beta", 0.5, 8, log=True)), run


def game(trial: optuna.Trial) -> tuple[Any, dict[str, Any]]:
    """A trial of the game, likewise."""
    method, run = shared(trial)
    number, one_of = trial.suggest_float, trial.suggest_categorical
    if one_of("optimizer", ["adam", "sgd"]) == "sgd":
        method |= {"optimizer": "sgd", "lr": number("lr_sgd", 0.02, 0.3, log=True)}
        rate = number("lr_discriminator_sgd", 0.01, 0.3, log=True)
    else:
        rate = number("lr_discriminator", 1e-4, 1e-2, log=True)
    found: Any = Game(
        **method, lr_discriminator=rate, loss=one_of("loss", ["wgan", "dcgan", "hinge"]),
        game_weight=number("game_weight", 0.001, 10, log=True),
        adversarial_weight=one_of("adversarial_weight", [0.0, 0.5, 1.0, 2.0]), beta=one_of("beta", [0.0, 1.0, 3.0]),
        conditional=one_of("conditional", [True, False]), hidden=one_of("hidden", [64, 128, 256]),
        depth=one_of("depth", [2, 3]), penalty=one_of("penalty", [0.0, 1.0]),
        attack_on=one_of("attack_on", ["ce", "mixed"]), power_iterations=one_of("power_iterations", [1, 3]),
    )  # fmt: skip
    return (GameAWP(found, gamma=GAMMA) if one_of("awp", [False, True]) else found), run


STUDIES = {"at": at, "trades": trades, "game": game}


def passes_of(method: Any) -> float:
    """Passes that each image takes in a step, counted."""
    model, x = build_model("convnet", (1, 28, 28), 10, WIDTH), torch.rand(8, 1, 28, 28)
    step, y = method.build(model), torch.arange(8)
    return counted(lambda: step(x, y), model, x).cost


def trained(
    splits: data.Splits, method: Any, each: Any, *, batch: int, eps_warmup: float, normalize: bool
) -> nn.Module:
    """A network that was trained for `PASSES`; `each` is told of every epoch."""
    torch.manual_seed(0)
    model = build_model("convnet", (1, 28, 28), 10, WIDTH)
    model.normalize = normalize
    images = int(PASSES / passes_of(method)) // EPOCHS
    batches = MixedBatches(splits.train, batch, epoch_images=images, seed=0, channels_last=True)
    held = Batches(splits.validation.take(torch.arange(500)), 500)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model, method, epochs=EPOCHS, schedule=SCHEDULES["one-cycle"], eps_warmup=eps_warmup * EPOCHS,
            execution=Execution("auto"), folder=folder, overwrite=True, on_alarm="off",
        )  # fmt: skip
        trainer.callbacks = [lambda report: each(report) if isinstance(report, EpochReport) else None]
        trainer.fit(batches, held)
    return model.eval()


def left(splits: data.Splits, model: nn.Module) -> list[float]:
    """Accuracy on clean validation images, and what each attack leaves of that."""
    rows = torch.arange(IMAGES)
    x, y = splits.validation.images(rows), splits.validation.labels[rows]
    right = seen_right(model, x, y)
    found = [float(right.double().mean())]
    for attack in (
        APGD(model, eps=EPS, steps=30, precision="auto"),
        APGD(model, eps=EPS, steps=20, loss="dlr-targeted", n_target_classes=4, precision="auto"),
        Square(model, eps=EPS, queries=300, precision="auto"),
    ):
        rows = right.nonzero()[:, 0]
        if len(rows):
            right[rows] = seen_right(model, attack(x[rows], y[rows]), y[rows])
        found.append(float(right.double().mean()))
    return found


@torch.no_grad()
def seen_right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Where the model is right, bool [N]."""
    return torch.cat([model(one).argmax(1) == label for one, label in zip(x.split(500), y.split(500), strict=True)])


def main(name: str, trials: int, changes: list[dict[str, Any]]) -> None:
    """So many trials of a study, each written as it ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    splits = data.load("mnist", validation=0.1)

    def objective(trial: optuna.Trial) -> float:
        method, run = STUDIES[name](trial)
        curve: list[float] = []

        def each(report: EpochReport) -> None:
            curve.append(report.robust or 0.0)
            if len(curve) >= 3 and curve[-1] < HOPELESS:
                raise optuna.TrialPruned

        began = time.process_time()
        model = trained(splits, method, each, **run)
        trial.set_user_attr("cpu_seconds", round(time.process_time() - began, 1))
        shares = left(splits, model)
        trial.set_user_attr("left", shares)
        print(name, trial.number, shares, trial.params, flush=True)
        return shares[-1]

    storage = f"sqlite:///{RESULTS / 'search-mnist.db'}"
    sampler = optuna.samplers.TPESampler(n_startup_trials=5, multivariate=True, group=True)
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, direction="maximize", sampler=sampler
    )
    for change in changes:
        study.enqueue_trial(BASES[name] | change)
    study.optimize(objective, n_trials=trials)
    write(storage)


def write(storage: str) -> None:
    """All finished trials of all studies as JSON."""
    studies = {one.study_name: optuna.load_study(study_name=one.study_name, storage=storage)
               for one in optuna.get_all_study_summaries(storage)}  # fmt: skip
    device = device_name(torch.device("cpu"))
    content = {
        "data": "mnist, validation images", "images": IMAGES, "eps": EPS, "width": WIDTH, "passes": PASSES,
        "machine": device, "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "left": ["clean", "APGD-CE", "APGD-T", "Square"],
        "studies": {
            name: [
                {"trial": one.number, "state": one.state.name.lower(), "left": one.user_attrs.get("left"), **one.params}
                for one in study.trials if one.state.is_finished()
            ]
            for name, study in sorted(studies.items())
        },
    }  # fmt: skip
    file = RESULTS / f"search-mnist-{device.lower().replace(' ', '-')}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), ast.literal_eval(sys.argv[3]) if len(sys.argv) > 3 else [])
