"""What `afd train` does: from a config to a checkpointed and measured model, in a folder of its own."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from afd import data, methods
from afd.attacks import Attack, PGDSettings
from afd.checkpoint import CheckpointError, CheckpointManager, load_checkpoint
from afd.config import TrainConfig
from afd.data import Batches, Images, Splits
from afd.data.images import CropAndFlip
from afd.errors import AfdError, InputError, ModelError, in_a_line
from afd.experiments.display import Terminal, plot_curves
from afd.extras import needed_by
from afd.files import FolderError, FolderLock, check_source, missing, new_folder, point_to, remove_empty, write_whole
from afd.methods.registry import spelled
from afd.nn import FeatureClassifier, build_model
from afd.runtime import Group, device_named, join
from afd.training.callbacks import Callback, Report, TrainingError, json_lines, tensorboard
from afd.training.data import shared_accuracy
from afd.training.schedules import SCHEDULES, Schedule, step
from afd.training.signals import StoppedError
from afd.training.trainer import Trainer
from afd.training.weights import rebuild, save_weights, weights_in

with needed_by("afd.experiments.train"):
    from rich.console import Console
    from rich.table import Table

ROOT = Path("runs")
LATEST = ROOT / "latest"
RECORDS = ("model.pt", "log.jsonl", "curves.png", "events.out.tfevents.*")  # what is written beside checkpoints
TEST_STEPS = 40
EVAL_BATCH = 500
SMALLER_RATES = "smaller learning rates may help (--lr, --lr-discriminator, --lr-features)"


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
    Its weights are also written as a plain state_dict, ``model.pt``, the learning curves as ``curves.png``, and the
    run itself as ``run.toml``, which ``afd train --config`` repeats. Under torchrun, every process calls this.

    Args:
        config: the run; its unset fields are settled by its data set.
        console: where to print; by default the terminal.
        splits: the data, where the caller has it already.

    Returns:
        The best model with its test accuracies, robust meaning under PGD-40 at the config's eps.

    Raises:
        InputError: a setting out of its range.
        DataError: data files missing or damaged.
        FolderError: the folder is used by another run, or holds one that is neither gone on with nor to be discarded.
        CheckpointError: a checkpoint cannot be written, read or gone on from.
        TrainingError: a loss stopped being finite.
        StoppedError: SIGTERM or SIGINT came; a checkpoint was saved.
    """
    config = config.settled()
    device = device_named(config.device)
    if config.sync_batchnorm and device.type != "cuda":
        raise InputError(f"sync_batchnorm is True, but the device is {device}; torch offers it on CUDA only")
    _check_files(config)
    group = join(device)
    console = (console or Console(emoji=False)) if group.leads else Console(quiet=True)
    with run_folder(config.out, config.resume, group, overwrite=config.overwrite) as folder:
        if splits is None:
            splits = data.load(config.data.name, config.data.root, validation=config.data.validation)
        splits = splits.limited(config.data.limit)
        return _train_in(folder, dataclasses.replace(config, out=folder), console, splits, group, device)


def _train_in(
    folder: Path, config: TrainConfig, console: Console, splits: Splits, group: Group, device: torch.device
) -> Result:
    """`train` in a folder that is its own."""
    torch.manual_seed(config.seed)
    model = model_for(config, splits.train)
    if config.weights is not None:
        begin_with(model, config.weights)
    trainer = trainer_for(config, model.to(device))
    if group.size > 1:  # the weights are drawn; from here on, processes draw apart
        torch.manual_seed(config.seed * group.size + group.rank)
    name = _name(config)
    assert config.epochs is not None
    best = folder / "best.pt"
    with Terminal(console, config.epochs, name) as terminal, saying_how_to_go_on(trainer, folder):
        discard = [at_first(lambda: discard_records(folder))] if config.overwrite else []
        first = [*discard, at_first(lambda: write_whole(folder / "run.toml", config.as_toml()))]
        trainer.callbacks = [*first, terminal, tensorboard(folder), json_lines(folder / "log.jsonl")]
        trainer.progress = terminal
        trainer.fit(train_batches(config, splits.train, device, group), plain(splits.validation, device))
        group.wait()  # for the files
        state, metadata = load_checkpoint(best, device)
        model.load_state_dict(weights_in(best, state))
        if group.leads:
            save_weights(folder / "model.pt", model)
        test = plain(splits.test, device)

        def measure(work: str, attack: Attack | None) -> float:
            terminal.began(work, None, 0, len(test))
            return shared_accuracy(model, test, attack, group, each=terminal.moved)

        result = Result(
            config,
            model,
            checkpoint=best,
            epoch=metadata["report"]["epoch"],
            natural=measure("test", None),
            robust=measure(f"test under PGD-{TEST_STEPS}", test_attack(config, TEST_STEPS).build(model)),
        )
    console.print(_summary(result, len(splits.test)))
    console.print(f"checkpoint: {best}", soft_wrap=True, markup=False, highlight=False)
    if group.leads:
        draw(folder / "curves.png", name)
    return result


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


def _check_files(config: TrainConfig) -> None:
    """Raises CheckpointError or InputError if a file to begin with is not there, or would be discarded."""
    resumed = Path(config.resume) if config.resume and config.resume != "auto" else None
    for argument, file in (("weights", config.weights), ("resume", resumed)):
        if file is None:
            continue
        if not file.exists():
            raise CheckpointError(f"there is no checkpoint {file}")
        check_source(argument, file)
        if file.is_dir():
            raise InputError(f"{argument} is {file}, which is a folder; name a checkpoint in it")
        if config.overwrite and config.out is not None and is_discarded(file, config.out):
            raise InputError(f"{argument} is {file}, which overwrite would discard; name another folder")


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
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what is not in a checkpoint is lost; {go_on()}") from None


def begin_with(model: FeatureClassifier, path: Path) -> None:
    """Loads the weights of a checkpoint (the average, where there is one) or of a file that holds a state_dict.

    Raises:
        CheckpointError: it cannot be read, or does not fit the model.
    """
    normalize = model.normalize
    rebuild(path, model=model)
    model.normalize = normalize


def trainer_for(config: TrainConfig, model: FeatureClassifier) -> Trainer:
    """The trainer that a settled config describes, without callbacks."""
    assert config.method is not None
    assert config.epochs is not None
    return Trainer(
        model,
        config.method,
        epochs=config.epochs,
        schedule=schedule_for(config),
        eps_warmup=config.eps_warmup,
        lr_warmup=config.lr_warmup,
        ema=config.ema,
        ema_warmup=config.ema_warmup,
        ema_buffers=config.ema_buffers,
        execution=methods.Execution(
            config.precision, compile=config.compile, sync_batchnorm=config.sync_batchnorm, graph=config.graph
        ),
        seed=config.seed,
        log_every=config.log_every,
        folder=config.out,
        overwrite=config.overwrite,
        save_every=config.save_every,
        resume=config.resume,
        config=config.as_json(),
    )


def schedule_for(config: TrainConfig) -> Schedule:
    """The schedule of the learning rates."""
    return step(config.milestones) if config.lr_schedule == "step" else SCHEDULES[config.lr_schedule]


def model_for(config: TrainConfig, images: Images) -> FeatureClassifier:
    """A fresh model of the config's kind that fits the images."""
    assert config.model.name is not None
    assert config.model.width is not None
    channels, height, width = images.pixels.shape[1:]
    model = build_model(config.model.name, (channels, height, width), images.num_classes, config.model.width)
    model.normalize = config.model.normalize
    return model


def train_batches(
    config: TrainConfig,
    images: Images,
    device: torch.device,
    group: Group = Group(),
) -> Batches:
    """Shuffled (and augmented) training batches, this process's rows of them."""
    return Batches(
        images,
        config.data.batch_size,
        shuffle=True,
        seed=config.seed,
        augment=CropAndFlip() if config.data.augment else None,
        device=device,
        rank=group.rank,
        world_size=group.size,
        channels_last=True,
    )


def plain(images: Images, device: torch.device) -> Batches:
    """Batches to measure accuracy on."""
    return Batches(images, EVAL_BATCH, device=device)


def test_attack(config: TrainConfig, steps: int) -> PGDSettings:
    """PGD in the ball of a settled config, as used in validation and test: random start, step 2.5 eps / steps."""
    assert config.test.eps is not None
    return PGDSettings(norm=config.test.norm, eps=config.test.eps, steps=steps, seed=config.seed)


def _name(config: TrainConfig) -> str:
    assert config.method is not None
    return f"{config.data.name} {spelled(config.method)}"


def _summary(result: Result, images: int) -> Table:
    config = result.config
    table = Table(title=f"{_name(config)}: {images} test images", title_justify="left")
    ball = f"eps {config.test.eps:g}" + ("" if config.test.norm == "Linf" else f" in {config.test.norm}")
    for column in ("best epoch", "natural", f"PGD-{TEST_STEPS} at {ball}", "seed"):
        table.add_column(column)
    table.add_row(str(result.epoch), f"{result.natural:.2%}", f"{result.robust:.2%}", str(config.seed))
    return table


# --- The folder of a run --------------------------------------------------------------------------------------------


@contextmanager
def run_folder(out: Path | None, resume: str | None, group: Group, *, overwrite: bool) -> Iterator[Path]:
    """A run's folder, this run's alone for as long as the context lasts.

    Where none is named, it is the next numbered one under ``runs``, and ``runs/latest`` leads to it; with
    ``resume="auto"`` it is the one that ``runs/latest`` leads to, if there is one. A new folder in which nothing was
    written is removed at the end.

    Args:
        out: the folder, if one is named.
        resume: what the run goes on from: "auto", a file, or None.
        group: of the processes; the leading one holds the folder, and all raise together.
        overwrite: whether another run's files there may be discarded.

    Raises:
        FolderError: it is used by another process, cannot be written to, or holds a run that is neither gone on with
            nor to be discarded.
    """
    folder = Path()
    with ExitStack() as stack:
        with group.together():
            if group.leads:
                numbered = out is None and not (resume == "auto" and LATEST.exists())
                above = missing(ROOT) if numbered else []
                stack.callback(remove_empty, above)
                folder = new_folder(ROOT) if numbered else out or _latest()
                made = [folder] if numbered else missing(folder)
                if made:
                    stack.callback(_forget_if_empty, made, _led_to())
                stack.enter_context(FolderLock(folder).held())
                if not overwrite:
                    _check_free(folder, resume)
                if numbered:
                    point_to(folder)
        yield group.gather(folder)[0]


def discard_records(folder: Path) -> None:
    """Removes what an earlier run has written beside its checkpoints."""
    for pattern in RECORDS:
        for path in folder.glob(pattern):
            path.unlink()


def is_discarded(file: Path, folder: Path) -> bool:
    """Whether a file goes with the run in a folder, when that is discarded."""
    names = [*RECORDS, *(path.name for path in CheckpointManager(folder, print).present)]
    return file.resolve().parent == folder.resolve() and any(map(file.resolve().match, names))


def _latest() -> Path:
    return ROOT / LATEST.readlink() if LATEST.is_symlink() else LATEST


def _led_to() -> Path | None:
    return _latest() if LATEST.exists() else None


def _check_free(folder: Path, resume: str | None) -> None:
    """Raises FolderError if a run lies there and this one does not go on with it."""
    checkpoints = CheckpointManager(folder, print).present
    if resume == "auto" or (resume and checkpoints and Path(resume).resolve() == checkpoints[0].resolve()):
        return
    found = checkpoints or [path for pattern in RECORDS for path in sorted(folder.glob(pattern))]
    if found:
        raise FolderError(
            f"out is {folder}, which holds a run ({found[0].name}); go on with it by --resume auto, name another "
            "folder, or discard it by --overwrite"
        )


def _forget_if_empty(made: list[Path], before: Path | None) -> None:
    """Takes back a folder, and those above it, that nothing was written to; ``runs/latest`` leads where it led."""
    folder = made[0]
    remove_empty(made)
    if folder.exists():
        return
    if LATEST.is_symlink() and _latest() == folder:
        if before is not None:
            point_to(before)
        else:
            LATEST.unlink()
