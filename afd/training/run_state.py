"""All that a run is at one moment, to and from a checkpoint: going on from it repeats no round and skips none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from afd._version import __version__
from afd.errors import InputError
from afd.methods.registry import spelled
from afd.nn import FeatureSplit
from afd.nn.classifier import MARKER, unwrapped
from afd.nn.modes import held
from afd.training import settings
from afd.training.checkpoint import CheckpointError, packed
from afd.training.keeper import Keeper
from afd.training.loaders import Loader
from afd.training.reports import EpochReport
from afd.training.stream import Stream
from afd.training.weights import facts_of

if TYPE_CHECKING:
    from afd.training.trainer import Trainer

BUILT = (
    "method", "schedule", "ema", "execution", "feature_layer", "normalize", "attack", "validation_attack", "folder",
)  # fmt: skip
"""Settings that a trainer has built on when it was made: a change of one would be followed by nobody."""

UNCOMPARED = {
    "lr",
    "params",
    "foreach",
    "fused",
    "capturable",
}  # the schedule's, or how it is computed

FACTS = (
    "method", "epochs", "schedule", "eps_warmup", "ema", "execution", "feature_layer", "normalize", "seed",
)  # fmt: skip

NETWORK = "network"  # of the metadata: what `weights.facts_of` says
SCALED_FOR = "scaled for"  # what features of length 1 are given to, by `normalize`
SCALED = {None: "discriminator", True: "discriminator and feature layer", False: "nothing"}

# of a config: may change when resumed
FREE = {
    "out", "overwrite", "device", "resume", "weights", "save_every", "log_every", "data.root", "graph",
    "execution.graph",
}  # fmt: skip
METERED = ("sums", "rounds", "images", "seconds")  # what a checkpoint keeps of a meter


@dataclass
class Position:
    """How far a run has come: the epoch in progress, batches of it played, rounds played in all."""

    epoch: int = 1
    batch: int = 0
    round: int = 0


def capture(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State and metadata of a checkpoint; all processes must ask."""
    generators = {
        "at_start": trainer.stream.at_start if trainer.position.batch else None,
        "now": trainer.stream.capture(),
    }
    state = {
        "model": unwrapped(trainer.network).state_dict(),
        "average": None if trainer.average is None else _average_of(trainer),
        "players": {name: player.state_dict() for name, player in trainer.step.players.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in trainer.step.optimizers.items()},
        "generators": trainer.group.gather(generators),
    }
    metadata = {
        "method": spelled(trainer.method),
        "run": facts(trainer),
        "config": trainer.config,
        NETWORK: facts_of(trainer.network),
        "report": dataclasses.asdict(trainer.history[-1]) if trainer.history else None,
        "commit": settings.commit(),
        "position": dataclasses.asdict(trainer.position),
        "meter": {name: getattr(trainer.meter, name) for name in METERED},
        "batches": trainer.stream.rounds,
        "history": [dataclasses.asdict(report) for report in trainer.history],
    }
    return state, metadata


def built(trainer: Trainer) -> dict[str, Any]:
    """The settings that must stay as they are, in plain terms."""
    described: dict[str, Any] = settings.describe({name: getattr(trainer, name) for name in BUILT})
    return {**described, "folder": None if trainer.folder is None else str(trainer.folder)}


def facts(trainer: Trainer) -> dict[str, Any]:
    """What must be the same in the run that goes on."""
    own = {name: getattr(trainer, name) for name in FACTS}
    if trainer.attack is not None or trainer.validation_attack is not None:  # in the place of the method's own
        own["validation_attack"] = trainer.judging
    run = own if trainer.config is None else trainer.config
    if isinstance(trainer.network, FeatureSplit):
        run = {**run, SCALED_FOR: SCALED[trainer.network.normalize]}
    described: dict[str, Any] = settings.describe({"afd": __version__, "processes": trainer.group.size, **run})
    return described


def begin(trainer: Trainer, train: Loader, validation: Loader, rounds: int) -> dict[str, Any] | None:
    """Opens the training batches where the run begins or goes on; returns the random generators' state there, if any.

    Raises:
        InputError: an epoch in progress has another number of batches now.
        CheckpointError: a checkpoint cannot be written, read or gone on from; or could not be read again.
    """
    before = trainer.stream if trainer.begun else None
    if before is not None and trainer.position.batch and rounds != before.rounds:
        raise InputError(
            f"train has {rounds} batches, but the epoch in progress has {before.rounds}, of which "
            f"{trainer.position.batch} were played; go on with as many"
        )
    trainer.stream = Stream(
        train, trainer.device, trainer.network.num_classes, rounds, validation, before, trainer.method.labels
    )
    if before is not None:
        if trainer.owed is not None:
            trainer.save(best=trainer.owed)
        return trainer.generators
    with held(trainer.modules()):
        generators = resume(trainer)
        content = None if trainer.keeper is None else capture(trainer)
    with trainer.group.together():
        if trainer.keeper is not None and content is not None and trainer.group.leads:
            packed(*content)  # what cannot be kept is told now, and not after the first epoch
            if trainer.overwrite:
                trainer.keeper.discard()
            trainer.best = trainer.keeper.settle_best(trainer.history)
    trainer.best = trainer.group.gather(trainer.best)[0]
    trainer.begun, trainer.generators = True, generators
    return generators


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
    read = _read(trainer)
    if read is None:
        trainer.note(f"there is nothing to go on from in {trainer.folder}; the run begins anew")
        return None
    path, (state, metadata) = read
    if "method" not in metadata:
        raise CheckpointError(
            f"{path} is of an afd in which attacks were not their method's own; its run cannot be gone on with, but "
            "another may begin with its weights (--weights)"
        )
    _tell_what_was_scaled(trainer, path, state, metadata["run"])
    here = facts(trainer)
    grows = _grows(metadata["run"].get("epochs"), here.get("epochs"))
    different = settings.differences(metadata["run"], here, FREE | {"epochs"} if grows else FREE)
    if different:
        raise CheckpointError(f"{path} is of another run: {'; '.join(different)}")
    batches, played = metadata.get("batches", trainer.stream.rounds), metadata["position"]["batch"]
    if played and batches != trainer.stream.rounds:
        raise CheckpointError(
            f"{path} lies in an epoch of {batches} batches, of which {played} were played; train has "
            f"{trainer.stream.rounds}"
        )
    if grows:
        trainer.note(
            f"{path} is of a run of {metadata['run']['epochs']} epochs; learning rates follow the schedule of "
            f"{trainer.epochs} from here on"
        )
    unwrapped(trainer.network).load_state_dict(state["model"])
    if trainer.average is not None:
        unwrapped(trainer.average.module).load_state_dict(state["average"]["weights"])
        trainer.average.n_averaged.copy_(state["average"]["rounds"])
        for name, wide in state["average"].get("wide", {}).items():
            trainer.average.wide[name].copy_(wide)
    if state["players"].keys() != trainer.step.players.keys():
        told = [", ".join(sorted(names)) or "none" for names in (state["players"], trainer.step.players)]
        raise CheckpointError(
            f"{path} holds the players {told[0]}, and the method's step has {told[1]}; what a step keeps from batch to "
            "batch is a module in its players from when it is built"
        )
    for name, player in trainer.step.players.items():
        player.load_state_dict(state["players"][name])
    for name, optimizer in trainer.step.optimizers.items():
        _check_alike(f"{path} is of another run: optimizers.{name}", state["optimizers"][name], optimizer.state_dict())
        optimizer.load_state_dict(state["optimizers"][name])
    for name, value in metadata["position"].items():
        setattr(trainer.position, name, value)
    trainer.step.steps = trainer.position.round
    for name, value in metadata["meter"].items():
        setattr(trainer.meter, name, value)
    trainer.history[:] = [EpochReport(**report) for report in metadata["history"]]
    generators: dict[str, Any] = state["generators"][trainer.group.rank]
    trainer.stream.at_start = generators["at_start"]
    now: dict[str, Any] = generators["now"]
    return now


def _check_alike(told: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises CheckpointError where an optimizer has other settings than it had; its rates now are the schedule's."""
    groups = zip(there["param_groups"], here["param_groups"], strict=False)
    for number, (old, new) in enumerate(groups):
        for setting in sorted((old.keys() & new.keys()) - UNCOMPARED):
            one, other = settings.describe(old[setting]), settings.describe(new[setting])
            if one != other:
                raise CheckpointError(f"{told}.param_groups.{number}.{setting} is {one} there and {other} here")


def _grows(there: Any, here: Any) -> bool:
    """Whether a run is to have more epochs than it had; fewer make it another run."""
    return isinstance(there, int) and isinstance(here, int) and here > there


def _tell_what_was_scaled(trainer: Trainer, path: Path, state: dict[str, Any], run: dict[str, Any]) -> None:
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
            f"{path} is of a model that scaled its features to length 1 for its own layer "
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


def _read(trainer: Trainer) -> tuple[Path, tuple[dict[str, Any], dict[str, Any]]] | None:
    """The checkpoint to go on from, and what it holds."""
    keeper = trainer.keeper
    if trainer.resume == "auto":
        assert keeper is not None
        content = keeper.load_newest(trainer.device)
        return None if content is None or keeper.newest is None else (keeper.newest, content)
    path = Path(str(trainer.resume))
    return path, (keeper or Keeper(path.parent, trainer.warn)).load(path, trainer.device)


def _average_of(trainer: Trainer) -> dict[str, Any]:
    assert trainer.average is not None
    weights = unwrapped(trainer.average.module).state_dict()
    return {"weights": weights, "rounds": trainer.average.n_averaged, "wide": trainer.average.wide}
