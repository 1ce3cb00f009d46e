"""The trained network as a plain state_dict of the user's own model, which loads without afd.

What else belongs to the trained function, whether its features are scaled to length 1 and before which layer, is in the
state_dict's metadata, where `load_state_dict` overlooks it and `load_weights` finds it. Where scaling changes what the
model computes, an entry `afd.nn.classifier.MARKER` says so besides, which a model without it refuses to load.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.errors import in_a_line
from afd.files import write_whole
from afd.nn import FeatureClassifier, FeatureSplit, split
from afd.nn.classifier import MARKER, entrance_of, unscaled, unwrapped
from afd.nn.modes import without_wrappers
from afd.nn.networks import recipe_of
from afd.training.checkpoint import CheckpointError

KEY = "afd"
PREFIXES = re.compile(r"^((module|_orig_mod)\.)+")


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

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model.
    """
    state, facts = read_weights(path)
    return load_state(state, facts, model, str(path))


def read_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state_dict from a file, and what `save_weights` noted beside it: nothing, if that did not write it.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on other files, and damaged ones, the unpickler stumbles in any way it can
        raise CheckpointError(f"{path} cannot be read: {in_a_line(error)}") from error
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
        hint = "; see afd.training.released for the paper's checkpoints" if "E_state_dict" in held else ""
        raise CheckpointError(f"{path} holds no state_dict of a model, but {held or 'nothing'}{hint}")
    return dict(state), dict(getattr(state, "_metadata", {}).get(KEY, {}))


def load_state(state: Mapping[str, Any], facts: Mapping[str, Any], model: nn.Module, source: str) -> Any:
    """Loads a state_dict into a model, and returns it split as it was trained.

    Args:
        state: names may carry the prefixes of DataParallel and torch.compile.
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
    try:
        unscaled(inner)
        inner.load_state_dict(_without_prefixes(state, inner))
        if isinstance(model, FeatureClassifier):
            normalize = facts.get("normalize")
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
    try:
        inner.load_state_dict(_without_prefixes(dict(state), inner))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source} does not load into a {type(inner).__name__}: {in_a_line(error)}") from error
    return without_wrappers(model)


def _without_prefixes(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state_dict under the model's own names, if a wrapper was saved."""
    if state.keys() & model.state_dict().keys():
        return state
    return {PREFIXES.sub("", name): value for name, value in state.items()}
