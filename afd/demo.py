"""``make demo`` or ``python -m afd.demo``: what a natural and an AFD network are worth under attack, on real digits."""

from __future__ import annotations

if __name__ == "__main__":  # takes Ctrl-C first, then imports what it needs
    from afd import process

    def _asked() -> process.Work:
        from afd.demo import asked

        return asked()

    process.run(_asked, "afd.demo")

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from afd import data
from afd.attacks import Attack
from afd.config import DataConfig, TrainConfig
from afd.data import Batches
from afd.evaluation import accuracy_curve
from afd.evaluation.plots import plot_curves
from afd.experiments.assembly import test_attack
from afd.experiments.train import TEST_STEPS, train
from afd.files import check_writable
from afd.installation import needed_by, require
from afd.methods import AFD, Natural
from afd.presets import method_for
from afd.training import StoppedError

with needed_by("the demo"):
    from rich.console import Console
    from rich.table import Table

DESCRIPTION = "Trains a natural and an AFD network on real digits and shows what each is worth under attack."
EPSILONS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
RUNS = {
    "natural": TrainConfig(method=Natural(), data=DataConfig(batch_size=32), epochs=30),
    "AFD-WGAN": TrainConfig(method=method_for("digits", "afd"), data=DataConfig(batch_size=32), epochs=60),
}


def run(out: Path, console: Console, runs: dict[str, TrainConfig] = RUNS) -> dict[str, list[float]]:
    """Trains `runs` on digits, prints accuracy against ε and writes ``out/curves.png``.

    Returns:
        Test accuracies in [0, 1] under PGD-40 at `EPSILONS`, by name of the run.
    """
    started = time.perf_counter()
    splits = data.load("digits")
    test = Batches(splits.test, len(splits.test))
    curves: dict[str, list[float]] = {}
    for name, config in runs.items():
        try:
            result = train(dataclasses.replace(config, out=out / name.lower(), overwrite=True), console, splits)
        except StoppedError as stopped:
            raise stopped.advised("the demo begins anew when it is run again") from None
        curves[name] = accuracy_curve(result.model, test, EPSILONS, partial(_attack, result.config, model=result.model))
    settled = {name: config.settled() for name, config in runs.items()}
    for name, config in settled.items():
        console.print(f"{name}: {_settings(config)}", soft_wrap=True, markup=False, highlight=False)
    table = Table(title=f"Accuracy on {len(splits.test)} test digits under PGD-{TEST_STEPS}", title_justify="left")
    table.add_column("eps")
    for name in curves:
        table.add_column(name, justify="right")
    for i, eps in enumerate(EPSILONS):
        table.add_row(f"{eps:g}", *(f"{curve[i]:.1%}" for curve in curves.values()))
    console.print(table)
    picture = out / "curves.png"
    trained_at = max(config.test.eps or 0.0 for config in settled.values())
    plot_curves(picture, EPSILONS, curves, title=f"digits, L∞ PGD-{TEST_STEPS}, seed 0", trained_at=trained_at)
    seconds = time.perf_counter() - started
    console.print(f"{picture} written; {seconds:.0f} s in all", soft_wrap=True, markup=False, highlight=False)
    return curves


def asked() -> Callable[[], object]:
    """What the command line of the demo asks for."""
    parser = argparse.ArgumentParser(prog="afd.demo", usage=argparse.SUPPRESS, description=DESCRIPTION)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for checkpoints, logs and curves.png")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the epochs: to see that it runs")
    words = parser.parse_args()
    out: Path = words.out
    require("tensorboard", "the demo")
    require("sklearn", "the demo")
    check_writable(out)
    torch.set_num_threads(1)  # operations are tiny: a second thread hardly helps, and stalls them on a busy machine
    shorter = {name: dataclasses.replace(config, epochs=(config.epochs or 0) // 20) for name, config in RUNS.items()}
    return partial(run, out, Console(), shorter if words.quick else RUNS)


def _attack(config: TrainConfig, eps: float, model: nn.Module) -> Attack:
    """The test attack at another radius."""
    return dataclasses.replace(test_attack(config, TEST_STEPS), eps=eps).build(model)


def _settings(config: TrainConfig) -> str:
    method = config.method
    assert isinstance(method, Natural | AFD)
    common = f"seed {config.seed}, {config.epochs} epochs, batch {config.data.batch_size}, SGD lr {method.lr:g}"
    if isinstance(method, Natural):
        return common
    attack = method.attack
    return (
        f"{common}, discriminator {method.lr_discriminator:g}, features {method.lr_features:g}, {method.loss},"
        f" {method.schedule}, {type(attack).__name__.removesuffix('Settings')}-{attack['steps']} at eps {attack.eps:g}"
    )
