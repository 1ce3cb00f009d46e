"""How methods attack: their attacks' settings, built once on the network that is trained and kept from step to step."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks import Attack, AttackFactory, engine
from afd.attacks.base import GradientAttack
from afd.attacks.external import attacked_by, check_values
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, InputTypeError
from afd.execution import AttackExecution
from afd.nn.modes import evaluating

KEPT = 8  # attacks of one step that stay built
LOOKS = 3  # batches in which the values of somebody else's attacked images are looked at


@dataclass(frozen=True)
class GivenAttack:
    """An attack that somebody gives as a function of the model, in the place of `AttackSettings`.

    Attributes:
        factory: model -> attack, e.g. ``PGD.partial(eps=0.3)``.
        argument: by which it was given, for messages.
    """

    factory: AttackFactory
    argument: str = "attack"

    def build(self, model: nn.Module, **_running: Any) -> Attack:
        """The attack on a model.

        Raises:
            InputTypeError: the function makes no attack.
        """
        attack: Any = self.factory(model)
        if isinstance(attack, type) or not callable(attack):
            told = attack.__name__ if isinstance(attack, type) else type(attack).__name__
            raise InputTypeError(f"{self.argument} made a {told} of the model; it must make an attack (x, y) -> images")
        if isinstance(attack, GradientAttack) and attack.copies > 1:
            raise InputError(
                f"{self.argument} made a Union with choice 'average'; give its settings, UnionSettings(...)"
            )
        return attack  # type: ignore[no-any-return]

    def __call__(self, model: Any, batch: Any, **given: Tensor | None) -> Tensor:
        """As of `AttackSettings`."""
        return AttackSettings.__call__(self, model, batch, **given)  # type: ignore[arg-type]


class Attacks:
    """The attacks of one step on the network that it trains.

    Args:
        network: that is attacked.
        precision: of the training passes, which attacks that name none have as well.

    Attributes:
        own_graphs: whether, on CUDA, attacks record and replay their own steps; not where whole steps are recorded.
    """

    def __init__(self, network: Any, precision: str) -> None:
        self.network, self.precision, self.own_graphs = network, precision, True
        self._built: OrderedDict[int, tuple[Any, Attack]] = OrderedDict()  # by the settings, as objects
        self._looked = 0
        self._given: Tensor | None = None
        self._found: list[Tensor] | None = None
        self._next = 0

    def __iter__(self) -> Iterator[Attack]:
        return (attack for _, attack in self._built.values())

    def of(self, settings: Any) -> Attack:
        """The attack that settings describe; it does not look at values, which would wait for the device."""
        known = self._built.get(id(settings))
        if known is None:
            attack = settings.build(self.network, precision=getattr(settings, "precision", None) or self.precision)
            if isinstance(attack, GradientAttack):
                attack.validate = False  # the loader's batches are checked, and the losses show what is wrong
            known = self._built[id(settings)] = settings, attack
            while len(self._built) > KEPT:
                self._built.popitem(last=False)
        self._built.move_to_end(id(settings))
        if isinstance(known[1], GradientAttack):
            known[1].own_graphs = self.own_graphs
        return known[1]

    def forget(self, settings: Any) -> None:
        """Lets go of the attack that settings describe, with the graphs that it holds."""
        self._built.pop(id(settings), None)

    def __call__(self, settings: Any, batch: Any, target: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """Attacked copies of a batch's images, [N, ...]; of `settings.copies` for each, [N * copies, ...]."""
        if self._given is not None:
            rows = getattr(batch, "rows", None)
            return self._given if rows is None else self._given[slice_of(rows, getattr(settings, "copies", 1))]
        return self.once(lambda: self._attacked(self.of(settings), batch, target, start))

    def eval_logits(self, batch: Any) -> Tensor:
        """Logits [N, K] of a batch's images in evaluation mode, without a graph: what aims an attack, say."""
        return self.once(lambda: self._logits(batch.x))

    def _logits(self, x: Tensor) -> Tensor:
        execution = AttackExecution(self.precision)
        with evaluating(self.network), torch.no_grad(), execution.autocast(x.device):
            return engine.logits(self.network, execution.laid_out(x, self.network))[0]

    def once(self, find: Callable[[], Tensor]) -> Tensor:
        """What is found, such as attacked images, or was found at this place when the same passes were made before."""
        if self._found is not None and self._next < len(self._found):
            self._next += 1
            return self._found[self._next - 1]
        found = find()
        if self._found is not None:
            self._found.append(found)
            self._next += 1
        return found

    def _attacked(self, attack: Attack, batch: Any, target: Tensor | None, start: Tensor | None) -> Tensor:
        where = {"seed": batch.seed, "first_sample": batch.first_sample}
        if isinstance(attack, GradientAttack):
            return attack(batch.x, batch.y, target=target, start=start, **where)
        if target is not None or start is not None or batch.y is None:
            raise InputError(
                f"the attack is a {type(attack).__name__}, none of those in afd.attacks; this method gives its attack "
                "a target, a start or no labels, which only those take"
            )
        x_adv = attacked_by(attack, batch.x, batch.y, **where)
        if self._looked < LOOKS:
            self._looked += 1
            check_values(x_adv)
        return x_adv

    @contextmanager
    def given(self, x_adv: Tensor | None) -> Iterator[None]:
        """Inside, attacked images [N * copies, ...] of the whole batch are these, unless that is None."""
        self._given = x_adv
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def found_once(self) -> Iterator[None]:
        """Inside, what is attacked again after `again` is not: it is what was found the first time, in this order."""
        if self._found is not None:  # within another such context
            yield
            return
        self._found, self._next = [], 0
        try:
            yield
        finally:
            self._found = None

    def again(self) -> None:
        """The same passes over the same batch begin."""
        self._next = 0


def slice_of(rows: slice, copies: int) -> slice:
    """The rows of images of which there are several copies each, beside each other."""
    return slice(rows.start * copies, rows.stop * copies)


def check_attacks(method: Any) -> None:
    """Checks a method's attacks, as far as it has any.

    Raises:
        InputTypeError: one is no settings of an attack.
        InputError: one makes several images of each, and the method, or validation, takes one.
    """
    allowed = {"attack": "", "validation_attack": ", 'pgd-N' or None"}
    for name in (field.name for field in fields(method) if field.name in allowed):
        value = getattr(method, name)
        if isinstance(value, AttackSettings) and value.copies > 1 and (allowed[name] or not method.takes_copies):
            taker = "validation" if allowed[name] else type(method).__name__
            raise InputError(
                f"{name} is a union with choice 'average', which makes {value.copies} images of each; {taker} takes "
                "one, so 'worst' and 'random' are allowed"
            )
        if isinstance(value, AttackSettings | GivenAttack) or (allowed[name] and isinstance(value, str | None)):
            continue
        told = value.__name__ if isinstance(value, type) else repr(value) if value is None else type(value).__name__
        hint = " (PGD.partial(...) is PGDSettings(...))" if callable(value) else ""
        raise InputTypeError(
            f"{name} is {told}; a method is given settings of an attack, such as PGDSettings(eps=0.1)"
            f"{allowed[name]}{hint}"
        )


def judge_of(validation: AttackSettings | GivenAttack | str | None, attack: Any, seed: int) -> Any:
    """The attack that a method is validated by: ``pgd-20`` is PGD of 20 steps in the ball of its attack.

    Raises:
        InputError: it is of another form, or the attack has no ball.
    """
    if not isinstance(validation, str):
        return validation
    named = re.fullmatch(r"pgd-(\d+)", validation)
    if named is None:
        raise InputError(
            f"validation_attack is {validation!r}; allowed are 'pgd-N' for N steps in the ball of the attack, settings "
            "of an attack, and None"
        )
    if not isinstance(attack, AttackSettings):
        told = "none" if attack is None else f"a {type(attack).__name__}"
        raise InputError(f"validation_attack is {validation!r}, in the ball of the method's attack, which is {told}")
    return attack.pgd(int(named[1]), seed)
