"""All that a run is at one moment, to and from a checkpoint: going on from it repeats no round and skips none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afd._version import __version__
from afd.nn import FeatureSplit
from afd.nn.classifier import MARKER, unwrapped
from afd.training import rng, settings
from afd.training.checkpoint import CheckpointError
from afd.training.keeper import Keeper
from afd.training.reports import EpochReport
from afd.training.weights import facts_of

if TYPE_CHECKING:
    from afd.training.trainer import Trainer

FACTS = (
    "method", "attack", "epochs", "schedule", "eps_warmup", "ema", "execution", "feature_layer", "normalize", "seed",
)  # fmt: skip

NETWORK = "network"  # of the metadata: what `weights.facts_of` says
SCALED_FOR = "scaled for"  # what features of length 1 are given to, by `normalize`
SCALED = {None: "discriminator", True: "discriminator and feature layer", False: "nothing"}

# of a config: may change when resumed
FREE = {"out", "device", "resume", "save_every", "log_every", "data.root", "graph", "execution.graph"}


def capture(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and metadata of a checkpoint; all processes must ask."""
    generators = {"at_start": trainer.stream.at_start if trainer.position.batch else None, "now": rng.capture()}
    state = {
        "model": unwrapped(trainer.network).state_dict(),
        "average": None if trainer.average is None else _average_of(trainer),
        "players": {name: player.state_dict() for name, player in trainer.round.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.round.optimizers.items()},
        "generators": trainer.group.gather(generators),
    }
    metadata = {
        "run": facts(trainer),
        "config": trainer.config,
        NETWORK: facts_of(trainer.network),
        "report": dataclasses.asdict(trainer.history[-1]) if trainer.history else None,
        "commit": settings.commit(),
        "position": dataclasses.asdict(trainer.position),
        "meter": {"sums": trainer.meter.sums, "rounds": trainer.meter.rounds},
        "history": [dataclasses.asdict(report) for report in trainer.history],
    }
    return state, metadata


def facts(trainer: Trainer) -> dict[str, Any]:
    """What must be the same in the run that goes on."""
    run = {name: getattr(trainer, name) for name in FACTS} if trainer.config is None else trainer.config
    if isinstance(trainer.network, FeatureSplit):
        run = {**run, SCALED_FOR: SCALED[trainer.network.normalize]}
    described: dict[str, Any] = settings.describe({"afd": __version__, "processes": trainer.group.size, **run})
    return described


def resume(trainer: Trainer) -> dict[str, Any] | None:
    """Puts the trainer where its checkpoint was; returns the state of the random generators there.

    Returns:
        None if there is nothing to go on from.

    Raises:
        CheckpointError: it cannot be read, or another run made it; the message says what differs.
    """
    if trainer.resume is None:
        return None
    assert trainer.keeper is not None or trainer.resume != "auto"
    content = _read(trainer)
    if content is None:
        return None
    state, metadata = content
    _tell_what_was_scaled(trainer, state, metadata["run"])
    different = settings.differences(metadata["run"], facts(trainer), FREE)
    if different:
        raise CheckpointError(f"the checkpoint in {trainer.resume} is of another run: {'; '.join(different)}")
    unwrapped(trainer.network).load_state_dict(state["model"])
    if trainer.average is not None:
        unwrapped(trainer.average.module).load_state_dict(state["average"]["weights"])
        trainer.average.n_averaged.copy_(state["average"]["rounds"])
        for name, wide in state["average"].get("wide", {}).items():
            trainer.average.wide[name].copy_(wide)
    for name, player in trainer.round.players.items():
        player.load_state_dict(state["players"][name])
    for name, optimizer in trainer.round.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, value in metadata["position"].items():
        setattr(trainer.position, name, value)
    trainer.round.rounds = trainer.position.round
    trainer.meter.sums, trainer.meter.rounds = metadata["meter"]["sums"], metadata["meter"]["rounds"]
    trainer.history[:] = [EpochReport(**report) for report in metadata["history"]]
    generators: dict[str, Any] = state["generators"][trainer.group.rank]
    trainer.stream.at_start = generators["at_start"]
    now: dict[str, Any] = generators["now"]
    return now


def _tell_what_was_scaled(trainer: Trainer, state: dict[str, Any], run: dict[str, Any]) -> None:
    """Puts into a checkpoint of somebody's own model what those of earlier days do not say: which features were scaled.

    Raises:
        CheckpointError: they were scaled for their layer, too, which was the default, and are not here.
    """
    network = trainer.network
    if not isinstance(network, FeatureSplit) or SCALED_FOR in run or trainer.config is not None:
        return
    if run["normalize"] is False:
        run[SCALED_FOR] = SCALED[False]
        return
    if not network.normalize:
        raise CheckpointError(
            f"the checkpoint in {trainer.resume} is of a model that scaled its features to length 1 for its own layer "
            "as well, as was the default; go on from it with normalize=True"
        )
    run |= {"normalize": True, SCALED_FOR: SCALED[True]}
    name = f"{network.feature_layer}.{MARKER}".removeprefix(".")
    for weights in (state["model"], *([state["average"]["weights"]] if state["average"] else [])):
        weights[name] = torch.ones((), dtype=torch.bool)


@torch.no_grad()
def finite(model: nn.Module, players: Mapping[str, nn.Module]) -> bool:
    """Whether all weights are; waits for the device once."""
    everything = (p for module in (model, *players.values()) for p in module.parameters())
    weights: list[Tensor] = [p for p in everything if p.is_floating_point()]
    norms: list[Tensor] = list(torch._foreach_norm(weights))
    return bool(torch.isfinite(torch.stack([norm.double().to(norms[0].device) for norm in norms]).sum()))


def _read(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if trainer.resume == "auto":
        assert trainer.keeper is not None
        return trainer.keeper.load_newest(trainer.device)
    path = Path(str(trainer.resume))
    keeper = trainer.keeper or Keeper(path.parent, trainer.warn)
    return keeper.load(path, trainer.device)


def _average_of(trainer: Trainer) -> dict[str, Any]:
    assert trainer.average is not None
    weights = unwrapped(trainer.average.module).state_dict()
    return {"weights": weights, "rounds": trainer.average.n_averaged, "wide": trainer.average.wide}
