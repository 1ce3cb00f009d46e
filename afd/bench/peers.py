"""Other libraries' attacks behind one shape: (model, request) -> a call that attacks a batch, at equal settings.

A peer is imported when asked for. One that is not installed is named with the line that adds it; none is a dependency.
Each runs as its documentation shows. What its defaults would make slower or weaker than it can be is set: ART's batch
of 32 is the whole batch, pyautoattack's L1 shrinks its radius as its standard version does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks import APGD, PGD
from afd.bench import eager
from afd.errors import AfdError, InputError, one_of

Run = Callable[[Tensor, Tensor], Tensor]


class PeerMissingError(AfdError):
    """A peer library is not installed; the message says how to add it."""


@dataclass(frozen=True)
class Request:
    """What every library is asked for, from a random start.

    Attributes:
        attack: "pgd" or "apgd" (on cross-entropy).
        norm: "Linf", "L2" or "L1".
        eps: radius.
        alpha: step of PGD.
        steps: number of steps.
    """

    attack: str
    norm: str
    eps: float
    alpha: float
    steps: int

    @property
    def name(self) -> str:
        """As in PGD-10 Linf."""
        return f"{self.attack.upper()}-{self.steps} {self.norm}"


def ours(model: nn.Module, request: Request, precision: str = "fp32") -> Run:
    """afd's own."""
    if request.attack == "apgd":
        return APGD(model, norm=request.norm, eps=request.eps, steps=request.steps, precision=precision)
    return PGD(model, norm=request.norm, eps=request.eps, alpha=request.alpha, steps=request.steps, precision=precision)


def _compiled(model: nn.Module, request: Request) -> Run:
    return ours(torch.compile(model), request)  # type: ignore[arg-type]


def _eager(model: nn.Module, request: Request) -> Run:
    """The loop that people write by hand, in plain PyTorch."""
    _only(request, "a loop by hand", {"pgd": ("Linf", "L2", "L1")})

    def run(x: Tensor, y: Tensor) -> Tensor:
        x_adv = x + request.eps * (2 * torch.rand_like(x) - 1) if request.norm == "Linf" else x.clone()
        x_adv = eager.project(x_adv, x, request.eps, 0.0, 1.0, request.norm)
        for _ in range(request.steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            x_adv = eager.pgd_step(
                x_adv.detach(), x, grad, request.alpha, request.eps, 0.0, 1.0, request.norm, sparsity=0.05
            )
        return x_adv

    return run


def _torchattacks(model: nn.Module, request: Request) -> Run:
    import torchattacks

    _only(request, "torchattacks", {"pgd": ("Linf", "L2"), "apgd": ("Linf", "L2")})
    if request.attack == "apgd":
        run: Run = torchattacks.APGD(model, norm=request.norm, eps=request.eps, steps=request.steps, n_restarts=1)
    elif request.norm == "L2":
        run = torchattacks.PGDL2(model, eps=request.eps, alpha=request.alpha, steps=request.steps, random_start=True)
    else:
        run = torchattacks.PGD(model, eps=request.eps, alpha=request.alpha, steps=request.steps, random_start=True)
    return run


def _foolbox(model: nn.Module, request: Request) -> Run:
    import foolbox

    _only(request, "foolbox", {"pgd": ("Linf", "L2", "L1")})
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=next(model.parameters()).device)
    kinds = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD, "L1": foolbox.attacks.L1PGD}
    attack = kinds[request.norm](abs_stepsize=request.alpha, steps=request.steps, random_start=True)

    def run(x: Tensor, y: Tensor) -> Tensor:
        clipped: Tensor = attack(wrapped, x, y, epsilons=request.eps)[1]
        return clipped

    return run


def _art(model: nn.Module, request: Request) -> Run:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    _only(request, "art", {"pgd": ("Linf", "L2", "L1")})

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        estimator = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=x.device.type
        )
        attack = ProjectedGradientDescentPyTorch(
            estimator,
            norm={"Linf": "inf", "L2": 2, "L1": 1}[request.norm],
            eps=request.eps,
            eps_step=request.alpha,
            max_iter=request.steps,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    return run


def _pyautoattack(model: nn.Module, request: Request) -> Run:
    from pyautoattack.autopgd_base import APGDAttack

    _only(request, "pyautoattack", {"apgd": ("Linf", "L2", "L1")})
    device = next(model.parameters()).device
    attack = APGDAttack(
        model, n_iter=request.steps, norm=request.norm, eps=request.eps, n_restarts=1, seed=0, loss="ce",
        use_largereps=request.norm == "L1", device=str(device),
    )  # fmt: skip

    def run(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = attack.perturb(x, y)
        return found

    return run


@dataclass(frozen=True)
class Peer:
    """Another way to attack: the module that must be importable, what pip calls it, and its adapter."""

    module: str
    package: str
    adapt: Callable[[nn.Module, Request], Run]


PEERS = {
    "torchattacks": Peer("torchattacks", "torchattacks", _torchattacks),
    "foolbox": Peer("foolbox", "foolbox", _foolbox),
    "art": Peer("art", "adversarial-robustness-toolbox", _art),
    "pyautoattack": Peer("pyautoattack", "pyautoattack", _pyautoattack),
    "eager": Peer("torch", "torch", _eager),
    "compile": Peer("torch", "torch", _compiled),
}


class NotOfferedError(AfdError):
    """A peer has no such attack."""


def _only(request: Request, library: str, offered: dict[str, tuple[str, ...]]) -> None:
    if request.norm not in offered.get(request.attack, ()):
        raise NotOfferedError(f"{library} offers no {request.attack.upper()} in {request.norm}")


def adapted(name: str, model: nn.Module, request: Request) -> Run:
    """The attack of the library called `name`, ready for a batch.

    Raises:
        InputError: unknown name.
        PeerMissingError: it is not installed.
        NotOfferedError: it has no such attack.
    """
    one_of("against", name, PEERS)
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        raise PeerMissingError(f"{name} is not installed; add it with: pip install {peer.package}")
    return peer.adapt(model, request)


def requests(attacks: list[str], norms: list[str], steps: int, radii: dict[str, float]) -> list[Request]:
    """Every attack in every norm.

    Raises:
        InputError: unknown attack or norm, or none of either.
    """
    for kind in attacks:
        one_of("attack", kind, ("pgd", "apgd"))
    for norm in norms:
        one_of("norm", norm, radii)
    if not (attacks and norms):
        raise InputError("attack and norm must name at least one each")
    return [
        Request(kind, norm, radii[norm], radii[norm] * 2.5 / max(steps, 1), steps) for kind in attacks for norm in norms
    ]
