"""One evaluation from a model to its report: checks, attacks, second look, files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from afd._version import __version__
from afd.attacks.external import ordinary_modes
from afd.data import Images
from afd.errors import InputError, InputTypeError
from afd.evaluation.checks import NEEDED, finite_check, model_checks, outcome_checks, overall, verification_check
from afd.evaluation.model import DomainCounter, Model, check_fit, check_metadata, feature_summary, has_features
from afd.evaluation.outcome import divergences, read_results, summarize, write_results
from afd.evaluation.plots import examples, plot_divergence, plot_examples, plot_sweeps
from afd.evaluation.protocol import PROBED, Protocol
from afd.evaluation.report import report, tables_of
from afd.evaluation.runner import Runner, other_batch_size, verify
from afd.evaluation.store import REPORT, Output, agreed
from afd.files import FileError, FolderError, write_whole
from afd.installation import needed_by
from afd.nn.modes import local
from afd.runtime import Group

with needed_by("the report of an evaluation"):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

__all__ = ["FolderError", "ProgressBar", "domain_counter", "evaluate", "fingerprint"]


@ordinary_modes()
def evaluate(
    model: Model,
    images: Images,
    protocol: Protocol,
    out: Path | str | Output,
    *,
    surrogate: Model | None = None,
    split: str = "test",
    seed: int = 0,
    batch_size: int = 250,
    group: Group | None = None,
    overwrite: bool = False,
    keep_images: bool = False,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Attacks a model as a protocol says and writes results.json, curves.png, examples.png and report.html.

    What has been computed lies in the folder's ``state`` until the end: an evaluation that was stopped goes on from
    there when it is run again, and comes to the same result. Meanwhile no other process may use the folder.

    Args:
        model: what is evaluated.
        images: what to attack.
        protocol: how.
        out: folder of the report; must be new, or hold an unfinished run of this very evaluation. Or how one is to be
            found.
        surrogate: the model that transfer stages attack.
        split: which part of the data the images are, for the report.
        seed: of all attacks.
        batch_size: images that are attacked together.
        group: device and share of the work; by default alone, on the device of the images.
        overwrite: discard a report, or an unfinished evaluation of another kind, in a folder `out`.
        keep_images: leave every adversarial image in the folder's ``state``.
        console: where to print; by default nowhere.

    Returns:
        The content of results.json, on the leading process; None on the others.

    Raises:
        InputError, InputTypeError: a number out of range, no surrogate for a protocol that transfers, or the model
            itself as one; a radius larger than the images' range; a protocol whose attacks need more classes.
        UnusableModelError: a model does not fit the images.
        ExtraMissingError: an attack comes from a library that is not installed.
        FolderError, StateError: the folder holds something else, or another process uses it.
        FileError: a file cannot be written, as on a full disk; what was computed is kept.
        AttackFailedError: an attack raised; what was computed is kept.
    """
    check_numbers(seed, batch_size)
    if len(images) == 0:
        raise InputError("images is empty; an evaluation needs at least one image")
    if surrogate is None and any(stage.role == "transfer" for stage in protocol.stages):
        raise InputError("surrogate is None; this protocol transfers attacks and needs a second model")
    group = group or Group(device=images.device)
    console = console if console is not None and group.leads else Console(quiet=True)
    images = images.to(group.device)
    _check_stages(protocol)
    protocol.check_extras()
    protocol.check_radii(math.prod(images.shape))
    # alone, in a batch, in the last one, in the second look, among the probed: as the model will be asked later
    sizes = (1, batch_size, len(images) % batch_size or 1, other_batch_size(batch_size), PROBED)
    check_metadata(model)
    classes = check_fit(model, images, sizes)
    protocol = protocol.for_classes(classes)
    for note in protocol.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if surrogate is not None:
        check_metadata(surrogate)
        check_fit(surrogate, images, sizes)
        if surrogate.digest() == model.digest():
            raise InputError(
                f"transfer-from is {surrogate.source}, which holds the model's own weights; name another model"
            )
    output = out if isinstance(out, Output) else Output(Path(out), overwrite)
    settings = {"seed": seed, "batch_size": batch_size}
    wanted = fingerprint(model, surrogate, images, protocol, settings)
    agreed(group, lambda: output.check(wanted))
    probed = torch.arange(min(PROBED, len(images)), device="cpu")
    found = model_checks(model, images.images(probed), images.labels[probed.to(group.device)])
    featured = has_features(model.network, images.images(probed[:2]))
    with _told_to_go_on(), output.held(wanted, group) as store:
        assert output.folder is not None
        if output.written:
            content = read_results(output.folder)
        else:
            with ProgressBar(console) as bar:
                runner = Runner(
                    model=local(model.network), surrogates=[] if surrogate is None else [local(surrogate.network)],
                    images=images, classes=classes, protocol=protocol, store=store, group=group, seed=seed,
                    batch_size=batch_size, meter=bar, count=domain_counter(model, protocol),
                )  # fmt: skip
                outcome = runner.run()
                second_look = verify(runner)
            if group.leads:
                checks = [finite_check(outcome), *found, *outcome_checks(outcome, classes)]
                checks.append(verification_check(second_look))
                content = summarize(
                    outcome, model=model, surrogate=surrogate, images=images, split=split,
                    checks=[check.as_json() for check in checks], verdict=overall(checks),
                    features=feature_summary(model.network, images, batch_size) if featured else None,
                    divergence=divergences(outcome),
                    settings={**settings, "processes": group.size, "kept_images": keep_images},
                )  # fmt: skip
                write_all(output.folder, content, runner)
        group.wait()
        if group.leads:
            output.close(keep_state=keep_images)
    return content if group.leads else None


def write_all(folder: Path, content: dict[str, Any], runner: Runner) -> None:
    """Writes pictures and report, and last of all results.json, which says that they are there."""
    title, shown = examples(runner)
    plot_examples(folder / "examples.png", shown, title=title)
    plot_sweeps(folder / "curves.png", [content])
    if content["divergence"]:
        plot_divergence(folder / "divergence.png", content)
    write_whole(folder / REPORT, report(content, folder, tables_of(content)))
    write_results(folder, content)


@contextmanager
def _told_to_go_on() -> Iterator[None]:
    """Says of a file that cannot be written, as on a full disk, that nothing else is lost."""
    try:
        yield
    except FileError as error:
        raise FileError(
            f"{error}; what was computed before is kept, and the same command goes on from there when that is mended"
        ) from error


def _check_stages(protocol: Protocol) -> None:
    """Raises InputError unless there is a stage to report, and the probes that the checks compare."""
    if not any(stage.role == "score" for stage in protocol.stages):
        raise InputError(f"protocol {protocol.name} has no stage that counts; it needs one with the role 'score'")
    missing = sorted(name for name in NEEDED if protocol.find(name) is None)
    if missing:
        raise InputError(
            f"protocol {protocol.name} lacks the stages {', '.join(missing)}; add those of "
            "afd.evaluation.protocol.probes"
        )


def check_numbers(seed: int, batch_size: int) -> None:
    """Raises InputError, InputTypeError unless an evaluation can use them."""
    _whole("batch-size", batch_size, 1)
    _whole("seed", seed, 0)


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(f"{name} is {value!r}; it must be a whole number")
    if not least <= value < 2**62:
        raise InputError(f"{name} is {value}; it must be in [{least}, 2**62)")


def fingerprint(
    model: Model, surrogate: Model | None, images: Images, protocol: Protocol, settings: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for an unfinished evaluation to go on."""
    pixels = hashlib.sha256(images.pixels.cpu().contiguous().numpy().tobytes())
    pixels.update(images.labels.cpu().numpy().tobytes())
    facts = {
        "weights": model.digest(),
        "network": model.structure(),
        "weights to transfer from": None if surrogate is None else surrogate.digest(),
        "network to transfer from": None if surrogate is None else surrogate.structure(),
        "images": pixels.hexdigest(),
        "protocol": protocol.as_json(),
        "settings": settings,
        "versions": {"afd": __version__, "torch": torch.__version__},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))  # as it is read back
    return plain


def domain_counter(model: Model, protocol: Protocol) -> DomainCounter | None:
    """What counts natural and attacked images: in the paper's protocol, for a model that kept its discriminator."""
    if protocol.name != "paper" or model.discriminator is None:
        return None
    return DomainCounter(model.network, model.discriminator)


class ProgressBar:
    """A progress bar on a terminal; where the output is none, a line for every tenth of the work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.total, self.done, self.told = 0.0, 0.0, 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=3600,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()

    def start(self, work: float) -> None:
        """All the work there is."""
        self.total = work
        self.progress.update(self.task, total=work)

    def moved(self, work: float, text: str) -> None:
        """Some of it is done."""
        self.done += work
        self.progress.update(self.task, completed=self.done, description=text)
        tenth = int(10 * self.done / max(self.total, 1e-12) + 1e-9)
        if tenth > self.told and not self.console.is_terminal:
            self.told = tenth
            left = self.progress.tasks[0].time_remaining
            text = f"{10 * tenth:3d}% ({text})" + ("" if left is None or tenth == 10 else f", about {left:.0f} s left")
            self.console.print(text, highlight=False, soft_wrap=True)
