"""State_dicts of all that a trainer trains, in one dict; and put back to where that was.

What a step remembers from batch to batch (`afd.methods.Step.memory`) is each process's own, the rest alike in all.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError
from afd.deprecated import with_new_keys
from afd.methods import Step
from afd.methods.inputs import device_of
from afd.nn.classifier import unwrapped
from afd.training.schedules import Average
from afd.training.settings import describe

UNCOMPARED = {"lr", "params", "foreach", "fused", "capturable"}  # the schedule's, or how it is computed


def state_dicts(network: nn.Module, average: Average | None, step: Step) -> dict[str, Any]:
    """State_dicts of the model, the average of its weights, the players and the optimizers."""
    kept = None
    if average is not None:
        weights = unwrapped(average.module).state_dict()
        kept = {"weights": weights, "steps": average.n_averaged, "wide": average.wide}
    return {
        "model": unwrapped(network).state_dict(),
        "average": kept,
        "players": {name: player.state_dict() for name, player in step.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in step.optimizers.items()},
    }


def load_state_dicts(
    source: str, state: Mapping[str, Any], network: nn.Module, average: Average | None, step: Step
) -> None:
    """Puts model, average, players and optimizers where `state_dicts` found them.

    Raises:
        CheckpointError: another run's step has left it; the message names the `source`, and what differs.
    """
    model = unwrapped(network)
    for name, tensor in model.state_dict().items():  # before anything is loaded: torch would load what fits
        given = state["model"].get(name)
        if isinstance(tensor, Tensor) and isinstance(given, Tensor) and given.shape != tensor.shape:
            raise CheckpointError(
                f"{source} is of another model: {name} is {list(given.shape)} there and {list(tensor.shape)} here"
            )
    model.load_state_dict(state["model"])
    if average is not None:
        kept = with_new_keys(state["average"])
        unwrapped(average.module).load_state_dict(kept["weights"])
        average.n_averaged.copy_(kept["steps"])
        for name, wide in kept.get("wide", {}).items():
            average.wide[name].copy_(wide)
    if state["players"].keys() != step.players.keys():
        told = [", ".join(sorted(names)) or "none" for names in (state["players"], step.players)]
        raise CheckpointError(
            f"{source} holds the players {told[0]}, and the method's step has {told[1]}; what a step keeps from batch "
            "to batch is a module in its players from when it is built"
        )
    for name, player in step.players.items():
        player.load_state_dict(state["players"][name])
    for name, optimizer in step.optimizers.items():
        _check_alike(
            f"{source} is of another run: optimizers.{name}", state["optimizers"][name], optimizer.state_dict()
        )
        # a copy: torch keeps the tensors that it is given, which then are those of whoever gave them, too
        optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))


def memory_of(step: Step, apart: bool) -> dict[str, Tensor]:
    """What this process's step remembers; `apart`: on the CPU, to be handed to other processes."""
    return {name: one.detach().cpu() if apart else one.detach() for name, one in step.memory.items()}


def load_memory(step: Step, kept: Mapping[str, Tensor]) -> None:
    """Has a step remember copies of tensors of any shape, on its model's device, and nothing else."""
    device = device_of(step.network)
    step.memory.clear()
    step.memory.update({name: one.to(device, copy=True) for name, one in kept.items()})


@torch.no_grad()
def finite(model: nn.Module, players: Mapping[str, nn.Module]) -> bool:
    """Whether all weights are; waits for the device once."""
    everything = (p for module in (model, *players.values()) for p in module.parameters())
    weights: list[Tensor] = [p for p in everything if p.is_floating_point()]
    norms: list[Tensor] = list(torch._foreach_norm(weights))
    return bool(torch.isfinite(torch.stack([norm.double().to(norms[0].device) for norm in norms]).sum()))


def _check_alike(told: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises CheckpointError where an optimizer has other settings than it had; its rates now are the schedule's."""
    groups = zip(there["param_groups"], here["param_groups"], strict=False)
    for number, (old, new) in enumerate(groups):
        for setting in sorted((old.keys() & new.keys()) - UNCOMPARED):
            one, other = describe(old[setting]), describe(new[setting])
            if one != other:
                raise CheckpointError(f"{told}.param_groups.{number}.{setting} is {one} there and {other} here")
