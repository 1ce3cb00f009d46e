"""Numbers of a method, or of its attack, that change in a run: ramps to their own value, and remedies of a rollback.

As do the radius in DAJAT and XCiT's adversarial training, the steps of the attack in DAJAT, and weights such as β.
Numbers lie on the device, so that a recorded step follows them without another recording; each number of attack steps
is a method of its own, made once, so that a recorded step is captured once for each of them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from torch import Tensor

from afd.attacks import FGSMSettings, PGDSettings
from afd.attacks import settings as of_attacks
from afd.attacks.settings import STEP_OF, AttackSettings, step_size
from afd.errors import InputError, InputTypeError, fits, fraction, number
from afd.methods.base import Method, Step, may_change
from afd.methods.supervised import Wrapper

STEPS = "attack.steps"
SIZES = tuple(f"attack.{name}" for name in of_attacks.SIZES)  # that grow in an ε warm-up


@dataclass(frozen=True)
class Ramp:
    """The way of a number from `first` to the method's own value.

    In the step after d ones it is first + (own - first) * min(1, (d + 1) / steps), rounded where it counts something.

    Attributes:
        first: where it begins.
        epochs: that it takes; fractions are allowed, and 0 has it at its own value from the beginning.

    Raises:
        InputTypeError: one is no number.
        InputError: one is not finite, or epochs are negative.
    """

    first: float
    epochs: float

    def __post_init__(self) -> None:
        number("epochs of a ramp", self.epochs, 0.0)
        number("first of a ramp", self.first, -math.inf)
        if not math.isfinite(self.first):
            raise InputError(f"first of a ramp is {self.first}; it must be a finite number")


def ramps_of(words: Iterable[str]) -> dict[str, Ramp]:
    """Ramps written as NAME=FIRST:EPOCHS, such as ``beta=0:5`` or ``attack.eps=1/255:2.5``.

    Raises:
        InputError: a word is of another form, or two are of one number.
    """
    found: dict[str, Ramp] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        name = name.replace("-", "_")
        first, colon, epochs = rest.partition(":")
        try:
            values = [fraction(first), fraction(epochs)]
        except (ValueError, ZeroDivisionError):
            values = []
        if not (name and equals and colon and values):
            raise InputError(f"ramps has {word!r}; a ramp is written NAME=FIRST:EPOCHS, such as beta=0:5")
        if name in found:
            raise InputError(f"ramps names {name} twice; a number has one ramp")
        found[name] = Ramp(*values)
    return found


def check_ramps(method: Method, ramps: Any, eps_warmup: float = 0.0) -> None:
    """Finds that a method's numbers can go along ramps, which asks its own checks about where they begin.

    Args:
        method: whose numbers they are.
        ramps: by name: of one of its settings, or ``attack.`` and one of its attack's.
        eps_warmup: epochs in which eps and alpha grow already.

    Raises:
        InputTypeError: ramps are no ramps by name.
        InputError: there is no such number, or none that may change in a run, or it may not begin there.
    """
    if not isinstance(ramps, Mapping) or not all(isinstance(one, Ramp) for one in ramps.values()):
        raise InputTypeError('ramps must be ramps by the name of a number, such as {"beta": Ramp(first=0, epochs=5)}')
    for name, ramp in ramps.items():
        if _own(method, name) == ramp.first:
            raise InputError(f"ramps has {name}, which begins at its own value, {ramp.first:g}; it would never change")
        own = method.attack is None and f"attack.{name}" in SIZES
        if eps_warmup and (own or name in SIZES):
            raise InputError(f"ramps has {name}, which eps_warmup={eps_warmup:g} lets grow already; name one of them")
        first: float = ramp.first
        if name == STEPS:
            if not float(first).is_integer():
                raise InputError(f"ramps has {name}, which begins at {first:g}; it must be a whole number")
            first = int(first)
        try:
            _exchanged(method, name.split("."), first, checked=True)
        except InputError as error:
            raise InputError(f"ramps has {name}, which cannot begin there: {error}") from error


def _own(method: Method, name: str) -> Any:
    """The value that a number of a method has, and a ramp leads to."""
    path = name.split(".")
    holder: Any = _holder(method, path[0])
    if holder is None or len(path) > 2 or (len(path) == 2 and path[0] != "attack"):
        raise InputError(f"ramps has {name!r}; {type(method).__name__} has no such number: {_names(method)}")
    if len(path) == 1 and path[0] in getattr(holder, "of_optimizers", ()):
        raise InputError(f"ramps has {name}, which is the optimizers' own; lr_warmup and schedule change their rates")
    if len(path) == 2:
        holder = holder.attack
        if not isinstance(holder, AttackSettings):
            raise InputError(f"ramps has {name}, but the attack is a {type(holder).__name__}, which has no settings")
        if path[1] not in {one.name for one in dataclasses.fields(holder)}:
            raise InputError(f"ramps has {name!r}; {type(method).__name__} has no such number: {_names(method)}")
        holder = holder.resolved()
    value, hint = getattr(holder, path[-1]), get_type_hints(type(holder))[path[-1]]
    if isinstance(value, bool) or not (isinstance(value, int | float | Tensor | None) and fits(1, hint)):
        raise InputError(f"ramps has {name}, which is {value!r}, no number that may change")
    if not fits(0.5, hint) and name != STEPS:
        raise InputError(f"ramps has {name}, a whole number; of these only {STEPS} may change in a run")
    if name != STEPS and not may_change(holder, path[-1]):
        raise InputError(f"ramps has {name}, a number that the host reads in each step; it may not change in a run")
    if value is None:
        raise InputError(f"ramps has {name}, which is None: there is no value to go to")
    return value


def _names(method: Method) -> str:
    """The numbers of a method and its attack that there are, for messages."""
    found = [name for one in _around(method) for name in _numbers(one)]
    attack = method.attack
    return ", ".join([*found, *(f"attack.{name}" for name in _numbers(attack))]) or "it has none"


def _numbers(settings: Any) -> Iterator[str]:
    if not dataclasses.is_dataclass(settings):
        return
    for one in dataclasses.fields(settings):
        value = getattr(settings, one.name)
        plain = isinstance(value, float | Tensor) or (one.name == "steps" and isinstance(value, int))
        if plain and one.name not in getattr(settings, "of_optimizers", ()):
            yield one.name


def _around(method: Any) -> Iterator[Any]:
    """A method, and those inside of it where it is a wrapper."""
    yield method
    if isinstance(getattr(method, "method", None), Method):
        yield from _around(method.method)


def _holder(method: Method, name: str) -> Any:
    """The method or wrapper that has a setting of its own by that name."""
    named = (one for one in _around(method) if name in {field.name for field in dataclasses.fields(one)})
    return next(named, None)


def _exchanged(settings: Any, path: list[str], value: Any, *, checked: bool) -> Any:
    """Settings with another value in one place; `checked`: by their own checks."""
    name, *rest = path
    own = name in {one.name for one in dataclasses.fields(settings)}
    if not own:
        name, rest = "method", path
    new = _exchanged(getattr(settings, name), rest, value, checked=checked) if rest else value
    if checked:
        return dataclasses.replace(settings, **{name: new})
    twin = copy.copy(settings)
    object.__setattr__(twin, name, new)
    return twin


class Ramps:
    """The ramps of a run at work on a step.

    Args:
        method: whose numbers they are; as `check_ramps` found them.
        step: of the method, as it goes on with numbers that others have made live.
        ramps: by name.
        steps: in an epoch.

    Raises:
        InputError, InputTypeError: as of `check_ramps`.
    """

    def __init__(self, method: Method, step: Step, ramps: Mapping[str, Ramp], steps: int) -> None:
        check_ramps(method, ramps)
        self.step, self._arrived = step, False
        self._fill: list[Callable[[int], object]] = []
        self.ramps = {name: (ramp, _own(method, name), round(ramp.epochs * steps)) for name, ramp in ramps.items()}
        self._settle_alpha(method)
        for name in self.ramps:
            if name != STEPS:
                self._fill.append(self._filling(name, step.live(name, self.ramps[name][1])))
        self._by_steps: dict[int, Method] = {}  # methods, made once
        self._whole = step.method

    def _settle_alpha(self, method: Method) -> None:
        """A step size that hangs on steps, and perhaps on eps, stays that of the attack with all its steps."""
        if STEPS in self.ramps:
            for eps, alpha in STEP_OF.items():
                if getattr(method.attack, eps, None) is not None and f"attack.{alpha}" not in self.ramps:
                    self._settle(method.attack, eps, alpha)

    def _settle(self, attack: Any, eps: str, alpha: str) -> None:
        if getattr(self.step.method.attack, alpha, 0.0) is not None:
            return
        full = step_size(None, getattr(attack, eps), attack.steps)
        if f"attack.{eps}" not in self.ramps:
            self.step.adopt(_exchanged(self.step.method, ["attack", alpha], full, checked=False))
            return
        held = self.step.live(f"attack.{alpha}", full)
        share = step_size(None, 1.0, attack.steps)
        self._fill.append(lambda done: _put(held, share * self.value(f"attack.{eps}", done)))

    def _filling(self, name: str, held: Tensor) -> Callable[[int], object]:
        return lambda done: _put(held, self.value(name, done))

    def value(self, name: str, done: int) -> Any:
        """What a number is in the step after `done` ones."""
        ramp, own, steps = self.ramps[name]
        share = min(1.0, (done + 1) / steps) if steps else 1.0
        if share == 1:
            return own
        value = ramp.first + (own - ramp.first) * share
        return round(value) if name == STEPS else value

    def at(self, done: int) -> None:
        """Puts all numbers where they are in the step after `done` ones."""
        arrived = all(done + 1 >= steps for _, _, steps in self.ramps.values())
        if not (arrived and self._arrived):
            for fill in self._fill:
                fill(done)
        self._arrived = arrived
        if STEPS in self.ramps:
            method = self._with(self.value(STEPS, done))
            if method is not self.step.method:
                self.step.attacks.forget(self.step.method.attack)  # none comes again
                self.step.adopt(method)

    def _with(self, steps: int) -> Method:
        if steps not in self._by_steps:
            self._by_steps[steps] = _exchanged(self._whole, ["attack", "steps"], steps, checked=False)
        return self._by_steps[steps]


def _put(held: Tensor, value: float | Tensor) -> None:
    held.copy_(value) if isinstance(value, Tensor) else held.fill_(value)


# --- What a run that has gone back goes on with ---------------------------------------------------------------------


def remedied(method: Method, remedies: Sequence[str]) -> tuple[Method, float]:
    """A method with a stronger attack for each "attack" among the remedies, and a factor of its rates for "rates"."""
    for remedy in remedies:
        method = with_stronger_attack(method) if remedy == "attack" else method
    return method, 0.5 ** sum(remedy == "rates" for remedy in remedies)


def told_of(before: Method, after: Method, rates: float) -> str:
    """What a remedy has changed, in words."""
    steps, lengths = zip(*map(_attacking, (before, after)), strict=True)
    changes = (("steps", *steps), ("alpha", *lengths))
    changed = [f"attack.{name} {one} → {other}" for name, one, other in changes if one != other]
    return ", ".join(changed) or f"learning rates times {rates:g}"


def _attacking(method: Any) -> tuple[str, str]:
    """Steps of a method's attack, and their length."""
    by_itself = method.attack is None
    held: Any = getattr(method, "core", method) if by_itself else method.attack
    alpha, of_one = getattr(held, "alpha", None), by_itself or isinstance(held, FGSMSettings)
    told = getattr(held, "eps", None) if alpha is None and of_one else alpha
    return str(getattr(held, "steps", 1)), str(told)


def with_stronger_attack(method: Any) -> Any:
    """A method whose attack takes twice the steps, of half the length; one that attacks by itself, half the step.

    The same object where there is nothing to be changed.
    """
    if isinstance(method, Wrapper):
        inside = with_stronger_attack(method.method)
        return method if inside is method.method else dataclasses.replace(method, method=inside)
    if not hasattr(method, "__dataclass_fields__"):  # a class of somebody's own
        return method
    attack: Any = method.attack
    if attack is None and hasattr(method, "eps") and hasattr(method, "alpha"):
        return dataclasses.replace(method, alpha=(method.eps if method.alpha is None else method.alpha) / 2)
    if isinstance(attack, FGSMSettings):
        attack = PGDSettings(**dict(attack), steps=1, alpha=attack.eps, random_start=False)
    if not isinstance(attack, AttackSettings) or not hasattr(attack, "steps"):
        return method
    changes: dict[str, Any] = {"steps": max(1, 2 * attack.steps)}
    lengths = {name: value for name, value in dict(attack).items() if name.startswith("alpha")}  # in each ball
    changes |= {name: value / 2 for name, value in lengths.items() if value is not None}
    return dataclasses.replace(method, attack=dataclasses.replace(attack, **changes))
