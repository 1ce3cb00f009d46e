"""External attacks: how one that somebody else wrote is called and checked, and those of Foolbox and pyautoattack.

The packages are imported where an attack is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks import Attack
from afd.attacks.engine import evaluating
from afd.attacks.inputs import outside_inference
from afd.errors import InputError, InputTypeError
from afd.installation import require
from afd.nn.modes import local
from afd.nn.outputs import logits_of
from afd.ops import checks

BOUNDS = (0.0, 1.0)
AUTOATTACK_NORMS = ("Linf", "L2", "L1")  # that pyautoattack knows


def attacked_by(attack: Any, x: Tensor, y: Tensor, **settings: Any) -> Tensor:
    """What an attack makes of a batch, of which it is given a copy; found to have the form of images like x, detached.

    Args:
        attack: (x, y, ...) -> images.
        x: images [N, ...]; not modified.
        y: labels [N]; not modified.
        settings: `seed` and `first_sample`, which it is called with.

    Raises:
        InputTypeError, InputError: what it returned is not like x; or it does not take the settings.
    """
    _check_takes(attack, x, y, settings)
    x_adv = attack(x.clone(), y.clone(), **settings)
    check_returned(x_adv, x)
    found: Tensor = x_adv.detach()
    return found


def check_returned(x_adv: Any, x: Tensor) -> None:
    """Checks the form of what an attack made of images x [N, ...].

    Raises:
        InputTypeError: it is no plain tensor, or has another dtype than x.
        InputError: it has another shape or device than x.
    """
    if not isinstance(x_adv, Tensor):
        raise InputTypeError(f"the attack returned a {type(x_adv).__name__}; it must return images like x")
    if x_adv.layout is not torch.strided or x_adv.is_quantized:
        raise InputTypeError(f"the attack returned a tensor of layout {x_adv.layout} or quantised; it must be plain")
    checks.iterate("what the attack returned", x_adv, x)


def check_values(x_adv: Tensor) -> None:
    """Checks the values that an attack made; waits for the device.

    Raises:
        InputError: there are some out of [0, 1], or not finite.
    """
    wrong = int((~inside(x_adv)).sum())
    if wrong:
        raise InputError(
            f"the attack returned {wrong} of {len(x_adv)} images out of [0, 1] or not finite; it must return "
            "images like x"
        )


def inside(x: Tensor, bounds: tuple[float, float] = BOUNDS) -> Tensor:
    """Whether all values of an image lie within bounds, bool [N] from images [N, ...]; false for NaN."""
    return ((x >= bounds[0]) & (x <= bounds[1])).flatten(1).all(1)


def _check_takes(attack: Any, x: Tensor, y: Tensor, settings: dict[str, Any]) -> None:
    """Raises InputTypeError if an attack cannot be called with the settings, as far as its signature says."""
    try:
        signature = inspect.signature(attack)
    except (TypeError, ValueError):  # compiled code has none
        return
    try:
        signature.bind(x, y, **settings)
    except TypeError as error:
        kind = getattr(attack, "__name__", type(attack).__name__)
        wanted = ", ".join(f"{name}=..." for name in settings)
        raise InputTypeError(f"the attack {kind} cannot be called as attack(x, y, {wanted}): {error}") from error


class PlainLogits(nn.Module):
    """A classifier that returns its logits and nothing else, and leaves what it is shown as it was.

    Args:
        model: a classifier in evaluation mode, whose output holds logits [N, K] in any form of `afd.nn.outputs`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images [N, ...], float32 or wider."""
        logits = logits_of(self.model(x.clone()), x.shape[0])
        # libraries compute with them as with float32, and fail late where they are narrower
        return logits.float() if logits.element_size() < 4 else logits


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """PyTorch as it starts: float32 by default, on the CPU, with gradients, without autocast; then as it was.

    The default dtype is one for the whole process.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which allows gradients, too
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield


@contextmanager
def lent(model: nn.Module, x: Tensor) -> Iterator[PlainLogits]:
    """The model, for a library to attack on the device of x; draws from the global generators are taken back."""
    cuda = [x.device] if x.is_cuda else []
    with ordinary_modes(), evaluating(model), torch.random.fork_rng(cuda):
        yield PlainLogits(local(model))


# --- pyautoattack: the parts of AutoAttack that are not ours, and the whole as a reference ----------------------------


def fab_targeted(model: nn.Module, *, norm: str, eps: float, steps: int, n_target_classes: int, seed: int) -> Attack:
    """Targeted FAB (Croce & Hein 2020), one restart."""

    def build(plain: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack.fab_pt import FABAttack_PT

        return FABAttack_PT(
            plain, norm=norm, n_restarts=1, n_iter=steps, eps=eps, seed=seed, targeted=True, device=device,
            n_target_classes=n_target_classes,
        )  # fmt: skip

    return _pyautoattack("FAB-T", model, seed, build)


def square(model: nn.Module, *, norm: str, eps: float, queries: int, seed: int) -> Attack:
    """Square (Andriushchenko et al. 2020): random search, no gradients."""

    def build(plain: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack.square import SquareAttack

        return SquareAttack(
            plain, norm=norm, n_queries=queries, eps=eps, p_init=0.8, n_restarts=1, seed=seed, resc_schedule=False,
            device=device,
        )  # fmt: skip

    return _pyautoattack("Square", model, seed, build)


def autoattack(model: nn.Module, *, norm: str, eps: float, seed: int, parts: Sequence[str] | None = None) -> Attack:
    """AutoAttack's standard version, or some of its parts, all of it pyautoattack's; it needs ten classes."""

    def build(plain: PlainLogits, seed: int, device: torch.device) -> Any:
        from pyautoattack import AutoAttack

        auto = AutoAttack(plain, norm=norm, eps=eps, seed=seed, device=device)
        auto.attacks_to_run = auto.attacks_to_run if parts is None else list(parts)
        return _AutoAttack(auto)

    return _pyautoattack("AutoAttack's reference", model, seed, build)


class _AutoAttack:
    """AutoAttack with the method by which its parts are called."""

    def __init__(self, auto: Any) -> None:
        self.auto = auto

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = self.auto.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv


def _pyautoattack(
    name: str, model: nn.Module, default_seed: int, build: Callable[[PlainLogits, int, torch.device], Any]
) -> Attack:
    """An attack of pyautoattack as a call on a batch that leaves the global random state alone.

    Raises:
        ExtraMissingError: pyautoattack is not installed.
    """
    require("pyautoattack", name)

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        seed = (default_seed if seed is None else seed) + first_sample
        with lent(model, x) as plain:
            x, y = outside_inference(x.contiguous()), outside_inference(y)
            x_adv: Tensor = build(plain, seed, x.device).perturb(x, y)
        return x_adv.detach()

    return attack


# --- Foolbox: attacks that look for the nearest adversarial image -----------------------------------------------------


def ddn(model: nn.Module, *, steps: int, init_epsilon: float = 1.0, gamma: float = 0.05, seed: int = 0) -> Attack:
    """Decoupled direction and norm, L2 (Rony et al. 2019)."""
    return _foolbox("DDNAttack", "L2", model, seed, steps=steps, init_epsilon=init_epsilon, gamma=gamma)


def deepfool(model: nn.Module, *, steps: int, overshoot: float = 0.02, seed: int = 0) -> Attack:
    """DeepFool, Linf (Moosavi-Dezfooli et al. 2016)."""
    return _foolbox("LinfDeepFoolAttack", "Linf", model, seed, steps=steps, overshoot=overshoot)


def carlini_wagner(
    model: nn.Module,
    *,
    steps: int,
    binary_search_steps: int = 9,
    stepsize: float = 0.01,
    initial_const: float = 1e-3,
    seed: int = 0,
) -> Attack:
    """Carlini & Wagner, L2 (2017)."""
    return _foolbox(
        "L2CarliniWagnerAttack", "L2", model, seed, steps=steps, binary_search_steps=binary_search_steps,
        stepsize=stepsize, initial_const=initial_const,
    )  # fmt: skip


def _foolbox(name: str, norm: str, model: nn.Module, default_seed: int, **settings: Any) -> Attack:
    """Foolbox's attack of that class name, as a call on a batch.

    Raises:
        ExtraMissingError: Foolbox is not installed.
    """
    require("foolbox", f"{name} ({norm})")

    def attack(x: Tensor, y: Tensor, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        import foolbox

        # Foolbox draws from the global generator (DDN, where a gradient is zero): the draws depend on the batch only.
        with lent(model, x) as plain:
            torch.manual_seed((default_seed if seed is None else seed) + first_sample)
            wrapped = foolbox.PyTorchModel(plain, bounds=BOUNDS, device=x.device)
            x, y = outside_inference(x), outside_inference(y)
            found: Tensor = getattr(foolbox.attacks, name)(**settings).run(wrapped, x, foolbox.Misclassification(y))
        return found.detach().clamp(*BOUNDS)

    return attack
