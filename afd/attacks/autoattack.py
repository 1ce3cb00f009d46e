"""AutoAttack (Croce & Hein, "Reliable evaluation of adversarial robustness", ICML 2020): attacks in a cascade.

Its parts and what each is told are written down here alone (`parts_of`), as is what becomes of them where a model has
few classes (`fitted`); evaluation reads both.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from afd.attacks import inputs
from afd.attacks.apgd import APGD, APGDSettings
from afd.attacks.ball import Ball, Norm
from afd.attacks.base import GradientAttack
from afd.attacks.engine import evaluating, judged, misclassified
from afd.attacks.fab import FAB
from afd.attacks.square import Square
from afd.errors import InputError, InputTypeError, ModelError, ModelWarning, one_of, warn_caller
from afd.execution import AttackExecution
from afd.graphs import guard
from afd.nn.modes import local
from afd.nn.outputs import saying_once

Version = Literal["standard", "plus", "rand"]
VERSIONS: tuple[Version, ...] = get_args(Version)
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")  # that all of its parts know
Told = Mapping[str, Mapping[str, Any]]  # settings of parts, by their names
BUILD: dict[str, Callable[..., GradientAttack]] = {
    "apgd-ce": functools.partial(APGD, loss="ce"),
    "apgd-dlr": functools.partial(APGD, loss="dlr"),
    "apgd-t": functools.partial(APGD, loss="dlr-targeted"),
    "fab": FAB,
    "fab-t": FAB,
    "square": Square,
}
OF_ALL_PARTS = ("norm", "eps", "seed", "bounds", "precision", "chunk_size")
LEAST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}  # that its loss needs; with fewer, the margin takes its place


def parts_of(version: str, norm: str) -> dict[str, dict[str, Any]]:
    """The parts of a version of AutoAttack, in order, and what each is told.

    Args:
        version: "standard" (APGD-CE, APGD-T, FAB-T, Square), "plus" (more restarts, APGD-DLR and untargeted FAB as
            well), or "rand" (APGD-CE and APGD-DLR, each point an average of 20 evaluations).
        norm: "Linf", "L2" or "L1"; in L1, standard has 5 restarts of APGD-CE, and 5 target classes of APGD-T.

    Raises:
        InputError: an unknown version, or a norm that a part does not know.
    """
    one_of("version", version, VERSIONS)
    one_of("norm", norm, NORMS)
    if version == "rand":
        return {name: {"steps": 100, "eot_iter": 20} for name in ("apgd-ce", "apgd-dlr")}
    plus, sparse = version == "plus", norm == "L1"
    apgd: dict[str, Any] = {"steps": 100, "n_restarts": 5 if plus or sparse else 1, "early_stop": True}
    parts: dict[str, dict[str, Any]] = {
        "apgd-ce": apgd,
        "apgd-dlr": apgd,
        "fab": {"steps": 100, "n_restarts": 5, "n_target_classes": None},
        "square": {"queries": 5000},
        "apgd-t": {"steps": 100, "n_target_classes": 5 if sparse and not plus else 9, "early_stop": True},
        "fab-t": {"steps": 100, "n_target_classes": 9},
    }
    return parts if plus else {name: parts[name] for name in ("apgd-ce", "apgd-t", "fab-t", "square")}


def fitted(name: str, settings: Mapping[str, Any], classes: int) -> tuple[dict[str, Any], str]:
    """What a part is told where a model has so many classes, and in what that differs from AutoAttack's, if it does.

    It aims at no more other classes than there are. A part whose loss needs more classes ascends the margin instead, in
    runs of its own starts.

    Args:
        name: of the part.
        settings: as `parts_of` has them.
        classes: at least 2.
    """
    told = dict(settings)
    if classes < LEAST_CLASSES.get(name, 2):
        told.pop("n_target_classes", None)
        return {**told, "loss": "margin"}, f"{name} ascends the margin: its loss needs {LEAST_CLASSES[name]} classes"
    wanted = told.get("n_target_classes")
    if wanted is None or wanted < classes:
        return told, ""
    told["n_target_classes"] = classes - 1
    fewer = "1 class" if classes == 2 else f"{classes - 1} classes"
    return told, f"{name} aims at {fewer} instead of {wanted}"


# --- What was found -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartReport:
    """What a part of AutoAttack was given, and what it broke.

    Attributes:
        name: of the part.
        given: images that it attacked, [N] bool.
        broken: of these, those whose point the model takes for another class, [N] bool.
        blind: of these, those for which no gradient told where to go (`afd.attacks.Report`), [N] bool.
        seconds: that it took.
        note: in what it differs from AutoAttack's part of that name, for the model has few classes; else empty.
    """

    name: str
    given: Tensor
    broken: Tensor
    blind: Tensor
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class AutoAttackReport:
    """What AutoAttack found on a batch; `print` shows it as a table. All tensors are on the CPU.

    Attributes:
        correct: images that the model gets right as they are, [N] bool.
        parts: in the order in which they ran.
    """

    correct: Tensor
    parts: tuple[PartReport, ...] = ()

    @property
    def broken(self) -> Tensor:
        """Images that some part broke, [N] bool."""
        return self._broken(self.parts)

    @property
    def robust(self) -> Tensor:
        """Images that the model gets right under every part, [N] bool."""
        return self.correct & ~self.broken

    @property
    def accuracies(self) -> dict[str, float]:
        """Shares of images that the model gets right: "clean", and after each part by its name. NaN of no images."""
        names = ["clean", *(part.name for part in self.parts)]
        left = (self.correct & ~self._broken(self.parts[:count]) for count in range(len(names)))
        return {name: float(robust.double().mean()) for name, robust in zip(names, left, strict=True)}

    @property
    def robust_accuracy(self) -> float:
        """Share of images that the model gets right under every part."""
        return float(self.robust.double().mean())

    def _broken(self, parts: Sequence[PartReport]) -> Tensor:
        return functools.reduce(torch.logical_or, (part.broken for part in parts), torch.zeros_like(self.correct))

    def __str__(self) -> str:
        counts = [("clean", len(self.correct), int((~self.correct).sum()), "")]
        counts += [(one.name, int(one.given.sum()), int(one.broken.sum()), f"{one.seconds:.1f}") for one in self.parts]
        width = max(len(name) for name, *_ in counts)
        lines = [f"{'':{width}}  given  broken  accuracy  seconds"]
        for (name, given, broken, seconds), share in zip(counts, self.accuracies.values(), strict=True):
            told = f"{share:.2%}" if len(self.correct) else "-"
            lines.append(f"{name:{width}}  {given:5}  {broken:6}  {told:>8}  {seconds:>7}".rstrip())
        return "\n".join(lines + [part.note for part in self.parts if part.note])


def _chosen(parts: Told, version: str, attacks: Sequence[str] | Told | None, n_target_classes: int | None) -> Told:
    """What to run of the parts of a version, and what each is told: see `AutoAttack`."""
    if n_target_classes is not None:
        count = {"n_target_classes": inputs.count("n_target_classes", n_target_classes, 1)}
        parts = {name: {**told, **(count if told.get("n_target_classes") else {})} for name, told in parts.items()}
    if attacks is None:
        return parts
    if isinstance(attacks, str) or not attacks:
        raise InputError(f"attacks is {attacks!r}; it must be a list of parts, one at least, or None for all of them")
    own = attacks if isinstance(attacks, Mapping) else {name: dict[str, Any]() for name in attacks}
    if len(own) < len(attacks):
        raise InputError(f"attacks is {list(attacks)}; it must name each part once")
    for name, told in own.items():
        one_of(f"a part of version={version!r}", name, parts)
        if given := sorted({*told} & {*OF_ALL_PARTS}):
            raise InputError(f"attacks sets {', '.join(given)} of {name}; all parts have AutoAttack's own")
    return {name: {**parts[name], **told} for name, told in own.items()}


def _points(name: str, attack: GradientAttack, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    """What a part makes of images at these places in the data; what it warns of the model is said with its name."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ModelWarning)
        points = attack(x, y, first_sample=places)
    for one in said:
        if issubclass(one.category, ModelWarning):
            warn_caller(f"{name}, of the {len(x)} images that it was given: {one.message}", one.category)
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return points


# --- The attack -----------------------------------------------------------------------------------------------------


class AutoAttack:
    """AutoAttack: each part attacks the images that the ones before it have left; what none of them breaks is robust.

    The parts are ours, as strong as AutoAttack's own: `afd.attacks.APGD`, `FAB`, `Square`. They treat the model as
    `PGD` does. An image counts as broken once the model as written, in float32, takes its point in ball and bounds for
    another class. What is drawn hangs on seed and image alone, so that the same images are broken for any split of a
    batch (up to rounding: a model may round an image differently in another batch).

    With 2 or 3 classes APGD-T ascends the margin, with 2 so does APGD-DLR, and no part aims at more classes than there
    are; a warning says so before the first part runs, and the report says it too.

    A model that draws at random needs version="rand", which averages; clean images and points are judged by one
    evaluation each, as AutoAttack judges them.

    Args:
        model: classifier, images -> logits [N, classes], 2 at least.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball, as in `afd.attacks.PGDSettings`.
        version: as in `parts_of`.
        attacks: what to run of the version, and in which order: names; or by name, settings that take the place of the
            version's, {"apgd-ce": {"steps": 20}}. None for all of it.
        n_target_classes: other classes that APGD-T and FAB-T aim at, >= 1; None for the version's.
        surrogates: other classifiers of the same images. APGD-CE on each comes first; its points are judged on model.
        seed: of whatever is drawn; the same seed gives the same result.
        bounds: lowest and highest value of an image.
        precision: of the parts, as in `afd.attacks.PGDSettings`; a success counts in float32 alone.
        chunk_size: rows attacked together on a CPU, as there.

    Attributes:
        report: what the last call found (`AutoAttackReport`); None before.

    Raises:
        InputTypeError: the model, or a surrogate, is no module; a setting has another type.
        InputError: a setting is out of range, a part is not of the version, a surrogate is the model itself.
    """

    record_trajectory = False  # it has none

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "Linf",
        eps: float | Tensor = 8 / 255,
        version: Version = "standard",
        attacks: Sequence[str] | Told | None = None,
        n_target_classes: int | None = None,
        surrogates: Sequence[nn.Module] = (),
        seed: int = 0,
        bounds: tuple[float, float] = (0.0, 1.0),
        precision: str | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if isinstance(surrogates, nn.Module) or not isinstance(surrogates, Sequence):
            raise InputTypeError(f"surrogates is a {type(surrogates).__name__}; it must be a list of models")
        for name, one in {"model": model, **{f"surrogates[{i}]": one for i, one in enumerate(surrogates)}}.items():
            if not isinstance(one, nn.Module):
                raise InputTypeError(f"{name} is a {type(one).__name__}; it must be a torch.nn.Module")
            if one is model and name != "model":
                raise InputError(f"{name} is the model itself; a surrogate is another model")
        common = {"norm": norm, "bounds": bounds, "precision": precision, "chunk_size": chunk_size}
        checked = APGDSettings(**common, eps=eps, seed=seed)  # type: ignore[arg-type]
        self.model, self.surrogates, self.version = model, tuple(surrogates), version
        self.norm, self.eps, self.bounds, self.seed = checked.norm, checked.eps, checked.bounds, checked.seed
        self.told = _chosen(parts_of(version, norm), version, attacks, n_target_classes)
        self._common = {name: checked[name] for name in common}
        for name, told in self.told.items():  # raises for what one of them does not take
            BUILD[name](model, **told, eps=self.eps, seed=self.seed, **self._common)
        self.report: AutoAttackReport | None = None

    @classmethod
    def partial(cls, **settings: Any) -> Callable[[nn.Module], Self]:
        """The attack with everything settled but its model."""
        return functools.partial(cls, **settings)

    def __call__(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """Adversarial images: of each that a part broke, its point; the others as they are.

        Args:
            x: images [N, ...], float32 in `bounds`.
            y: labels [N] int64.
            seed: overrides the attack's own for this call.
            first_sample: index of x's first row in the whole data set, so that batches of any size are attacked alike.

        Returns:
            [N, ...] like x, within eps of it and within bounds.

        Raises:
            InputError, InputTypeError: an argument is not as described, eps is not one value per sample of x, a label
                is not one of the model's classes, or the model does not return logits.
            ModelError: the model returned NaN, or cannot be differentiated.

        Warns:
            ModelWarning: the model has too few classes for a part as it is; what a part warns of, with its name; or
                NaN at points of it that it has not shown the model, whose images count as broken.
        """
        self.report = None
        if self.record_trajectory:
            raise InputError("record_trajectory is True; AutoAttack keeps none, as PGD, MIM and APGD do")
        inputs.check_form(x, y)
        inputs.check_length("eps", self.eps, x)
        seed = self.seed if seed is None else inputs.counter("seed", seed)
        first_sample = inputs.counter("first_sample", first_sample)
        models = nn.ModuleList([self.model, *self.surrogates]) if self.surrogates else self.model
        with guard(x.device), torch.inference_mode(False), torch.no_grad(), saying_once(), evaluating(models):
            x, y = inputs.outside_inference(x.detach()), inputs.outside_inference(y)
            return self._attacked(x, y, seed, first_sample)

    def perturb(self, x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """The same as calling the attack."""
        return self(x, y, seed=seed, first_sample=first_sample)

    def _attacked(self, x: Tensor, y: Tensor, seed: int, first_sample: int) -> Tensor:
        x_adv, found = x.clone(), list[PartReport]()
        if not len(x):
            self.report = AutoAttackReport(torch.zeros(0, dtype=torch.bool, device="cpu"))
            return x_adv
        largest_label = inputs.largest_label(x, y, self.bounds)
        classes, correct = self._clean(x, y)
        if largest_label >= classes:
            raise InputError(f"y holds the label {largest_label}; the model has classes 0 ... {classes - 1}")
        left = correct
        for name, note, build in self._parts(classes):
            started, rows = time.perf_counter(), left.nonzero().squeeze(1)
            broken, blind = torch.zeros_like(left), torch.zeros_like(left)
            if len(rows):
                attack = build(eps=self._radii(rows), seed=seed, **self._common)
                given = x if len(rows) == len(x) else x[rows]
                points = _points(name, attack, given, y[rows], first_sample + rows.cpu())
                fooled = self._fooled(name, points, x, y, rows)
                x_adv[rows[fooled]] = points[fooled]
                broken[rows] = fooled
                if attack.report is not None:
                    blind[rows] = attack.report.blind.to(blind.device)
            seconds = time.perf_counter() - started
            found.append(PartReport(name, left.cpu(), broken.cpu(), blind.cpu(), seconds, note))
            left = left & ~broken
        self.report = AutoAttackReport(correct.cpu(), tuple(found))
        return x_adv

    def _parts(self, classes: int) -> Iterator[tuple[str, str, Callable[..., GradientAttack]]]:
        """Name, note and attack of each part for a model of so many classes; warns where it is not AutoAttack's own."""
        parts = [(name, BUILD[name], *fitted(name, told, classes)) for name, told in self.told.items()]
        if notes := [note for *_, note in parts if note]:
            warn_caller(f"the model has {classes} classes: {'; '.join(notes)}", ModelWarning)
        transfer = parts_of(self.version, self.norm)["apgd-ce"] | {"early_stop": False}
        for number, surrogate in enumerate(self.surrogates, 1):
            yield f"surrogate-{number}", "", functools.partial(BUILD["apgd-ce"], surrogate, **transfer)
        for name, attack, settings, note in parts:
            yield name, note, functools.partial(attack, self.model, **settings)

    def _radii(self, rows: Tensor) -> float | Tensor:
        """eps of some rows: one number, or one per row."""
        if not isinstance(self.eps, Tensor):
            return self.eps
        return self.eps[rows] if self.eps.dim() else float(self.eps)

    def _chunks(self, x: Tensor) -> Iterator[slice]:
        """Rows of x that the model is asked about together."""
        return AttackExecution(chunk_size=cast(Any, self._common["chunk_size"])).chunks(local(self.model), x)

    def _clean(self, x: Tensor, y: Tensor) -> tuple[int, Tensor]:
        """How many classes the model has, and which images it gets right, [N] bool."""
        correct, classes, undefined = torch.zeros_like(y, dtype=torch.bool), 0, torch.zeros_like(y, dtype=torch.bool)
        for rows in self._chunks(x):
            logits = judged(local(self.model), x[rows])
            classes, correct[rows], undefined[rows] = (
                logits.shape[1],
                logits.argmax(1) == y[rows],
                logits.isnan().any(1),
            )
        if undefined.any():
            raise ModelError(f"the model returned NaN logits for {int(undefined.sum())} of {len(x)} images")
        return classes, correct

    def _fooled(self, name: str, points: Tensor, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """Of which of these rows the model takes the point, in ball and bounds, for another class, or NaN, [n] bool."""
        fooled, (low, high) = torch.zeros_like(rows, dtype=torch.bool), self.bounds
        undefined = torch.zeros_like(fooled)
        for some in self._chunks(points):
            point, own = points[some], rows[some]
            ball = Ball(self.norm, self._radii(own), self.bounds)
            legal = ball.holds(ball.distance(point, x[own])) & (point >= low).flatten(1).all(1)
            legal &= (point <= high).flatten(1).all(1)
            logits = judged(local(self.model), point)
            fooled[some] = legal & misclassified(logits, y[own])
            undefined[some] = legal & logits.isnan().any(1)
        if count := int(undefined.sum()):
            warn_caller(f"{count} of {len(rows)} images count as broken: NaN logits at {name}'s points", ModelWarning)
        return fooled
