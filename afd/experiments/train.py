"""What `afd train` does: from a config to a checkpointed and measured model, in a folder of its own."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from afd.attacks import Attack
from afd.attacks.union import told
from afd.checkpoint import load_checkpoint
from afd.config import TrainConfig
from afd.data import Batches, Splits
from afd.data.datasets import short
from afd.errors import AfdError, InputError, ModelError, in_a_line
from afd.experiments.assembly import (
    check_resolutions,
    damaged_in,
    damaged_lines,
    facts_of,
    model_for,
    plain,
    splits_for,
    test_attack,
    train_batches,
    trainer_for,
)
from afd.experiments.display import Terminal, plot_curves
from afd.experiments.folder import check_files, discard_records, run_folder
from afd.experiments.spent import cost_as_json, cost_lines, plan_of
from afd.files import write_whole
from afd.installation import needed_by
from afd.methods.registry import spelled
from afd.nn import FeatureClassifier, FeatureSplit
from afd.nn.classifier import unwrapped
from afd.runtime import Group, commit, device_named, join
from afd.training.alarms import Alarm, alarm_lines
from afd.training.callbacks import Callback, Report, TrainingError, json_lines, tensorboard
from afd.training.rebuilt import weights_in
from afd.training.signals import StoppedError
from afd.training.trainer import Trainer
from afd.training.validation import shared_accuracy
from afd.training.weights import save_weights

with needed_by("afd.experiments.train"):
    from rich.console import Console
    from rich.table import Table

TEST_STEPS = 40
SMALLER_RATES = "smaller learning rates may help (--lr, --lr-discriminator, --lr-features)"


@dataclass(frozen=True)
class Measured:
    """What weights of a run reach on the test images.

    Attributes:
        epoch: after which they stood so.
        natural: clean accuracy, in [0, 1].
        robust: accuracy under PGD-40 in the ball (or the union of balls) of the run's test, in [0, 1].
    """

    epoch: int
    natural: float
    robust: float


@dataclass(frozen=True)
class Result:
    """Where a run's best checkpoint lies and what test accuracies (in [0, 1]) the model reaches.

    `measured` has those of "best", "last" and, where an average of the weights was kept, "EMA"; `alarms` what went off;
    `damaged` names files that held no whole image and were left out; `cost` says hours, images seen, device, peak
    memory, and how far a plan was off (`afd.experiments.spent`).
    """

    config: TrainConfig
    model: FeatureClassifier | FeatureSplit
    checkpoint: Path
    epoch: int
    natural: float
    robust: float
    measured: dict[str, Measured] = field(default_factory=dict)
    alarms: tuple[Alarm, ...] = ()
    damaged: tuple[str, ...] = ()
    cost: dict[str, Any] = field(default_factory=dict)


def train(
    config: TrainConfig,
    console: Console | None = None,
    splits: Splits[Any] | None = None,
    *,
    advised: Path | None = None,
) -> Result:
    """Trains as `config` says, prints as it goes, and measures its checkpoints on the test images.

    The best epoch is the one with the highest robust (for natural training: clean) accuracy on the validation images.
    Its weights are also written as a plain state_dict, ``model.pt``, the learning curves as ``curves.png``, and the
    run itself as ``run.toml``, which ``afd train --config`` repeats. Under torchrun, every process calls this.

    Measured are, clean and under PGD-40, "best" (the average of the weights after that epoch, where one is kept),
    "last" (the weights after the last epoch) and "EMA" (their average then): a best epoch alone hides how far a run has
    overfitted since. They stand in ``result.json``.

    Args:
        config: the run; its unset fields are settled by its data set.
        console: where to print; by default the terminal.
        splits: the data, where the caller has it already.
        advised: the folder to be named to go on with, where that is not the run's own.

    Returns:
        The best model with its test accuracies, robust meaning under PGD-40 at the config's eps.

    Raises:
        InputError: a setting out of its range.
        DataError: data files missing or damaged.
        FolderError: the folder is used by another run, or holds one that is neither gone on with nor to be discarded.
        CheckpointError: a checkpoint cannot be written, read or gone on from.
        TrainingError: a loss stopped being finite.
        StoppedError: SIGTERM or SIGINT came; a checkpoint was saved.
        AlarmError: an alarm has stopped it, once what it came to is measured and written.
    """
    config = config.settled()
    device = device_named(config.device)
    if config.sync_batchnorm and device.type != "cuda":
        raise InputError(f"sync_batchnorm is True, but the device is {device}; torch offers it on CUDA only")
    check_files(config)
    group = join(device)
    console = (console or Console(emoji=False)) if group.leads else Console(quiet=True)
    with run_folder(config.out, config.resume, group, overwrite=config.overwrite) as folder:
        splits = splits_for(config) if splits is None else splits.limited(config.data.limit)
        config = dataclasses.replace(config, out=folder)
        return _train_in(folder, config, console, splits, group, device, advised or folder)


def _train_in(
    folder: Path, config: TrainConfig, console: Console, splits: Splits[Any], group: Group, device: torch.device,
    advised: Path,
) -> Result:  # fmt: skip
    """`train` in a folder that is its own."""
    torch.manual_seed(config.seed)
    model = model_for(config, splits.train)
    trainer = trainer_for(config, model.to(device), facts_of(splits))
    if group.size > 1:  # the weights are drawn; from here on, processes draw apart
        torch.manual_seed(config.seed * group.size + group.rank)
    name, batches = _name(config), train_batches(config, splits.train, device, group)
    validation, test = plain(splits.validation, device), plain(splits.test, device)
    plan_of(config)  # which is refused now rather than at the end
    assert config.epochs is not None
    best = folder / "best.pt"
    with Terminal(console, config.epochs, name) as terminal, saying_how_to_go_on(trainer, advised):
        discard = [at_first(lambda: discard_records(folder))] if config.overwrite else []
        first = [*discard, at_first(lambda: write_whole(folder / "run.toml", config.as_toml()))]
        trainer.callbacks = [*first, terminal, tensorboard(folder), json_lines(folder / "log.jsonl")]
        trainer.progress = terminal
        check_resolutions(model, batches)
        trainer.fit(batches, validation)
        group.wait()  # for the files
        measured = _measured(folder, config, model, test, group, terminal)
        if group.leads:
            save_weights(folder / "model.pt", model)
        alarms, cost = tuple(trainer.alarms), cost_as_json(trainer.spent, device, config)
        found, damaged = vars(measured["best"]), damaged_in(splits, group, batches, validation, test)
        result = Result(config, model, best, **found, measured=measured, alarms=alarms, damaged=damaged, cost=cost)
        if group.leads:
            write_whole(folder / "result.json", _as_json(result, len(splits.test), trainer.rollbacks))
    console.print(_summary(result, len(splits.test)))
    console.print(f"checkpoint: {best}", soft_wrap=True, markup=False, highlight=False)
    for line in (*cost_lines(cost), *damaged_lines(damaged), *alarm_lines(alarms, trainer.rollbacks)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if group.leads:
        draw(folder / "curves.png", name)
    group.wait()  # where one process ends with an error, the others are ended
    if trainer.stopped_by is not None:
        raise AlarmError(f"stopped by an alarm, {trainer.stopped_by}", measured)
    return result


class AlarmError(AfdError):
    """An alarm has stopped training; what it came to until then is kept and `measured`."""

    status = 3

    def __init__(self, message: str, measured: Mapping[str, Measured] | None = None) -> None:
        super().__init__(message)
        self.measured = {**(measured or {})}


def _measured(
    folder: Path, config: TrainConfig, model: FeatureClassifier | FeatureSplit, test: Batches, group: Group,
    terminal: Terminal,
) -> dict[str, Measured]:  # fmt: skip
    """What a finished run's checkpoints reach; the model, which has the best weights, has them again afterwards."""
    best, last = folder / "best.pt", folder / "last.pt"
    (best_state, best_of), (last_state, last_of) = map(load_checkpoint, (best, last))
    epoch, end = best_of["report"]["epoch"], last_of["report"]["epoch"]
    weights = {"best": (weights_in(best, best_state), epoch), "last": (last_state["model"], end)}
    if last_state["average"] is not None:
        weights["EMA"] = weights_in(last, last_state), end

    def measure(work: str, attack: Attack | None) -> float:
        terminal.began(work, None, 0, len(test))
        return shared_accuracy(model, test, attack, group, each=terminal.moved)

    def both(name: str) -> Measured:
        state, after = weights[name]
        unwrapped(model).load_state_dict(state)
        attack = test_attack(config, TEST_STEPS).build(model)
        return Measured(after, measure(f"test, {name}", None), measure(f"test under PGD-{TEST_STEPS}, {name}", attack))

    found = {"best": both("best")}
    same = ("EMA" if "EMA" in weights else "last") if epoch == end else ""  # the best epoch's weights again
    found |= {name: found["best"] if name == same else both(name) for name in weights if name != "best"}
    unwrapped(model).load_state_dict(weights["best"][0])
    return found


def _as_json(result: Result, images: int, rollbacks: Sequence[Mapping[str, Any]]) -> str:
    """What ``result.json`` says."""
    config = result.config
    assert config.method is not None
    plain = {
        "data": config.data.name,
        "method": spelled(config.method),
        "seed": config.seed,
        "images": images,
        "attack": f"PGD-{TEST_STEPS}",
        **ball_as_json(config),
        "commit": commit(),
        "measured": {name: dataclasses.asdict(one) for name, one in result.measured.items()},
        "damaged": list(result.damaged),
        "cost": result.cost,
        "alarms": [dataclasses.asdict(alarm) for alarm in result.alarms],
        "rollbacks": [{name: back[name] for name in ("epoch", "remedy", "told")} for back in rollbacks],
    }
    return json.dumps(plain, indent=1) + "\n"


def ball_as_json(config: TrainConfig) -> dict[str, Any]:
    """In what ball, or balls, a settled run is tested."""
    test = config.test
    return {"norm": test.norm, "eps": test.eps} if test.union is None else {"union": test.pgd(1, 0).balls}


def draw(picture: Path, name: str) -> None:
    """Draws the learning curves of the run in a picture's folder; where that fails, the run is no worse for it."""
    try:
        plot_curves(picture, {name: picture.parent})
    except Exception as error:  # whatever a font, a library or a disk has against it
        print(f"afd: warning: {picture} was not drawn: {in_a_line(error)}", file=sys.stderr)


def at_first(act: Callable[[], object]) -> Callback:
    """Acts once training has come to a first report, and not before: a run that never begins leaves no trace."""
    begun = False

    def callback(_report: Report) -> None:
        nonlocal begun
        if not begun:
            act()
        begun = True

    return callback


@contextmanager
def saying_how_to_go_on(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Adds to whatever ends training how to go on with it, if anything was saved."""

    def saved() -> bool:
        ours = trainer.begun or trainer.resume is not None  # else they are another run's, not discarded yet
        return ours and trainer.checkpoints is not None and bool(trainer.checkpoints.present)

    def go_on() -> str:
        if saved():
            return f"go on with the same command and --resume auto --out {shlex.quote(str(folder))}"
        return "no checkpoint was saved, so there is nothing to go on from"

    try:
        yield
    except StoppedError as stopped:
        raise stopped.advised(go_on() if saved() else "the same command begins it again") from None
    except TrainingError as error:
        weights = "that may begin with that checkpoint's weights (--weights)" if saved() else "from the beginning"
        raise TrainingError(f"{error}; {SMALLER_RATES}, in another run {weights}") from error
    except AfdError as error:
        if trainer.begun:
            hint = f"{SMALLER_RATES}; " if isinstance(error, ModelError) else ""
            error.args = (f"{error}; {hint}{go_on()}",)
        raise
    except KeyboardInterrupt as interrupt:  # whose class may know the signal
        interrupt.args = (f"what is not in a checkpoint is lost; {go_on()}",)
        raise


def _name(config: TrainConfig) -> str:
    assert config.method is not None
    return f"{short(config.data.name)} {spelled(config.method)}"


def _summary(result: Result, images: int) -> Table:
    config = result.config
    table = Table(title=f"{_name(config)}: {images} test images", title_justify="left")
    for column in (
        "checkpoint",
        "epoch",
        "natural",
        f"PGD-{TEST_STEPS} at {told(config.test.pgd(1, 0).balls)}",
        "seed",
    ):
        table.add_column(column)
    for name, one in result.measured.items():
        table.add_row(name, str(one.epoch), f"{one.natural:.2%}", f"{one.robust:.2%}", str(config.seed))
    return table
