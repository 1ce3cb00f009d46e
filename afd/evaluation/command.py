"""The command ``afd evaluate``: measures how robust a checkpoint, or any classifier a function returns, really is."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn

from afd import data
from afd.attacks import Norm
from afd.attacks.union import RADIUS_IN, balls_in
from afd.data import Images
from afd.data.datasets import resolved
from afd.data.files import FileSettings, load_test_files
from afd.data.sources import named as few
from afd.data.stored import StoredImages
from afd.errors import AfdError, InputError, look_up
from afd.evaluation.attacks import Epsilon, ascending, check_radius
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.measure import check_numbers
from afd.evaluation.model import Model, evaluated, from_factory
from afd.evaluation.protocol import named
from afd.evaluation.report import (
    tables_of,
)
from afd.evaluation.store import REPORT, Output, check_folder
from afd.evaluation.terminal import present, present_table
from afd.files import check_path, check_source
from afd.installation import needed_by
from afd.nn import MODELS, build_named
from afd.nn.classifier import unwrapped
from afd.nn.normalized import stats_in
from afd.nn.sources import from_function, source_of
from afd.presets import PRESETS, kind_of, width_for
from afd.runtime import Group, joined
from afd.training.rebuilt import Rebuilt, rebuild
from afd.training.signals import StoppedError, on_signals

with needed_by("afd evaluate"):
    from rich.console import Console
    from tyro.conf import Positional

QUICK_IMAGES = 1000


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation: which model, on which images, attacked how, and where the report goes."""

    checkpoint: Positional[str] = ""
    """A checkpoint, a run's folder (its best.pt), a file of weights, or package.module:function, a function that
    returns a classifier."""
    model: str = ""
    """The network that the checkpoint's weights are loaded into: package.module:function, which builds it, or a name as
    of afd train --model. For checkpoints that do not name their network, one of your own, and for files of weights."""
    input_stats: str = ""
    """Mean and deviation that images are normalised by before --model sees them, as of afd train --input-stats."""
    protocol: Literal["quick", "autoattack", "paper"] = "quick"
    """quick: PGD-20 and APGD-CE; autoattack: the standard version; paper: eight attacks over their sweeps of eps."""
    data: str | None = None
    """Data set, whose test images are attacked: digits, mnist, cifar10, cifar100, folder:PATH or shards:PATTERN.
    Default: what the checkpoint was trained on."""
    data_root: Path | None = None
    """Folder of the data files; by default a cache folder, filled from the network."""
    image_size: int | None = None
    """Side of the square that the network sees of a file's image. Default: as in training."""
    resize: int | None = None
    """Shorter side that a file's image is brought to before. Default: as in training."""
    bad_images: Literal["error", "skip"] | None = None
    """What is done about files that hold no whole image: error, or skip. Default: as in training."""
    images: int | None = None
    """Attack the first so many test images. Default: 1000 for quick, else all."""
    norm: Norm = "Linf"
    """Norm of quick and autoattack."""
    eps: tuple[str, ...] = ()
    """Radii of quick and autoattack, ascending, such as 0.3 or 8/255. Default, in Linf: what it was trained at."""
    union: str = ""
    """quick and autoattack: balls in each of which they are run, and in whose union an image counts, such as
    Linf=8/255,L2=0.5,L1=12. Default, where neither --norm nor --eps is given: those that it was trained in, if it
    was in several."""
    reference: bool = False
    """autoattack: run pyautoattack whole, instead of our engine."""
    precision: Literal["fp32", "auto"] = "fp32"
    """auto: attacks run in bfloat16 where the device multiplies it in hardware. Every success is confirmed in float32,
    and 100 of the images that withstand are attacked again in it."""
    transfer_from: str = ""
    """paper: a second checkpoint or function, on which transfer (black-box) attacks are made."""
    transfer_model: str = ""
    """As --model, for the network of --transfer-from."""
    batch_size: int = 250
    """Images that are attacked together."""
    seed: int = 0
    """Of all attacks."""
    device: str = "auto"
    """torch device; auto takes CUDA where there is one. Under torchrun, processes share the batches."""
    out: Path | None = None
    """Folder of the report. Default: a new one, runs/evaluations/0001 and so on, and `latest` beside it leads to the
    newest. An evaluation that was stopped goes on when it is run again."""
    overwrite: bool = False
    """Replace a report, or an unfinished evaluation of something else, in the folder --out."""
    keep_images: bool = False
    """Leave every adversarial image in the folder's state."""


class EvaluationStoppedError(StoppedError):
    """A signal ended an evaluation; `status` is the exit status that shells expect of it."""

    def __init__(self, number: int, told: str) -> None:
        AfdError.__init__(self, f"{signal.Signals(number).name}: {told}")
        self.status = 128 + number


class _Halt(KeyboardInterrupt):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run(config: EvaluateConfig, console: Console | None = None) -> None:
    """Does what `afd evaluate` was asked for.

    Raises:
        AfdError: an option, model, data set or folder that cannot be used; the message says why.
        EvaluationStoppedError: SIGINT or SIGTERM came; the message says how to go on.
    """
    output = Output(config.out, config.overwrite)
    try:
        with on_signals(_halt):
            _evaluate(config, output, console or Console())
    except KeyboardInterrupt as stop:
        raise EvaluationStoppedError(getattr(stop, "number", signal.SIGINT), output.status()) from None


def _halt(number: int) -> None:
    raise _Halt(number)


def _evaluate(config: EvaluateConfig, output: Output, console: Console) -> None:
    _check(config)
    radii = ascending(config.eps) if config.eps else None
    check_numbers(config.seed, config.batch_size)
    union = {norm: Epsilon.of(eps) for norm, eps in balls_in(config.union).items()} if config.union else None
    largest = radii[-1] if radii and config.norm == "Linf" else (union or {}).get("Linf")
    if largest is not None:
        check_radius(largest, "Linf", values=1)
    with joined(config.device) as group:
        data_set = named_images(config, group) if config.data else None
        model = load(config.checkpoint, group.device, config.model, data_set, config.input_stats)
        surrogate = (
            load(config.transfer_from, group.device, config.transfer_model, data_set) if config.transfer_from else None
        )
        images = test_images(config, model, group)
        if union is None and radii is None and config.norm == "Linf" and config.protocol != "paper":
            union = trained_in(model)
        kind = kind_of(images.name, max(images.shape[1:]))
        protocol = named(
            config.protocol, data=images.name, norm=config.norm, epsilons=radii,
            trained_at=trained_at(model, kind), reference=config.reference, transfer=surrogate is not None,
            union=union,
        )  # fmt: skip
        results = evaluate_to_folder(
            model, images, protocol, output, surrogate=surrogate, seed=config.seed, batch_size=config.batch_size,
            precision=config.precision, group=group, keep_images=config.keep_images, console=console,
        )  # fmt: skip
    if results is not None:
        present(results, console)
        for table in tables_of(results):
            present_table(table, console)
        console.print(f"{output.folder}/{REPORT} written", soft_wrap=True, markup=False, highlight=False)


def _check(config: EvaluateConfig) -> None:
    """Raises InputError where options do not go together."""
    if not config.checkpoint:
        told = f"model is {config.model}, but checkpoint is missing" if config.model else "model is missing"
        raise InputError(f"{told}; name a checkpoint or package.module:function")
    for name, spec in (("checkpoint", config.checkpoint), ("transfer-from", config.transfer_from)):
        if spec:
            check_source(name, spec)
    if config.out is not None:
        check_folder(config.out)
    if config.data_root is not None:
        check_path("data-root", config.data_root)
    if config.transfer_model and not config.transfer_from:
        raise InputError(f"transfer-model is {config.transfer_model}, but transfer-from is missing")
    if config.reference and config.precision != "fp32":
        raise InputError(f"precision is {config.precision}, but reference is set; pyautoattack runs in float32")
    if config.overwrite and config.out is None:
        raise InputError("overwrite is set, but out is not; the numbered folders are never overwritten")


def load(
    spec: str, device: torch.device, name: str = "", images: Images | StoredImages | None = None, input_stats: str = ""
) -> Model:
    """A model from a checkpoint or from ``package.module:function``.

    Args:
        spec: either of the two.
        device: where to put it.
        name: of the network of a checkpoint, as `afd.nn.build_named` knows it; "" for one that is named there.
        images: of the data set that was named, whose shape and classes the network is built for.
        input_stats: as `afd.nn.normalized.stats_in` knows them, of a network that is named; "" for none.

    Raises:
        InputError: a function for a function, or a name without the images that it is built for.
        UnusableModelError, CheckpointError: it is neither, or cannot be loaded.
    """
    if input_stats and not name:
        raise InputError(
            f"input-stats is {input_stats}, but model is missing; they are those of a network that is named"
        )
    if not Path(spec).exists() and ":" in spec:
        if name:
            raise InputError(f"model is {name}, but {spec} is a function already; it goes with a checkpoint")
        if source_of(spec)[0]:
            return evaluated(_named(spec, images, input_stats).eval(), spec, device)
        return from_factory(spec, device)
    own = _named(name, images, input_stats) if name else None
    rebuilt = rebuild(Path(spec), device, own)
    return Model(name_of(rebuilt), str(rebuilt.path), rebuilt.network, rebuilt.discriminator, rebuilt.metadata)


def _named(name: str, images: Images | StoredImages | None, input_stats: str) -> nn.Module:
    """A network of that name: afd's own and a library's for the data set's images."""
    if name not in MODELS and not source_of(name)[0] and not input_stats:
        return from_function(name, None if images is None else images.num_classes)
    if images is None:
        raise InputError(f"data is missing; model {name} is built for the images of a data set, so name it with --data")
    channels, height, width = images.shape
    stats = stats_in(input_stats, channels) if input_stats else None
    shape, own_width = (channels, height, width), width_for(kind_of(images.name, height), name)
    built = build_named(name, shape, images.num_classes, width=own_width, input_stats=stats)
    return built if name in MODELS else unwrapped(built)


OF_ATTACKED = {"adversarial_weight": "CE(x')", "divergence_weight": "KL"}  # terms that the paper's AFD does not have


def name_of(rebuilt: Rebuilt) -> str:
    """What tables call a model: the method that trained it, else its file."""
    method = look_up(rebuilt.metadata, "config", "method") or look_up(rebuilt.metadata, "run", "method")
    name, loss = look_up(method, "name"), look_up(method, "loss")
    if not isinstance(name, str):
        return rebuilt.path.stem
    if name.lower() == "natural":
        return "natural"
    if name.lower() != "afd" or not isinstance(loss, str):
        return name
    terms = [told for weight, told in OF_ATTACKED.items() if look_up(method, weight)]
    return " + ".join([f"AFD-{loss.upper()}", *terms])


def named_images(
    config: EvaluateConfig, group: Group, name: str = "", trained: Mapping[str, Any] = MappingProxyType({})
) -> Images | StoredImages:
    """All test images of a data set, by default of that which was named.

    Args:
        config: what was asked for.
        group: of the processes, one of which may fetch files.
        name: of the data.
        trained: the data that the model was trained on, which says sizes where the words do not, and the root.
    """
    name = resolved(name or str(config.data))
    if data.check_data(name) in data.NAMES:
        known = trained.get("root") if name == trained.get("name") else None
        return data.load(name, config.data_root or known, download=group.leads).test
    sizes = trained if config.image_size is None else {"image_size": config.image_size}
    asked = {one: trained.get(one) for one in ("validation", "test_share")}
    asked["bad"] = config.bad_images or trained.get("bad_images")
    asked |= {"image_size": sizes.get("image_size"), "resize": config.resize or sizes.get("resize")}
    return load_test_files(name, FileSettings(**{one: value for one, value in asked.items() if value is not None}))


def test_images(config: EvaluateConfig, model: Model, group: Group) -> Images:
    """Test images of the data that was named, or that the model was trained on: as many as were asked for.

    Of a data set that afd knows by name these are the first; of a folder or of shards, drawn class by class.
    """
    trained = look_up(model.metadata, "config", "data")
    trained = trained if isinstance(trained, dict) else {}
    trained_on = trained.get("name")
    name = config.data or (trained_on if isinstance(trained_on, str) else None)
    if name is None:
        raise InputError(f"data is missing; {model.source} does not say what it classifies, so name it with --data")
    if config.data is None and name not in data.NAMES and not name.startswith(data.FILES):
        raise InputError(
            f"data is missing; {model.source} was trained on {name!r}, of which afd knows no test images, so name it "
            "with --data"
        )
    test = named_images(config, group, name, trained)
    theirs = trained.get("classes")
    if theirs is not None and isinstance(test, StoredImages) and tuple(theirs) != test.classes:
        raise InputError(
            f"model {model.source} was trained on the {len(theirs)} classes {few(theirs)}; {name} has "
            f"{len(test.classes)}, {few(test.classes)}: they must be the same, in the same order"
        )
    drawn_of = trained.get("files")
    if isinstance(test, StoredImages) and test.held_out and drawn_of not in (None, test.source.digest):
        raise InputError(
            f"{name} holds other files than when {model.source} was trained, so other test images would be drawn, "
            "perhaps some that it was trained on; name a folder of test images with --data"
        )
    count = config.images
    if count is None:
        count = min(QUICK_IMAGES, len(test)) if config.protocol == "quick" else len(test)
    if not 1 <= count <= len(test):
        raise InputError(f"images is {count}; the test set of {name} has images 1 ... {len(test)}")
    return test.some(count)


# where the metadata of a run speak of its attack: as the method's own, as one that was given to the trainer
ATTACKS = (("method", "attack"), ("attack",))


def trained_at(model: Model, kind: str) -> Epsilon:
    """The L∞ radius that a checkpoint was trained at, or that which `PRESETS` has for such data."""
    for path in (("config", "test"), *((run, *attack) for run in ("config", "run") for attack in ATTACKS)):
        eps, norm = (look_up(model.metadata, *path, name) for name in ("eps", "norm"))
        if isinstance(eps, (int, float)) and 0 < eps < float("inf") and norm in (None, "Linf"):
            return exactly(float(eps))
    return exactly(PRESETS[kind].eps)


def trained_in(model: Model) -> dict[Norm, Epsilon] | None:
    """The balls that a checkpoint was trained in, where it was in several; None where it was not, or nobody knows."""
    for path in ((run, *attack) for run in ("config", "run") for attack in ATTACKS):
        radii = {norm: look_up(model.metadata, *path, name) for norm, name in RADIUS_IN.items()}
        if look_up(model.metadata, *path, "choice") is None:  # no union
            continue
        balls = {norm: exactly(float(eps)) for norm, eps in radii.items() if isinstance(eps, (int, float)) and eps > 0}
        return balls or None
    return None


def exactly(eps: float) -> Epsilon:
    """The fraction that a checkpoint's float stands for: so many 255ths if it is one of those, else its decimal."""
    levels = round(eps * 255)
    return Epsilon.of(f"{levels}/255") if levels and levels / 255 == eps else Epsilon.of(eps)
