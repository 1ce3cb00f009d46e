"""Trained networks built again from what a checkpoint, or a file of weights, says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError, OtherFileError, load_checkpoint
from afd.errors import AfdError, in_a_line, look_up
from afd.files import check_source
from afd.installation import ExtraMissingError
from afd.methods.registry import METHODS, known
from afd.nn import FeatureSplit, ProjectionDiscriminator
from afd.nn.classifier import MARKER, unwrapped
from afd.nn.networks import from_recipe
from afd.nn.sources import UnusableModelError
from afd.training.weight_files import SAFETENSORS, is_of_objects, of_objects, published, read_weights
from afd.training.weights import NETWORK, SCALED, SCALED_FOR, load_plainly, load_state

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
        published: whether its names were those that `published` knows.
    """

    network: nn.Module
    discriminator: nn.Module | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()
    published: bool = False


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
    held = held_in(path)
    network = _network(held, model).to(device).eval()
    discriminator = None if held.state is None else _discriminator(held.path, held.state)
    if discriminator is not None:
        discriminator.to(device).eval()
    known = held.state is None and model is not None
    renamed = known and published(held.weights, unwrapped(model), held.told) is not None  # type: ignore[arg-type]
    return Rebuilt(network, discriminator, held.metadata, held.path, renamed)


@dataclass(frozen=True)
class Held:
    """What a checkpoint, or a file of weights, holds of a network.

    Attributes:
        path: the file.
        weights: the average's, where training kept one.
        facts: of the network, as far as they were noted, in the words of `afd.training.weights.facts_of`.
        metadata: of a checkpoint; empty for a file of weights.
        state: all of a checkpoint's; None for a file of weights.
    """

    path: Path
    weights: dict[str, Any]
    facts: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None

    @property
    def told(self) -> str:
        """What messages call the file."""
        return f"checkpoint {self.path}"


def held_in(path: Path) -> Held:
    """Reads a checkpoint; a run's folder, for its best.pt; or a file of weights.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds something else.
    """
    path = _file(path)
    if path.suffix == SAFETENSORS:
        return Held(path, *read_weights(path))
    try:
        state, metadata = load_checkpoint(path, "cpu")
    except OtherFileError:
        return Held(path, *read_weights(path))
    except CheckpointError as error:
        if is_of_objects(error.__cause__):
            raise of_objects(path) from error
        if isinstance(
            error.__cause__, LookupError | TypeError | AttributeError | EOFError
        ):  # whose words tell a user nothing
            raise CheckpointError(f"checkpoint {path} is damaged, or no file that torch.save has written") from error
        raise
    check_method(path, metadata)
    return Held(path, weights_in(path, state), facts_in(metadata), metadata, state)


def check_method(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a checkpoint is of a method that nobody knows here, whose networks may mean anything.

    Somebody's own class, ``package.module:Class``, need not be there to look at what it has trained.
    """
    name = look_up(metadata, "method") or look_up(metadata, "config", "method", "name")
    if name is not None and not (isinstance(name, str) and known(name)):
        raise CheckpointError(f"checkpoint {path} is of the method {name!r}; known are {', '.join(METHODS)}")


def facts_in(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's metadata says of its network, in the words of `facts_of`."""
    noted = metadata.get(NETWORK)
    if isinstance(noted, dict):
        return noted
    # what was written before checkpoints said so by themselves
    data, model = look_up(metadata, "config", "data"), look_up(metadata, "config", "model")
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
    weights = look_up(state, "average", "weights") or state.get("model")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"checkpoint {path} holds no network; it holds {', '.join(state) or 'nothing'}")
    return dict(weights)


def _network(held: Held, model: nn.Module | None) -> nn.Module:
    if model is None:
        return _named(held)
    if not held.facts and not any(name.rpartition(".")[2] == MARKER for name in held.weights):
        return load_plainly(held.weights, model, held.told)  # any state_dict of any model
    network: nn.Module = load_state(held.weights, held.facts, model, held.told)
    return network


def _named(held: Held) -> nn.Module:
    """The network of `afd.nn` that the file names."""
    recipe = held.facts.get("recipe")
    try:
        if recipe is None:
            raise KeyError("recipe")
        network: nn.Module = from_recipe(recipe)
    except (ExtraMissingError, UnusableModelError) as error:
        raise CheckpointError(f"{held.told} cannot be built again: {error}") from error
    except (AfdError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{held.told} does not say which network it holds; name a function that builds it with --model "
            "package.module:function"
        ) from error
    if isinstance(network, FeatureSplit):
        loaded: nn.Module = load_state(held.weights, held.facts, network, held.told)
        return loaded
    try:
        network.load_state_dict(held.weights)
    except RuntimeError as error:
        name = "a {name} of width {width} for {shape} images and {classes} classes".format(
            **{**recipe, "shape": "x".join(map(str, recipe["shape"]))}
        )
        raise CheckpointError(f"{held.told} does not hold the weights of {name}: {in_a_line(error)}") from error
    return network


def _discriminator(path: Path, state: Mapping[str, Any]) -> nn.Module | None:
    """The discriminator, of the widths that its weights have."""
    weights = look_up(state, "players", "discriminator")
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
