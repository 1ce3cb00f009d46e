"""The players' optimizers: the paper's SGD, its Adam variant, or the user's own, one factory a player."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from afd.errors import InputError, InputTypeError, number, whole
from afd.methods.groups import groups_of

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS = ("sgd", "adam", "adamw")
OF_MODEL = frozenset({"task", "features"})  # players that are the model
RATES = {"adam": {"lr": 1e-3}, "adamw": {"lr": 1e-3, "weight_decay": 0.05}}
RECORDABLE = (SGD, Adam, AdamW)  # whose fused steps read their rate, and count, on the device


def optimizer_for(
    settings: Any,
    player: str,
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """The optimizer of a player: the user's own, else that of the settings.

    Args:
        settings: of the update, those of `afd.methods.supervised.Optimized`.
        player: whose it is; the rates of the layers differ in players that are the model only.
        module: whose trainable parameters it moves.
        lr: learning rate.
        weight_decay: of the parameters that decay.
        betas: of Adam.

    Raises:
        InputError: all parameters are frozen, or `layer_decay` is set and there are no layers in a chain.
    """
    groups: list[Any] = trainable(module)
    if player in settings.optimizers:
        own: Optimizer = settings.optimizers[player](groups)
        return own
    layer_decay = settings.layer_decay if player in OF_MODEL else None
    decay_norms = settings.decay_norms or not weight_decay
    if layer_decay is not None or not decay_norms:
        groups = groups_of(module, lr=lr, decay_norms=decay_norms, layer_decay=layer_decay)
    if settings.optimizer == "sgd":
        return SGD(groups, lr, settings.momentum, weight_decay=weight_decay, nesterov=settings.nesterov)
    kind = AdamW if settings.optimizer == "adamw" else Adam
    return kind(groups, lr, betas=betas, weight_decay=weight_decay)


def check_factories(
    factories: Mapping[str, OptimizerFactory], players: Iterable[str], layer_decay: float | None = None
) -> None:
    """Raises InputError unless every factory is for one of `players`, and none for rates that `layer_decay` sets."""
    names = tuple(players)
    for name in factories:
        if name not in names:
            raise InputError(f"optimizers has the key {name!r}; allowed are {', '.join(names)}")
        if not callable(factories[name]):
            told = type(factories[name]).__name__
            raise InputTypeError(f"optimizers has a {told} for {name!r}; it must be a function of the parameters")
        if layer_decay is not None and name in OF_MODEL:
            raise InputError(
                f"layer_decay is {layer_decay}, and optimizers has the key {name!r}; an optimizer of your own sets its "
                "rates itself"
            )


def check_update(
    *,
    momentum: float,
    nesterov: str | bool,
    weight_decay: float,
    label_smoothing: float,
    clip: float | None,
    micro_batches: int,
    layer_decay: float | None,
) -> None:
    """Raises InputError unless the settings of an update that all methods share are in range.

    `nesterov` is the name of the optimizer, where its momentum is to be Nesterov's.
    """
    number("momentum", momentum, 0.0)
    if momentum >= 1:
        raise InputError(f"momentum is {momentum}; it must be below 1")
    if nesterov and (nesterov != "sgd" or not momentum):
        told = f"optimizer {nesterov!r}" if nesterov != "sgd" else "momentum 0"
        raise InputError(f"nesterov is True with {told}; it is a kind of SGD's momentum")
    number("weight_decay", weight_decay, 0.0)
    number("label_smoothing", label_smoothing, 0.0)
    if label_smoothing >= 1:
        raise InputError(f"label_smoothing is {label_smoothing}; it must be below 1")
    if clip is not None:
        number("clip", clip, 1e-12)
    whole("micro_batches", micro_batches, 1)
    if layer_decay is not None:
        number("layer_decay", layer_decay, 1e-12)
        if layer_decay > 1:
            raise InputError(f"layer_decay is {layer_decay}; it must be in (0, 1]")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that are not frozen.

    Raises:
        InputError: all are.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError("no parameter of the model is trainable; set requires_grad of those that training may change")
    return parameters


def reaching(loss: Tensor) -> Tensor:
    """The loss, found to hang on a trainable parameter.

    Raises:
        InputError: it does not.
    """
    if not loss.requires_grad:
        raise InputError("no trainable parameter of the model has a part in the logits; the loss has nothing to train")
    return loss


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters that an optimizer moves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_step(optimizer: Optimizer, clip: float | None) -> None:
    """One step on the gradients as they stand, their joint norm cut to `clip` first; then they are gone."""
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), clip)
    optimizer.step()
    optimizer.zero_grad()


def make_recordable(optimizer: Optimizer, device: torch.device) -> None:
    """Puts what changes from step to step on the device, where a recorded step finds it: learning rates and counts.

    Only torch's fused steps read a rate there (the others ask the host for its value, or keep it as it was).

    Args:
        optimizer: one of `RECORDABLE`, fresh or after some steps.
        device: of its parameters.
    """
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)
        group["fused"], group["foreach"] = True, False
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full((), float(state["step"]), dtype=torch.float32, device=device)


@contextmanager
def being_recorded(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Tells the optimizers that a graph is recorded: some refuse otherwise, and warn if told so at other times."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    try:
        for group in groups:
            group["capturable"] = True
        yield
    finally:
        for group, capturable in zip(groups, before, strict=True):
            group["capturable"] = capturable


class GradientNorms:
    """The largest norm of an optimizer's gradients, kept on the device: nobody waits for it in a step.

    NaN stays. It is an optimizer's hook, and so sees what a recorded step does, too.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # whoever builds it may be in it
            self.largest = torch.zeros((), dtype=torch.float32, device=device)

    @contextmanager
    def of(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, it looks at each step of the optimizer."""
        handle = optimizer.register_step_pre_hook(self._look)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _look(self, optimizer: Optimizer, _args: Any, _settings: Any) -> None:
        held = (one.grad for group in optimizer.param_groups for one in group["params"])
        grads = [one for one in held if one is not None and one.layout is torch.strided]
        if grads:
            norms: list[Tensor] = list(torch._foreach_norm(grads))
            if len({(one.device, one.dtype) for one in norms}) > 1:
                norms = [one.to(self.largest) for one in norms]
            norm = torch.linalg.vector_norm(torch.stack(norms)).to(self.largest)
            torch.maximum(self.largest, norm, out=self.largest)

    def read(self) -> float:
        """The largest since the last reading; waits for the device."""
        found = float(self.largest)
        self.largest.zero_()
        return found


class Gradients:
    """A second set of `.grad` for some parameters, so that two losses can gather gradients apart."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.others: list[Tensor | None] = [None] * len(parameters)

    def forget(self) -> None:
        """Lets go of the other set, which a step that broke off may have left."""
        self.others = [None] * len(self.parameters)

    def swap(self) -> None:
        """Exchanges the parameters' `.grad` with the other set."""
        for i, parameter in enumerate(self.parameters):
            parameter.grad, self.others[i] = self.others[i], parameter.grad
