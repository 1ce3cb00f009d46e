"""The network of a checkpoint, or of a file of weights, built again as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.errors import AfdError, in_a_line
from afd.evaluation.subject import said
from afd.files import check_source
from afd.methods.registry import METHODS, known
from afd.nn import ProjectionDiscriminator
from afd.nn.classifier import MARKER
from afd.nn.networks import from_recipe
from afd.training.checkpoint import CheckpointError, OtherFileError, load_checkpoint
from afd.training.run_state import NETWORK, SCALED, SCALED_FOR
from afd.training.weights import load_plainly, load_state, read_weights

BEST = "best.pt"
# images and classes of the data sets that `afd train` knows, for checkpoints that say no more of their network
SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}


@dataclass(frozen=True)
class Rebuilt:
    """A trained network, in evaluation mode.

    Attributes:
        network: its weights are the average's, where training kept one.
        discriminator: D(z, y) that it was trained against, if there was one.
        metadata: what its checkpoint says of the run, in plain JSON; empty for a file of weights.
        path: the file.
    """

    network: nn.Module
    discriminator: nn.Module | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def rebuild(path: Path, device: torch.device | str = "cpu", model: nn.Module | None = None) -> Rebuilt:
    """The network that a checkpoint holds.

    Args:
        path: a checkpoint; a run's folder, for its best.pt; or a state_dict, such as `save_weights` writes.
        device: where to put it.
        model: takes the weights, and need not be given where the file names a network of `afd.nn.build_model`.

    Raises:
        CheckpointError: there is no such file, it is damaged, it does not name its network and no model is given, or
            the weights do not fit.
    """
    path = _file(path)
    try:
        state, metadata = load_checkpoint(path, "cpu")
    except OtherFileError:
        weights, facts = read_weights(path)
        return Rebuilt(_network(path, weights, facts, model).to(device).eval(), path=path)
    except CheckpointError as error:
        if isinstance(
            error.__cause__, LookupError | TypeError | AttributeError | EOFError
        ):  # whose words tell a user nothing
            raise CheckpointError(f"checkpoint {path} is damaged, or no file that torch.save has written") from error
        raise
    check_method(path, metadata)
    weights = weights_in(path, state)
    network = _network(path, weights, facts_in(metadata), model)
    discriminator = _discriminator(path, state)
    if discriminator is not None:
        discriminator.to(device).eval()
    return Rebuilt(network.to(device).eval(), discriminator, metadata, path)


def check_method(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint is of a method that nobody knows here, whose networks may mean anything.

    Somebody's own class, ``package.module:Class``, need not be there to look at what it has trained.
    """
    name = said(metadata, "method") or said(metadata, "config", "method", "name")
    if name is not None and not (isinstance(name, str) and known(name)):
        raise CheckpointError(f"checkpoint {path} is of the method {name!r}; known are {', '.join(METHODS)}")


def facts_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's metadata says of its network, in the words of `afd.training.weights.facts_of`."""
    noted = metadata.get(NETWORK)
    if isinstance(noted, dict):
        return noted
    # what was written before checkpoints said so by themselves
    data, model = said(metadata, "config", "data"), said(metadata, "config", "model")
    if isinstance(data, dict) and isinstance(model, dict) and data.get("name") in SHAPES:
        shape, classes = SHAPES[data["name"]]
        return {"recipe": {"shape": shape, "classes": classes, **model}, "normalize": model.get("normalize")}
    run = metadata.get("run")
    if not isinstance(run, dict):
        return {}
    scaled = next((normalize for normalize, words in SCALED.items() if run.get(SCALED_FOR) == words), None)
    if SCALED_FOR not in run and "normalize" in run and metadata.get("config") is None:
        scaled = run["normalize"] is not False  # as was the default then
    return {"feature_layer": run.get("feature_layer"), "normalize": scaled}


def _file(path: Path) -> Path:
    check_source("checkpoint", path)
    if not path.is_dir():
        return path
    if not (path / BEST).is_file():
        raise CheckpointError(f"{path} is a folder without {BEST}; name a run's folder, or a checkpoint")
    return path / BEST


def weights_in(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The average's weights where there is an average, else the model's."""
    weights = said(state, "average", "weights") or state.get("model")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"checkpoint {path} holds no network; it holds {', '.join(state) or 'nothing'}")
    return dict(weights)


def _network(path: Path, weights: dict[str, Any], facts: dict[str, Any], model: nn.Module | None) -> nn.Module:
    if model is None:
        return _named(path, weights, facts)
    told = f"checkpoint {path}"
    if not facts and not any(name.rpartition(".")[2] == MARKER for name in weights):
        return load_plainly(weights, model, told)  # any state_dict of any model
    network: nn.Module = load_state(weights, facts, model, told)
    return network


def _named(path: Path, weights: dict[str, Any], facts: dict[str, Any]) -> nn.Module:
    """The network of `afd.nn` that the file names."""
    recipe = facts.get("recipe")
    try:
        if recipe is None:
            raise KeyError("recipe")
        network: nn.Module = from_recipe(recipe)
    except (AfdError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not say which network it holds; name a function that builds it with --model "
            "package.module:function"
        ) from error
    name = "a {name} of width {width} for {shape} images and {classes} classes".format(
        **{**recipe, "shape": "x".join(map(str, recipe["shape"]))}
    )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {path} does not hold the weights of {name}: {in_a_line(error)}") from error
    return network


def _discriminator(path: Path, state: Mapping[str, Any]) -> nn.Module | None:
    """The discriminator, of the widths that its weights have."""
    weights = said(state, "players", "discriminator")
    if not isinstance(weights, Mapping) or not {"w.bias"} < set(weights):
        return None  # none, or that of some other method, of which nothing is known here
    try:
        embedding = _shape(weights, "e")
        layers = [_shape(weights, f"layers.{number}") for number in range(sum(_is_layer(name) for name in weights))]
        features = layers[0][1] if layers else embedding[1]
        found = ProjectionDiscriminator(features, embedding[0], hidden=embedding[1], depth=len(layers) + 1)
        found.load_state_dict(weights)
    except (AfdError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the discriminator in {path} cannot be built again: {in_a_line(error)}") from error
    return found


def _is_layer(name: str) -> bool:
    return name.startswith("layers.") and name.endswith(".bias")


def _shape(weights: Mapping[str, Tensor], layer: str) -> tuple[int, ...]:
    return tuple(next(t.shape for name, t in weights.items() if name.startswith(f"{layer}.") and t.dim() == 2))
