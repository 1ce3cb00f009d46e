"""Other libraries' attacks behind one shape: (model, settings) -> a call that attacks a batch, at equal settings.

A peer is imported when asked for. One that is not installed is named with the line that adds it; none is a dependency.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afd.errors import AfdError, one_of

Run = Callable[[Tensor, Tensor], Tensor]


class PeerMissingError(AfdError):
    """A peer library is not installed; the message says how to add it."""


@dataclass(frozen=True)
class Settings:
    """What every library is asked for: L∞ PGD from a random start."""

    eps: float
    alpha: float
    steps: int


@dataclass(frozen=True)
class Peer:
    """A library: the module that must be importable, what pip calls it, and its PGD."""

    module: str
    package: str
    pgd: Callable[[nn.Module, Settings], Run]


def _torchattacks(model: nn.Module, settings: Settings) -> Run:
    import torchattacks

    attack = torchattacks.PGD(model, eps=settings.eps, alpha=settings.alpha, steps=settings.steps, random_start=True)
    run: Run = attack
    return run


def _foolbox(model: nn.Module, settings: Settings) -> Run:
    import foolbox

    device = next(model.parameters()).device
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=settings.alpha, steps=settings.steps, random_start=True)

    def run(x: Tensor, y: Tensor) -> Tensor:
        clipped: Tensor = attack(wrapped, x, y, epsilons=settings.eps)[1]
        return clipped

    return run


def _art(model: nn.Module, settings: Settings) -> Run:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            classes = model(x[:1]).shape[1]
        estimator = PyTorchClassifier(
            model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, clip_values=(0.0, 1.0), device_type=x.device.type
        )
        attack = ProjectedGradientDescentPyTorch(
            estimator,
            eps=settings.eps,
            eps_step=settings.alpha,
            max_iter=settings.steps,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    return run


PEERS = {
    "torchattacks": Peer("torchattacks", "torchattacks", _torchattacks),
    "foolbox": Peer("foolbox", "foolbox", _foolbox),
    "art": Peer("art", "adversarial-robustness-toolbox", _art),
}


def peer_pgd(name: str, model: nn.Module, settings: Settings) -> Run:
    """The PGD of the library called `name`, ready to attack a batch.

    Raises:
        InputError: unknown name.
        PeerMissingError: it is not installed.
    """
    one_of("against", name, PEERS)
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        raise PeerMissingError(f"{name} is not installed; add it with: pip install {peer.package}")
    return peer.pgd(model, settings)
