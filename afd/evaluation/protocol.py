"""Protocols: what an evaluation does, as stages; and those that have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from afd.attacks import Norm, Square
from afd.attacks.autoattack import parts_of
from afd.attacks.ball import NORMS
from afd.attacks.external import AUTOATTACK_NORMS
from afd.errors import InputError, one_of
from afd.evaluation.attacks import ATTACKS, Epsilon, Stage, WorkItem, ascending, check_radius
from afd.installation import require


@dataclass(frozen=True)
class Protocol:
    """A named list of stages.

    Attributes:
        name: "quick", "autoattack", "reference" or "paper".
        norm: the norm of the radius that the result is judged at.
        reference: that radius.
        stages: in the order in which they run on each batch.
        union: the radius in each norm, where an image counts as robust if it withstands all that score in each of
            these balls; empty where the result is judged in one.
        notes: what is left out for a model of few classes, and why, in sentences.

    Raises:
        InputError: two stages have one name.
    """

    name: str
    norm: Norm
    reference: Epsilon
    stages: tuple[Stage, ...]
    union: Mapping[Norm, Epsilon] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"stages {sorted(twice)} are named twice; each name must be unique")

    @property
    def balls(self) -> Mapping[Norm, Epsilon]:
        """The radius in each norm that the result is judged at."""
        return self.union or {self.norm: self.reference}

    def reference_in(self, norm: Norm) -> Epsilon:
        """The radius in a norm that the result is judged at."""
        return self.union.get(norm, self.reference)

    def check_extras(self) -> None:
        """Raises ExtraMissingError, before anything is computed, if a stage comes from a library that is missing."""
        for stage in self.stages:
            library = ATTACKS[stage.attack].library
            if library != "afd":
                require(library, f"the stage {stage.name} of the {self.name} protocol")

    def check_stages(self) -> None:
        """Raises InputError unless there is a stage to report, and the probes that the checks compare."""
        if not any(stage.role == "score" for stage in self.stages):
            raise InputError(f"protocol {self.name} has no stage that counts; it needs one with the role 'score'")
        missing = sorted(name for name in NEEDED if self.find(name) is None)
        if missing:
            raise InputError(
                f"protocol {self.name} lacks the stages {', '.join(missing)}; add those of "
                "afd.evaluation.protocol.probes"
            )

    def for_classes(self, classes: int) -> Protocol:
        """The same for a model of so many classes: `notes` say which attack it leaves out, and what runs instead.

        Raises:
            InputError: a stage needs more classes, and nothing takes its place.
        """
        stages, notes = list[Stage](), list[str]()
        for stage in self.stages:
            kind = ATTACKS[stage.attack]
            if classes >= kind.classes:
                stages.append(stage)
                continue
            if not kind.instead:
                raise InputError(
                    f"the model has {classes} classes; the stage {stage.name} of the {self.name} protocol needs at "
                    f"least {kind.classes}"
                )
            name = stage.name.replace(stage.attack, kind.instead)
            stages.append(replace(stage, name=name, attack=kind.instead, settings={"steps": stage.settings["steps"]}))
            notes.append(
                f"{stage.name} is left out, for it needs at least {kind.classes} classes and the model has {classes}; "
                f"{name} runs in its place"
            )
        return replace(self, stages=tuple(stages), notes=tuple(notes)) if notes else self

    def find(self, name: str) -> Stage | None:
        """The stage of a name; of a probe that was left out, the one that serves as it; None if there is neither."""
        own = next((stage for stage in self.stages if stage.name == name), None)
        probe = next((probe for probe in probes(self.norm, self.reference) if probe.name == name), None)
        if own is not None or probe is None:
            return own
        return next((stage for stage in self.stages if stage.serves(probe)), None)

    def check_radii(self, pixels: int) -> None:
        """Raises InputError if a radius exceeds the distance of any two images of so many values in [0, 1].

        The paper's sweeps, which are those of other data sets too, and the probes are left alone.
        """
        for stage in self.stages:
            if self.name != "paper" and stage.role != "probe":
                check_radius(stage.epsilons[-1], stage.norm, pixels)

    def order(self) -> list[WorkItem]:
        """The work items in the order in which one batch meets them.

        A cascade meets all its attacks at one radius before the next radius.
        """
        cascade = [stage.work_items for stage in self.stages if stage.scope == "remaining"]
        radii = max(map(len, cascade), default=0)
        together = [items[i] for i in range(radii) for items in cascade if i < len(items)]
        return together + [item for stage in self.stages if stage.scope != "remaining" for item in stage.work_items]

    def as_json(self) -> dict[str, Any]:
        """Plain types that say all there is to know about the protocol."""
        return {
            "name": self.name,
            "norm": self.norm,
            "reference": self.reference.as_json(),
            "stages": [stage.as_json() for stage in self.stages],
            **({"union": {norm: eps.as_json() for norm, eps in self.union.items()}} if self.union else {}),
            **({"notes": list(self.notes)} if self.notes else {}),
        }


# --- The protocols by name: quick, autoattack (ours or the reference) and the paper's, each with probes ---------------

NAMES = ("quick", "autoattack", "paper")
PROBED = 200  # images that the probes attack
NEEDED = ("probe-noise", "probe-fgsm", "probe-pgd-20", "probe-pgd-40", "probe-far")  # of every protocol
# of the probe by random search: in quick so few that all checks together cost at most three times what they check
QUERIES, QUICK_QUERIES = 1000, 400

# Bashivan et al. 2021: the sweeps of the released notebook; the radii of CIFAR's Linf attacks are in 255ths.
SWEEPS = {
    "mnist": {
        "pgd-linf": ("0.1", "0.3", "0.35", "0.4", "0.45", "0.5"),
        "pgd-l2": ("2", "5", "10", "20"),
        "pgd-l1": ("10", "50", "100", "200", "400"),
        "fgsm": ("0.1", "0.3", "0.35", "0.4", "0.45", "0.5"),
        "mim": ("0.1", "0.3", "0.35", "0.4", "0.45", "0.5"),
        "ddn": ("1", "2", "5", "10"),
        "deepfool": ("0.01", "0.1", "0.3", "0.5", "1"),
        "cw": ("1", "2", "5"),
    },
    "cifar": {
        "pgd-linf": ("2/255", "4/255", "8/255", "16/255", "32/255"),
        "pgd-l2": ("1", "2", "5", "10", "20"),
        "pgd-l1": ("10", "50", "100", "200", "400"),
        "fgsm": ("2/255", "4/255", "8/255", "16/255", "32/255", "64/255"),
        "mim": ("2/255", "4/255", "8/255", "16/255", "32/255"),
        "ddn": ("2", "5", "10", "15"),
        "deepfool": ("2/255", "4/255", "8/255", "16/255", "32/255", "64/255"),
        "cw": ("1",),
    },
}
FAMILY = {"mnist": "mnist", "cifar10": "cifar", "cifar100": "cifar"}
PGD_RADIUS, CW_RADIUS = {"mnist": "0.3", "cifar": "8/255"}, "1"  # of table 1


def quick(norm: Norm, epsilons: Sequence[Epsilon], reference: Epsilon) -> Protocol:
    """PGD-20 and APGD-CE (100 steps), each on every image; with its probes it costs at most 4 times these two."""
    stages = (
        Stage("pgd-20", "pgd", norm, tuple(epsilons), {"steps": 20}),
        Stage("apgd-ce", "apgd-ce", norm, tuple(epsilons), {"steps": 100}),
    )
    return Protocol("quick", norm, reference, stages + probes(norm, reference, stages, QUICK_QUERIES))


def autoattack(norm: Norm, epsilons: Sequence[Epsilon], reference: Epsilon) -> Protocol:
    """AutoAttack's standard version: APGD-CE, APGD-T, FAB-T and Square, each on what is left.

    A model with fewer than 4 classes meets APGD on the margin instead of APGD-T (`Protocol.for_classes`).

    Raises:
        InputError: a norm that FAB-T and Square do not know.
    """
    stages = []
    for name, told in parts_of("standard", norm).items():
        told.pop("early_stop", None)  # which all attacks of an evaluation do
        stages.append(Stage(name, name, norm, tuple(epsilons), told, scope="remaining"))
    return Protocol("autoattack", norm, reference, (*stages, *probes(norm, reference, tuple(stages))))


def autoattack_reference(norm: Norm, epsilons: Sequence[Epsilon], reference: Epsilon) -> Protocol:
    """AutoAttack's standard version, all of it pyautoattack's; it needs a model with at least 10 classes.

    Raises:
        InputError: a norm that it does not know.
    """
    one_of("norm", norm, AUTOATTACK_NORMS)
    stages = (Stage("autoattack", "autoattack", norm, tuple(epsilons)),)
    return Protocol("reference", norm, reference, stages + probes(norm, reference))


def in_union(build: Callable[[Norm, Sequence[Epsilon], Epsilon], Protocol], balls: Mapping[Norm, Epsilon]) -> Protocol:
    """A protocol in each of several balls, with the probes of the first.

    Args:
        build: `quick`, `autoattack` or `autoattack_reference`.
        balls: the radius in each norm.
    """
    alone = [build(norm, (eps,), eps) for norm, eps in balls.items()]
    stages = [
        replace(stage, name=f"{stage.name}-{one.norm.lower()}")
        for one in alone
        for stage in one.stages
        if stage.role == "score"
    ]
    of_first = [stage for stage in alone[0].stages if stage.role == "probe"]
    return replace(alone[0], stages=(*stages, *of_first), union=dict(balls))


def paper(data: str, *, transfer: bool) -> Protocol:
    """The eight attacks of Bashivan et al. 2021 over their sweeps, and with `transfer` those made on a surrogate.

    Args:
        data: "mnist", "cifar10" or "cifar100"; others take MNIST's sweeps.
        transfer: whether there is a surrogate.
    """
    family = FAMILY.get(data, "mnist")
    reference, cw_radius = Epsilon.of(PGD_RADIUS[family]), Epsilon.of(CW_RADIUS)
    sweeps = {name: ascending(radii) for name, radii in SWEEPS[family].items()}
    many, adam = (40, 50) if family == "mnist" else (20, 20)
    alpha = {} if family == "mnist" else {"alpha": 2 / 255}
    linf = {"steps": many, **alpha}
    stages = [
        Stage("pgd-linf", "pgd", "Linf", sweeps["pgd-linf"], linf),
        Stage("pgd-l2", "pgd", "L2", sweeps["pgd-l2"], {"steps": many}),
        Stage("pgd-l1", "pgd", "L1", sweeps["pgd-l1"], {"steps": many}),
        Stage("fgsm", "fgsm", "Linf", sweeps["fgsm"], scope="correct"),
        Stage("mim", "mim", "Linf", sweeps["mim"], {"steps": many}),
        Stage("ddn", "ddn", "L2", sweeps["ddn"], {"steps": 100}),
        Stage("deepfool", "deepfool", "Linf", sweeps["deepfool"], {"steps": 50}),
        Stage("cw", "cw", "L2", sweeps["cw"], {"steps": adam}),
    ]
    if transfer:
        stages += [
            Stage("pgd-linf-transfer", "pgd", "Linf", (reference,), linf, scope="correct", role="transfer"),
            Stage("cw-transfer", "cw", "L2", (cw_radius,), {"steps": adam}, scope="correct", role="transfer"),
        ]
    return Protocol("paper", "Linf", reference, (*stages, *probes("Linf", reference)))


def probes(norm: Norm, reference: Epsilon, beside: Sequence[Stage] = (), queries: int = QUERIES) -> tuple[Stage, ...]:
    """Attacks whose only purpose is to show masked gradients, on the first images; what is known is not asked again.

    Noise and Square meet only images that withstand all attacks by gradients, for only those would tell anything. Twice
    as many steps are tried where PGD-20 fails: an image that they lose is not seen.

    Args:
        norm: of the ball.
        reference: its radius.
        beside: stages that run before; a probe that one of them serves as is left out.
        queries: of Square, where it knows the norm.
    """
    here, far = (reference,), ascending((Fraction(1, 2), Fraction(1)))
    found = [
        Stage("probe-fgsm", "fgsm", norm, here, {}, "all", "probe", PROBED),
        Stage("probe-pgd-20", "pgd", norm, here, {"steps": 20}, "correct", "probe", PROBED),
        Stage("probe-pgd-40", "pgd", norm, here, {"steps": 40}, "correct", "probe", PROBED, after="probe-pgd-20"),
        Stage("probe-far", "pgd", "Linf", far, {"steps": 20}, "survivors", "probe", PROBED),
        Stage("probe-noise", "noise", norm, here, {"draws": 20}, "withstood", "probe", PROBED),
    ]
    if norm in Square.known:
        found.append(Stage("probe-square", "square", norm, here, {"queries": queries}, "withstood", "probe", PROBED))
    return tuple(probe for probe in found if not any(stage.serves(probe) for stage in beside))


def named(
    name: str,
    *,
    data: str,
    norm: Norm,
    epsilons: Sequence[Epsilon] | None,
    trained_at: Epsilon,
    reference: bool = False,
    transfer: bool = False,
    union: Mapping[Norm, Epsilon] | None = None,
) -> Protocol:
    """The protocol that a user asked for.

    Args:
        name: "quick", "autoattack" or "paper".
        data: the data set, whose sweeps the paper's protocol takes.
        norm: of quick and autoattack.
        epsilons: of quick and autoattack, ascending; None for `trained_at` alone.
        trained_at: radius that the model was trained at, or its data set's.
        reference: let pyautoattack do all of autoattack.
        transfer: there is a surrogate (paper).
        union: of quick and autoattack: the radius in each norm, instead of norm and radii.

    Raises:
        InputError: an unknown name, or an option that this protocol does not have.
    """
    one_of("protocol", name, NAMES)
    one_of("norm", norm, NORMS)
    if reference and name != "autoattack":
        raise InputError(f"reference is set, but protocol is {name!r}; allowed with it is autoattack")
    if transfer and name != "paper":
        raise InputError(f"transfer-from is set, but protocol is {name!r}; allowed with it is paper")
    build = {"quick": quick, "autoattack": autoattack_reference if reference else autoattack}.get(name)
    if union is not None:
        if build is None:
            raise InputError("union is set, but the paper's protocol has its own radii and norms; leave it out")
        if epsilons is not None or norm != "Linf":
            raise InputError("union is set, and eps or norm too; it names the radius in each norm")
        if not all(eps.exact > 0 for eps in union.values()):
            raise InputError("union has a radius of 0, where nothing is attacked; it needs radii > 0")
        return in_union(build, union)
    if build is None:
        if epsilons is not None or norm != "Linf":
            raise InputError("eps or norm is set, but the paper's protocol has its own radii and norms; leave them out")
        return paper(data, transfer=transfer)
    if epsilons is None and norm != "Linf":
        raise InputError(f"eps is missing; norm {norm} has no usual radius, so name one with --eps")
    radii = tuple(epsilon for epsilon in epsilons or (trained_at,) if epsilon.exact > 0)
    if not radii:
        raise InputError("eps is 0 alone, where nothing is attacked; it needs a radius > 0")
    judged_at = trained_at if trained_at in radii else radii[0]
    return build(norm, radii, judged_at)
