"""The trained network as a plain state_dict of the user's own model, which loads without afd.

What else belongs to the trained function, whether its features are scaled to length 1 and before which layer, is in the
state_dict's metadata, where `load_state_dict` overlooks it and `load_weights` finds it. Where scaling changes what the
model computes, an entry `afd.nn.classifier.MARKER` says so besides, which a model without it refuses to load.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError, OtherFileError, load_checkpoint
from afd.errors import AfdError, in_a_line, look_up
from afd.files import check_source, write_whole
from afd.methods.registry import METHODS, known
from afd.nn import Encoder, FeatureClassifier, FeatureSplit, ProjectionDiscriminator, split
from afd.nn.classifier import MARKER, entrance_of, unscaled, unwrapped
from afd.nn.modes import without_wrappers
from afd.nn.networks import from_recipe, recipe_of

KEY = "afd"
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")
WITHIN = "state_dict"  # where many training scripts keep the weights, beside what else they save
NORMALISERS = {"mu", "sigma", "mean", "std", "normalize.mean", "normalize.std"}  # of images, inside of a network


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What belongs to a network's function beside its weights, in plain JSON; see `load_state`.

    "recipe" says how to build it again, where afd knows (`afd.nn.networks.recipe_of`).
    """
    model = without_wrappers(model)
    inner = unwrapped(model)
    facts: dict[str, Any] = {"normalize": False, "feature_layer": None}
    if isinstance(model, (FeatureClassifier, FeatureSplit)):
        layer = getattr(model, "feature_layer", "classifier")
        facts = {"normalize": model.normalize, "feature_layer": layer}
        if not getattr(model, "settles", False):
            facts["num_classes"] = model.num_classes
    else:
        entrances = ((name, entrance_of(layer)) for name, layer in inner.named_modules())
        for name, entrance in entrances:  # of a split that the caller left out
            if entrance is not None:
                facts = {"normalize": entrance.normalize, "feature_layer": name}
    return {**facts, "recipe": recipe_of(model)}


def save_weights(path: Path | str, model: nn.Module) -> None:
    """Writes the state_dict of the user's own model inside `model`, on the CPU and contiguous.

    Without afd: ``model.load_state_dict(torch.load(path))``. The weights of a model that was trained with
    ``normalize=True`` have an entry more, by which that fails: what enters their feature layer must be divided by its
    length, as it is by the model that `load_weights` returns.

    Raises:
        FileError: the file cannot be written; what was there before still is.
    """
    state = unwrapped(model).state_dict()
    for name, tensor in state.items():
        state[name] = tensor.detach().cpu().contiguous() if isinstance(tensor, Tensor) else tensor
    state._metadata[KEY] = facts_of(model)  # type: ignore[attr-defined]
    file = io.BytesIO()
    torch.save(state, file)
    write_whole(path, file.getbuffer())


def load_weights(path: Path | str, model: nn.Module) -> Any:
    """Loads what `save_weights` wrote (or any state_dict of `model`) and returns the model split as it was trained.

    A network of `afd.nn.build_model` also takes its weights by the names that `published` knows, and scales no features
    from then on, as nothing did where they were trained.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model.
    """
    state, facts = read_weights(path)
    return load_state(state, facts, model, str(path))


def read_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state_dict from a file, and what `save_weights` noted beside it: nothing, if that did not write it.

    The file may also hold ``{"state_dict": ...}`` and anything besides.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on other files, and damaged ones, the unpickler stumbles in any way it can
        raise CheckpointError(f"{path} cannot be read: {in_a_line(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get(WITHIN), Mapping):
        state = state[WITHIN]
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
        hint = "; see afd.training.released for the paper's checkpoints" if "E_state_dict" in held else ""
        raise CheckpointError(f"{path} holds no state_dict of a model, but {held or 'nothing'}{hint}")
    return dict(state), dict(getattr(state, "_metadata", {}).get(KEY, {}))


def load_state(state: Mapping[str, Any], facts: Mapping[str, Any], model: nn.Module, source: str) -> Any:
    """Loads a state_dict into a model, and returns it split as it was trained.

    Args:
        state: names may carry the prefixes of DataParallel and torch.compile, or be those of `published`.
        facts: "normalize", "feature_layer" and "num_classes" of the trained network, as far as they are known.
        model: whose weights they are, or a wrapper of it.
        source: where they come from, for the error.

    Raises:
        CheckpointError: they do not fit.
    """
    model = without_wrappers(model)
    inner = unwrapped(model)
    state = dict(state)
    marked = [name for name in state if name.rpartition(".")[2] == MARKER]
    for name in marked:  # said again by `split` below
        del state[name]
    renamed = published(state, inner, source)
    theirs, ours = facts.get("recipe"), recipe_of(model)
    if theirs and ours and theirs.get("activation", "relu") != ours.get("activation", "relu"):
        raise CheckpointError(
            f"{source} is of a network with {theirs.get('activation', 'relu')}, and this one has "
            f"{ours.get('activation', 'relu')}; build it with the same activation"
        )
    try:
        unscaled(inner)
        inner.load_state_dict(_without_prefixes(state, inner) if renamed is None else renamed)
        if isinstance(model, FeatureClassifier):
            normalize = facts.get("normalize") if renamed is None else False
            model.normalize = model.normalize if normalize is None else normalize
            return model
        chosen = dict(facts)
        if marked:
            chosen |= {"feature_layer": marked[0].rpartition(".")[0], "normalize": True}
        loaded = split(inner, chosen.get("feature_layer"), chosen.get("normalize"), chosen.get("num_classes"))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source} does not load into a {type(inner).__name__}: {in_a_line(error)}") from error
    loaded.settles = "num_classes" not in facts  # widths alone can be mistaken
    return loaded


def load_plainly(state: Mapping[str, Any], model: nn.Module, source: str) -> nn.Module:
    """Loads a state_dict into a model of which nothing else is known, and returns the model.

    Raises:
        CheckpointError: it does not fit.
    """
    inner = unwrapped(model)
    renamed = published(state, inner, source)
    try:
        inner.load_state_dict(_without_prefixes(dict(state), inner) if renamed is None else renamed)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source} does not load into a {type(inner).__name__}: {in_a_line(error)}") from error
    if renamed is not None:
        inner.normalize = False  # type: ignore[assignment]
    return without_wrappers(model)


def published(state: Mapping[str, Any], model: nn.Module, source: str) -> dict[str, Any] | None:
    """A published state_dict by the names of a network of afd's; None if it is no such one.

    Known are RobustBench's classes ``WideResNet`` (as TRADES's), ``PreActResNet`` and ``ResNet``, and the usual VGG for
    CIFAR. Names may begin with ``module.`` or ``model.``. No such network scales its features to length 1. What names
    do not tell is the user's to know: the activation, and whether images were normalised before the network saw them.
    DeepMind's layout (``batchnorm_0``, ``conv_0``) is that of another network, whose convolutions pad otherwise.

    Args:
        state: names and tensors.
        model: that is to take them.
        source: where they come from, for the error.

    Raises:
        CheckpointError: the published network normalises images by itself, and so is another one.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(model, FeatureClassifier) or not isinstance(encoder, Encoder) or encoder.published_head is None:
        return None
    plain = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value for name, value in state.items()}
    head = encoder.published_head
    if f"{head}.weight" not in plain or any(name.startswith("encoder.") for name in plain):
        return None
    if found := sorted(NORMALISERS & plain.keys()):
        raise CheckpointError(
            f"{source} holds {' and '.join(found)}: its network normalises images, and afd's take them as they are, in "
            "[0, 1]; load it into its own class, which afd takes as well"
        )
    renamed = {}
    for name, value in plain.items():
        layer, _, part = name.rpartition(".")
        own = f"classifier.{part}" if layer == head else encoder.name_of(name)
        if own is not None:
            renamed[own if layer == head else f"encoder.{own}"] = value
    return renamed


def _without_prefixes(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state_dict under the model's own names, if a wrapper was saved."""
    if state.keys() & model.state_dict().keys():
        return state
    return {PREFIXES.sub("", name): value for name, value in state.items()}


# --- Networks built again -------------------------------------------------------------------------------------------


NETWORK = "network"  # of a checkpoint's metadata: what `facts_of` says
SCALED_FOR = "scaled for"  # what features of length 1 are given to, by `normalize`
SCALED = {None: "discriminator", True: "discriminator and feature layer", False: "nothing"}
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
    path = _file(path)
    try:
        state, metadata = load_checkpoint(path, "cpu")
    except OtherFileError:
        weights, facts = read_weights(path)
        known = model is not None and published(weights, unwrapped(model), f"checkpoint {path}") is not None
        return Rebuilt(_network(path, weights, facts, model).to(device).eval(), path=path, published=known)
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
