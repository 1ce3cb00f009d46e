"""Baselines: attacks of other libraries and by hand in plain PyTorch, and the discriminator of torch's own layers.

Attacks stand behind one shape, (model, request) -> a call that attacks a batch, at equal settings. A library is
imported when asked for. One that is not installed is named with the line that adds it; none is a dependency. Each runs
as its documentation recommends. Where what it does by default is slower or weaker than that, its defaults are a
baseline of their own: ART goes through a batch 32 images at a time, and pyautoattack's Auto-PGD does without the
shrinking radius that its standard version has in L1.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks import APGD, PGD, Norm
from afd.bench import eager
from afd.bench.metering import tf32
from afd.errors import AfdError, one_of
from afd.execution import channels_last
from afd.installation import how_to_add

Run = Callable[[Tensor, Tensor], Tensor]
ATTACKS = ("pgd", "apgd")
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")


class BaselineMissingError(AfdError):
    """A library is not installed; the message says how to add it."""


class NotOfferedError(AfdError):
    """A library has no such attack, or none on this device."""


@dataclass(frozen=True)
class Request:
    """An attack at given settings, from a random start."""

    attack: str  # "pgd" or "apgd" (on cross-entropy)
    norm: Norm
    eps: float
    alpha: float  # step of PGD
    steps: int

    @property
    def name(self) -> str:
        """As in PGD-10 Linf."""
        return f"{self.attack.upper()}-{self.steps} {self.norm}"

    @property
    def passes(self) -> int:
        """Forwards and input gradients that it takes: Auto-PGD looks at its start too."""
        return self.steps + (self.attack == "apgd")

    def only(self, library: str, offered: Mapping[str, tuple[str, ...]]) -> None:
        """Raises NotOfferedError unless `offered`, norms by attack, has this one."""
        if self.norm not in offered.get(self.attack, ()):
            raise NotOfferedError(f"{library} offers no {self.attack.upper()} in {self.norm}")


def ours(model: nn.Module, request: Request, precision: str = "fp32") -> Run:
    """afd's own."""
    if request.attack == "apgd":
        return APGD(model, norm=request.norm, eps=request.eps, steps=request.steps, precision=precision)
    return PGD(model, norm=request.norm, eps=request.eps, alpha=request.alpha, steps=request.steps, precision=precision)


# --- Other libraries -------------------------------------------------------------------------------------------------


def _torchattacks(model: nn.Module, request: Request) -> Run:
    import torchattacks

    request.only("torchattacks", dict.fromkeys(ATTACKS, ("Linf", "L2")))
    settings = {"eps": request.eps, "steps": request.steps}
    apgd = partial(torchattacks.APGD, norm=request.norm, n_restarts=1)
    pgd = partial(torchattacks.PGDL2 if request.norm == "L2" else torchattacks.PGD, alpha=request.alpha)
    run: Run = apgd(model, **settings) if request.attack == "apgd" else pgd(model, random_start=True, **settings)
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
            estimator, norm={"Linf": "inf", "L2": 2, "L1": 1}[request.norm], eps=request.eps, eps_step=request.alpha,
            max_iter=request.steps, num_random_init=1, batch_size=batch_size or len(x), verbose=False,
        )  # fmt: skip
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


def _eager(model: nn.Module, request: Request, arithmetic: str) -> Run:
    """PGD by hand in plain PyTorch: whole batch, nothing folded, nothing replayed.

    With the model in bfloat16 (by autocast) it is in the memory layout that convolutions like, too.
    """
    if arithmetic == "tf32" and _device(model).type != "cuda":
        raise NotOfferedError("eager-tf32 needs --device cuda")
    request.only("a loop by hand", {"pgd": NORMS})
    bf16 = arithmetic == "bf16"
    if bf16:
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(x: Tensor, y: Tensor) -> Tensor:
        x = channels_last(x) if bf16 else x
        x_adv = x + request.eps * (2 * torch.rand_like(x) - 1) if request.norm == "Linf" else x.clone()
        x_adv = eager.project(x_adv, x, request.eps, request.norm)
        with tf32(arithmetic == "tf32"), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            for _ in range(request.steps):
                x_adv.requires_grad_()
                (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
                x_adv = eager.pgd_step(x_adv.detach(), x, grad, request.alpha, request.eps, request.norm)
        return x_adv

    return run


def _compiled(model: nn.Module, request: Request) -> Run:
    """With the model under torch.compile; where that has no compiler, the first call says so."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    plain = _eager(torch.compile(model), request, "fp32")  # type: ignore[arg-type]

    def run(x: Tensor, y: Tensor) -> Tensor:
        try:
            return plain(x, y)
        except TorchDynamoException as error:
            raise NotOfferedError(f"torch.compile fails here: {str(error).splitlines()[0]}") from error

    return run


@dataclass(frozen=True)
class Baseline:
    """Another way to attack."""

    module: str  # must be importable
    package: str  # what pip calls it
    adapt: Callable[[nn.Module, Request], Run]
    arithmetic: str = "fp32"  # that the model runs in: fp32, tf32 or bf16

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


BASELINES = {
    "torchattacks": Baseline("torchattacks", "torchattacks", _torchattacks),
    "foolbox": Baseline("foolbox", "foolbox", _foolbox),
    "art": Baseline("art", "adversarial-robustness-toolbox", partial(_art, batch_size=None)),
    "art-defaults": Baseline("art", "adversarial-robustness-toolbox", partial(_art, batch_size=32)),
    "pyautoattack": Baseline("pyautoattack", "pyautoattack", partial(_pyautoattack, shrinks=True)),
    "pyautoattack-defaults": Baseline("pyautoattack", "pyautoattack", partial(_pyautoattack, shrinks=False)),
    "eager": Baseline("torch", "torch", partial(_eager, arithmetic="fp32")),
    "eager-tf32": Baseline("torch", "torch", partial(_eager, arithmetic="tf32"), "tf32"),
    "eager-bf16": Baseline("torch", "torch", partial(_eager, arithmetic="bf16"), "bf16"),
    "compile": Baseline("torch", "torch", _compiled),
}


def adapted(name: str, model: nn.Module, request: Request) -> Run:
    """The attack of the library called `name`; a BaselineMissingError or NotOfferedError where it cannot be had."""
    one_of("against", name, BASELINES)
    baseline = BASELINES[name]
    if not baseline.installed:
        add = how_to_add(baseline.module, baseline.package)
        raise BaselineMissingError(f"{name} is not installed; add it with: {add}")
    return baseline.adapt(model, request)


# --- The discriminator ------------------------------------------------------------------------------------------------


class TorchDiscriminator(nn.Module):
    """The projection discriminator of torch's own layers, each under `norm`."""

    def __init__(self, width: int, classes: int, norm: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(norm(nn.Linear(width, width)) for _ in range(2))
        self.w = norm(nn.Linear(width, 1))
        self.e = norm(nn.Embedding(classes, width))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Scores [N] of z [N, width] and y [N]."""
        h = z
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        score: Tensor = self.w(h).squeeze(1) + torch.sum(self.e(y) * h, dim=1)
        return score
