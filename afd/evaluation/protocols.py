"""The protocols by name: `quick`, `autoattack` (ours or the reference) and the paper's, each with probes beside it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from afd.attacks.settings import Norm
from afd.errors import InputError, one_of
from afd.evaluation.epsilon import Epsilon, ascending
from afd.evaluation.protocol import Protocol, Stage
from afd.evaluation.target import NORMS
from afd.extras import installed

NAMES = ("quick", "autoattack", "paper")
PROBED = 200  # images that the probes attack

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
    """PGD-20 and APGD-CE (100 steps), each on every image."""
    stages = (
        Stage("pgd-20", "pgd", norm, tuple(epsilons), {"steps": 20}),
        Stage("apgd-ce", "apgd-ce", norm, tuple(epsilons), {"steps": 100}),
    )
    return Protocol("quick", norm, reference, stages + probes(norm, reference))


def autoattack(norm: Norm, epsilons: Sequence[Epsilon], reference: Epsilon) -> Protocol:
    """AutoAttack's standard version: APGD-CE and APGD-T on our engine, then FAB-T and Square, each on what is left.

    APGD-T needs a model with at least 4 classes.
    """
    restarts, classes = (5, 5) if norm == "L1" else (1, 9)
    settings: dict[str, dict[str, int]] = {
        "apgd-ce": {"steps": 100, "n_restarts": restarts},
        "apgd-t": {"steps": 100, "n_target_classes": classes},
        "fab-t": {"steps": 100},
        "square": {"queries": 5000},
    }
    stages = tuple(
        Stage(name, name, norm, tuple(epsilons), chosen, scope="remaining") for name, chosen in settings.items()
    )
    return Protocol("autoattack", norm, reference, stages + probes(norm, reference))


def autoattack_reference(norm: Norm, epsilons: Sequence[Epsilon], reference: Epsilon) -> Protocol:
    """AutoAttack's standard version, all of it pyautoattack's; it needs a model with at least 10 classes."""
    stages = (Stage("autoattack", "autoattack", norm, tuple(epsilons)),)
    return Protocol("reference", norm, reference, stages + probes(norm, reference))


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


def probes(norm: Norm, reference: Epsilon) -> tuple[Stage, ...]:
    """Attacks whose only purpose is to show masked gradients, on the first images; Square where it is installed."""
    here, far = (reference,), ascending((Fraction(1, 2), Fraction(1)))
    found = [
        Stage("probe-noise", "noise", norm, here, {"draws": 20}, "correct", "probe", PROBED),
        Stage("probe-fgsm", "fgsm", norm, here, {}, "all", "probe", PROBED),
        Stage("probe-pgd-20", "pgd", norm, here, {"steps": 20}, "correct", "probe", PROBED),
        Stage("probe-pgd-40", "pgd", norm, here, {"steps": 40}, "correct", "probe", PROBED),
        Stage("probe-far", "pgd", "Linf", far, {"steps": 40}, "survivors", "probe", PROBED),
    ]
    if installed("pyautoattack"):
        found.append(Stage("probe-square", "square", norm, here, {"queries": 1000}, "correct", "probe", PROBED))
    return tuple(found)


def named(
    name: str,
    *,
    data: str,
    norm: Norm,
    epsilons: Sequence[Epsilon] | None,
    trained_at: Epsilon,
    reference: bool = False,
    transfer: bool = False,
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

    Raises:
        InputError: an unknown name, or an option that this protocol does not have.
    """
    one_of("protocol", name, NAMES)
    one_of("norm", norm, NORMS)
    if reference and name != "autoattack":
        raise InputError(f"reference is set, but protocol is {name!r}; allowed with it is autoattack")
    if transfer and name != "paper":
        raise InputError(f"transfer-from is set, but protocol is {name!r}; allowed with it is paper")
    if name == "paper":
        if epsilons is not None or norm != "Linf":
            raise InputError("eps or norm is set, but the paper's protocol has its own radii and norms; leave them out")
        return paper(data, transfer=transfer)
    if epsilons is None and norm != "Linf":
        raise InputError(f"eps is missing; norm {norm} has no usual radius, so name one with --eps")
    radii = tuple(epsilon for epsilon in epsilons or (trained_at,) if epsilon.exact > 0)
    if not radii:
        raise InputError("eps is 0 alone, where nothing is attacked; it needs a radius > 0")
    judged_at = trained_at if trained_at in radii else radii[0]
    build = {"quick": quick, "autoattack": autoattack_reference if reference else autoattack}[name]
    return build(norm, radii, judged_at)
