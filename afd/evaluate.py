"""``afd evaluate``: measures how robust a checkpoint, or any classifier a function returns, really is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from afd import data
from afd.config import PRESETS
from afd.data import Images
from afd.errors import InputError
from afd.evaluation import results as files
from afd.evaluation.epsilon import Epsilon, ascending
from afd.evaluation.evaluate import check_numbers, evaluate, prepare, tables_of
from afd.evaluation.html import comparison
from afd.evaluation.place import Place, placed
from afd.evaluation.plots import plot_sweeps
from afd.evaluation.presentation import present, present_table
from afd.evaluation.protocols import named
from afd.evaluation.subject import Subject, SubjectError, from_factory
from afd.evaluation.tables import table_1, table_2
from afd.evaluation.target import check_radius
from afd.extras import needed_by
from afd.files import write_whole
from afd.nn import ProjectionDiscriminator, build_model
from afd.training import load_checkpoint

with needed_by("afd evaluate"):
    from rich.console import Console
    from tyro.conf import Positional

QUICK_IMAGES = 1000


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation: which model, on which images, attacked how, and where the report goes."""

    model: Positional[str] = ""
    """A checkpoint, or package.module:function, a function that returns a classifier."""
    protocol: Literal["quick", "autoattack", "paper"] = "quick"
    """quick: PGD-20 and APGD-CE; autoattack: the standard version; paper: eight attacks over their sweeps of eps."""
    data: Literal["digits", "mnist", "cifar10", "cifar100"] | None = None
    """Data set, whose test images are attacked. Default: what the checkpoint was trained on."""
    data_root: Path | None = None
    """Folder of the data files; by default a cache folder, filled from the network."""
    images: int | None = None
    """Attack the first so many test images. Default: 1000 for quick, else all."""
    norm: Literal["Linf", "L2", "L1"] = "Linf"
    """Norm of quick and autoattack."""
    eps: tuple[str, ...] = ()
    """Radii of quick and autoattack, ascending, such as 0.3 or 8/255. Default, in Linf: what it was trained at."""
    reference: bool = False
    """autoattack: run pyautoattack whole, instead of our engine and its FAB-T and Square."""
    transfer_from: str = ""
    """paper: a second checkpoint or function, on which transfer (black-box) attacks are made."""
    compare: tuple[Path, ...] = ()
    """Folders of finished evaluations to put side by side, beside the published figures; no model then."""
    batch_size: int = 250
    """Images that are attacked together."""
    seed: int = 0
    """Of all attacks."""
    device: str = "auto"
    """torch device; auto takes CUDA where there is one. Under torchrun, processes share the batches."""
    out: Path = Path("runs/evaluation")
    """Folder of the report. An evaluation that was stopped goes on when it is run again."""
    overwrite: bool = False
    """Discard a report or an unfinished evaluation in that folder."""
    keep_images: bool = False
    """Leave every adversarial image in the folder's state."""


def run(config: EvaluateConfig, console: Console | None = None) -> None:
    """Does what `afd evaluate` was asked for.

    Raises:
        AfdError: an option, model, data set or folder that cannot be used; the message says why.
    """
    console = console or Console()
    if config.compare:
        compare(config, console)
        return
    if not config.model:
        raise InputError("model is missing; name a checkpoint or package.module:function, or folders with --compare")
    radii = ascending(config.eps) if config.eps else None
    check_numbers(config.seed, config.batch_size)
    if radii and config.norm == "Linf":
        check_radius(radii[-1], "Linf", values=1)
    with placed(config.device) as place:
        subject = load(config.model, place.device)
        surrogate = load(config.transfer_from, place.device) if config.transfer_from else None
        images = test_images(config, subject, place)
        protocol = named(
            config.protocol, data=images.name, norm=config.norm, epsilons=radii,
            trained_at=trained_at(subject, images.name), reference=config.reference, transfer=surrogate is not None,
        )  # fmt: skip
        results = evaluate(
            subject, images, protocol, config.out, surrogate=surrogate, seed=config.seed, batch_size=config.batch_size,
            place=place, overwrite=config.overwrite, keep_images=config.keep_images, console=console,
        )  # fmt: skip
    if results is not None:
        present(results, console)
        for table in tables_of(results):
            present_table(table, console)
        console.print(f"{config.out / 'report.html'} written", soft_wrap=True, markup=False, highlight=False)


def compare(config: EvaluateConfig, console: Console) -> None:
    """Puts finished evaluations side by side: tables 1 and 2, curves, and a report in `config.out`."""
    if config.model:
        raise InputError(f"model is {config.model!r}, but compare takes folders of finished evaluations only")
    found = [files.read(path) for path in config.compare]
    names = {one["data"]["name"] for one in found}
    if len(names) > 1:
        raise InputError(f"compare names evaluations of {', '.join(sorted(names))}; all must be of one data set")
    prepare(config.out, overwrite=config.overwrite)
    tables = [table_1(found), table_2(found)]
    plot_sweeps(config.out / "curves.png", found)
    write_whole(config.out / "report.html", comparison(found, config.out, tables))
    text = "\n".join(f"{table.title}\n\n{table.markdown()}\n" for table in tables)
    write_whole(config.out / "tables.md", text)
    for table in tables:
        present_table(table, console)
    console.print(f"{config.out / 'report.html'} written", soft_wrap=True, markup=False, highlight=False)


def load(spec: str, device: torch.device) -> Subject:
    """A model from a checkpoint file or from ``package.module:function``.

    Raises:
        SubjectError, CheckpointError: it is neither, or cannot be loaded.
    """
    if not Path(spec).exists() and ":" in spec:
        return from_factory(spec, device)
    return from_checkpoint(Path(spec), device)


def from_checkpoint(path: Path, device: torch.device) -> Subject:
    """The model of a checkpoint of ours, with its discriminator if it has one. All that knows the format is here.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        SubjectError: its weights do not fit the network that it names, or it names none.
    """
    state, metadata = load_checkpoint(path, device)
    config: Any = metadata.get("config")
    try:
        shape, classes = SHAPES[config["data"]["name"]]
        network, width, normalize = (config["model"][key] for key in ("name", "width", "normalize"))
        method, loss = config["method"]["name"], config["method"]["loss"]
    except (KeyError, TypeError) as error:
        raise SubjectError(
            f"checkpoint {path} does not say which network it holds, for `afd train` did not write it; name "
            "package.module:function, a function that builds the network and loads the weights that "
            "afd.training.load_checkpoint(path) returns"
        ) from error
    model = build_model(network, shape, classes, width)
    model.normalize = normalize
    average = state.get("average")
    discriminator = None
    try:
        model.load_state_dict(average["weights"] if average else state["model"])
        if "discriminator" in state.get("players", {}):
            discriminator = ProjectionDiscriminator(model.num_features, classes)
            discriminator.load_state_dict(state["players"]["discriminator"])
            discriminator.to(device).eval()
    except RuntimeError as error:
        network = f"{network} of width {width} for {config['data']['name']}"
        reason = " ".join(str(error).split())[:300]
        raise SubjectError(f"checkpoint {path} does not hold the weights of a {network}: {reason}") from error
    name = "natural" if method == "natural" else f"AFD-{loss.upper()}"
    return Subject(name, str(path), model.to(device).eval(), discriminator, metadata)


SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}


def test_images(config: EvaluateConfig, subject: Subject, place: Place) -> Images:
    """The first test images of the data set that was named, or that the subject was trained on."""
    trained_on: dict[str, Any] = subject.config.get("data", {})
    name = config.data or trained_on.get("name")
    if name is None:
        raise InputError(f"data is missing; {subject.source} does not say what it classifies, so name it with --data")
    root = config.data_root or trained_on.get("root")
    test = data.load(name, root, download=place.leads).test
    count = config.images
    if count is None:
        count = min(QUICK_IMAGES, len(test)) if config.protocol == "quick" else len(test)
    if not 1 <= count <= len(test):
        raise InputError(f"images is {count}; the test set of {name} has images 1 ... {len(test)}")
    return test.take(torch.arange(count, device="cpu"))


def trained_at(subject: Subject, data_name: str) -> Epsilon:
    """The radius that a checkpoint was trained at, or its data set's usual one."""
    eps = subject.config.get("attack", {}).get("eps")
    return exactly(PRESETS[data_name].eps if eps is None else eps)


def exactly(eps: float) -> Epsilon:
    """The fraction that a checkpoint's float stands for: so many 255ths if it is one of those, else its decimal."""
    levels = round(eps * 255)
    return Epsilon.of(f"{levels}/255") if levels and levels / 255 == eps else Epsilon.of(eps)
