"""Other ways to attack behind one shape: (model, request) -> a call that attacks a batch, at equal settings.

A library is imported when asked for. One that is not installed is named with the line that adds it; none is a
dependency. Each runs as its documentation recommends. Where what it does by default is slower or weaker than that, its
defaults are a peer of their own: ART goes through a batch 32 images at a time, and pyautoattack's Auto-PGD does without
the shrinking radius that its standard version has in L1. The others have nothing to set beside the request.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from afd.bench import by_hand
from afd.bench.request import NORMS, NotOfferedError, Request, Run
from afd.errors import AfdError, one_of
from afd.extras import how_to_add


class PeerMissingError(AfdError):
    """A peer library is not installed; the message says how to add it."""


def _torchattacks(model: nn.Module, request: Request) -> Run:
    import torchattacks

    request.only("torchattacks", {"pgd": ("Linf", "L2"), "apgd": ("Linf", "L2")})
    if request.attack == "apgd":
        run: Run = torchattacks.APGD(model, norm=request.norm, eps=request.eps, steps=request.steps, n_restarts=1)
    elif request.norm == "L2":
        run = torchattacks.PGDL2(model, eps=request.eps, alpha=request.alpha, steps=request.steps, random_start=True)
    else:
        run = torchattacks.PGD(model, eps=request.eps, alpha=request.alpha, steps=request.steps, random_start=True)
    return run


def _foolbox(model: nn.Module, request: Request) -> Run:
    import foolbox

    request.only("foolbox", {"pgd": NORMS})
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=_device(model))
    kinds = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD, "L1": foolbox.attacks.L1PGD}
    attack = kinds[request.norm](abs_stepsize=request.alpha, steps=request.steps, random_start=True)

    def run(x: Tensor, y: Tensor) -> Tensor:
        clipped: Tensor = attack(wrapped, x, y, epsilons=request.eps)[1]
        return clipped

    return run


def _art(model: nn.Module, request: Request, batch_size: int | None) -> Run:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    request.only("art", {"pgd": NORMS})

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        device = "gpu" if x.is_cuda else "cpu"
        estimator = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=device
        )
        attack = ProjectedGradientDescentPyTorch(
            estimator,
            norm={"Linf": "inf", "L2": 2, "L1": 1}[request.norm],
            eps=request.eps,
            eps_step=request.alpha,
            max_iter=request.steps,
            num_random_init=1,
            batch_size=batch_size or len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    return run


def _pyautoattack(model: nn.Module, request: Request, shrinks: bool) -> Run:
    from pyautoattack.autopgd_base import APGDAttack

    request.only("pyautoattack", {"apgd": NORMS})
    if not shrinks and request.norm != "L1":
        raise NotOfferedError(f"pyautoattack's defaults are what it recommends in {request.norm}")
    attack = APGDAttack(
        model, n_iter=request.steps, norm=request.norm, eps=request.eps, n_restarts=1, seed=0, loss="ce",
        use_largereps=shrinks and request.norm == "L1", device=str(_device(model)),
    )  # fmt: skip
    run: Run = attack.perturb
    return run


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class Peer:
    """Another way to attack.

    Attributes:
        module: must be importable.
        package: what pip calls it.
        adapt: (model, request) -> run.
        arithmetic: that the model runs in: fp32, tf32 or bf16.
    """

    module: str
    package: str
    adapt: Callable[[nn.Module, Request], Run]
    arithmetic: str = "fp32"

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


ART, AUTOATTACK = ("art", "adversarial-robustness-toolbox"), ("pyautoattack", "pyautoattack")
PEERS = {
    "torchattacks": Peer("torchattacks", "torchattacks", _torchattacks),
    "foolbox": Peer("foolbox", "foolbox", _foolbox),
    "art": Peer(*ART, partial(_art, batch_size=None)),
    "art-defaults": Peer(*ART, partial(_art, batch_size=32)),
    "pyautoattack": Peer(*AUTOATTACK, partial(_pyautoattack, shrinks=True)),
    "pyautoattack-defaults": Peer(*AUTOATTACK, partial(_pyautoattack, shrinks=False)),
    "eager": Peer("torch", "torch", by_hand.fp32),
    "eager-tf32": Peer("torch", "torch", by_hand.in_tf32, "tf32"),
    "eager-bf16": Peer("torch", "torch", by_hand.bf16, "bf16"),
    "compile": Peer("torch", "torch", by_hand.compiled),
}


def adapted(name: str, model: nn.Module, request: Request) -> Run:
    """The attack of the library called `name`, ready for a batch.

    Raises:
        InputError: unknown name.
        PeerMissingError: it is not installed.
        NotOfferedError: it has no such attack.
    """
    one_of("against", name, PEERS)
    peer = PEERS[name]
    if not peer.installed:
        raise PeerMissingError(f"{name} is not installed; add it with: {how_to_add(peer.module, peer.package)}")
    return peer.adapt(model, request)
