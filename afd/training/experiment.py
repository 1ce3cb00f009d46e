"""From a config to a trained, checkpointed and measured model: what `afd train` runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from afd import data, methods
from afd.attacks import APGD, PGD, AttackFactory
from afd.config import AttackConfig, MethodConfig, TrainConfig
from afd.data import Batches, Images, Splits
from afd.data.augment import crop_and_flip
from afd.errors import InputError
from afd.evaluation import accuracy
from afd.nn import FeatureClassifier, build_model
from afd.training.checkpoint import load_checkpoint, save_checkpoint
from afd.training.listeners import Keeper, TensorBoard, Terminal
from afd.training.trainer import EpochReport, Trainer

TEST_STEPS = 40
EVAL_BATCH = 500


@dataclass(frozen=True)
class Result:
    """Where a run's best checkpoint lies and what test accuracies (in [0, 1]) the model reaches."""

    config: TrainConfig
    model: FeatureClassifier
    checkpoint: Path
    epoch: int
    natural: float
    robust: float


def train(config: TrainConfig, console: Console | None = None, splits: Splits | None = None) -> Result:
    """Trains as `config` says, prints as it goes, and measures the best checkpoint on the test images.

    The best epoch is the one with the highest robust (for natural training: clean) accuracy on the validation images.

    Args:
        config: the run; its unset fields are settled by its data set.
        console: where to print; by default the terminal.
        splits: the data, where the caller has it already.

    Returns:
        The best model with its test accuracies, robust meaning under PGD-40 at the config's eps.

    Raises:
        InputError: a setting out of its range.
        DataError: data files missing or damaged.
        CheckpointError: a checkpoint cannot be written.
        TrainingError: a loss stopped being finite.
    """
    console = console or Console()
    config = config.settled()
    device = _device(config.device)
    splits = splits or data.load(config.data.name, config.data.root, validation=config.data.validation)
    torch.manual_seed(config.seed)
    model = model_for(config, splits.train).to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster convolutions
    method = build_method(config.method)
    assert config.epochs is not None
    trainer = Trainer(
        model,
        method,
        attack=training_attack(config.attack),
        validation_attack=test_attack(config, config.attack.eval_steps) if method.uses_attack else None,
        epochs=config.epochs,
        milestones=config.milestones,
        seed=config.seed,
    )
    keeper = Keeper(config.out, partial(_save, trainer, config))
    label = f"{config.data.name} {config.method.name}"
    with Terminal(console, config.epochs, label) as terminal:
        trainer.listeners = [terminal, TensorBoard(config.out), keeper]
        trainer.fit(train_batches(config, splits.train, device), _plain_batches(splits.validation, device))
    assert keeper.best is not None  # there was at least one epoch
    best = config.out / "best.pt"
    state, _ = load_checkpoint(best, device)
    model.load_state_dict(state["model"])
    test = _plain_batches(splits.test, device)
    result = Result(
        config,
        model,
        checkpoint=best,
        epoch=keeper.best.epoch,
        natural=accuracy(model, test),
        robust=accuracy(model, test, test_attack(config, TEST_STEPS)(model)),
    )
    console.print(_summary(result, len(splits.test)))
    return result


def build_method(config: MethodConfig) -> methods.Method:
    """The method that a config describes."""
    if config.name == "natural":
        return methods.Natural(config.lr, config.momentum, config.weight_decay)
    settings = dataclasses.asdict(config)
    del settings["name"]
    return methods.AFD(**settings)


def model_for(config: TrainConfig, images: Images) -> FeatureClassifier:
    """A fresh model of the config's kind that fits the images."""
    assert config.model.name is not None
    assert config.model.width is not None
    channels, height, width = images.pixels.shape[1:]
    return build_model(config.model.name, (channels, height, width), images.num_classes, config.model.width)


def train_batches(config: TrainConfig, images: Images, device: torch.device) -> Batches:
    """Shuffled (and augmented) training batches."""
    return Batches(
        images,
        config.data.batch_size,
        shuffle=True,
        seed=config.seed,
        augment=crop_and_flip if config.data.augment else None,
        device=device,
    )


def training_attack(config: AttackConfig) -> AttackFactory:
    """The attack to train against."""
    assert config.eps is not None
    assert config.steps is not None
    if config.name == "apgd":
        return APGD.partial(eps=config.eps, steps=config.steps, precision=config.precision)
    alpha = config.step_size(config.steps)
    return PGD.partial(eps=config.eps, alpha=alpha, steps=config.steps, precision=config.precision)


def test_attack(config: TrainConfig, steps: int) -> AttackFactory:
    """PGD at the config's eps, as used in validation and test: random start, step 2.5 eps / steps."""
    eps = config.attack.eps
    assert eps is not None
    return PGD.partial(eps=eps, alpha=2.5 * eps / max(steps, 1), steps=steps, seed=config.seed)


def _plain_batches(images: Images, device: torch.device) -> Batches:
    return Batches(images, EVAL_BATCH, device=device)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device is {name!r}; allowed are auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is {name!r}, but torch sees no CUDA device; allowed here are auto and cpu")
    return device


def _save(trainer: Trainer, config: TrainConfig, path: Path, report: EpochReport) -> None:
    state = {
        "model": trainer.model.state_dict(),
        "players": {name: player.state_dict() for name, player in trainer.round.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.round.optimizers.items()},
    }
    save_checkpoint(path, state, {"config": config.as_json(), "report": dataclasses.asdict(report)})


def _summary(result: Result, images: int) -> Table:
    config = result.config
    table = Table(title=f"{config.data.name} {config.method.name}: {images} test images", title_justify="left")
    for column in ("best epoch", "natural", f"PGD-{TEST_STEPS} at eps {config.attack.eps:g}", "seed", "checkpoint"):
        table.add_column(column)
    row = (str(result.epoch), f"{result.natural:.2%}", f"{result.robust:.2%}", str(config.seed), str(result.checkpoint))
    table.add_row(*row)
    return table
