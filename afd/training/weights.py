"""The trained network as a plain state_dict of the user's own model, which loads without afd.

What else belongs to the trained function, whether its features are scaled to length 1 and before which layer, is in the
state_dict's metadata, where `load_state_dict` overlooks it and `load_weights` finds it. Where scaling changes what the
model computes, an entry `afd.nn.classifier.MARKER` says so besides, which a model without it refuses to load.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afd.files import write_whole
from afd.nn import FeatureClassifier, FeatureSplit, split
from afd.nn.classifier import MARKER, entrance_of, unwrapped
from afd.nn.modes import without_wrappers
from afd.training.checkpoint import CheckpointError

KEY = "afd"


def save_weights(path: Path | str, model: nn.Module) -> None:
    """Writes the state_dict of the user's own model inside `model`, on the CPU and contiguous.

    Without afd: ``model.load_state_dict(torch.load(path))``. The weights of a model that was trained with
    ``normalize=True`` have an entry more, by which that fails: what enters their feature layer must be divided by its
    length, as it is by the model that `load_weights` returns.

    Raises:
        FileError: the file cannot be written.
    """
    model = without_wrappers(model)
    inner = unwrapped(model)
    state = inner.state_dict()
    for name, tensor in state.items():
        state[name] = tensor.detach().cpu().contiguous()
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
    state._metadata[KEY] = facts  # type: ignore[attr-defined]
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(path, content.getbuffer())


def load_weights(path: Path | str, model: nn.Module) -> Any:
    """Loads what `save_weights` wrote (or any state_dict of `model`) and returns the model split as it was trained.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model.
    """
    model = without_wrappers(model)
    inner = unwrapped(model)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        facts = dict(getattr(state, "_metadata", {}).get(KEY, {}))
        marked = [name for name in state if name.rpartition(".")[2] == MARKER]
        for name in marked:  # said again by `split` below
            del state[name]
        if not isinstance(model, FeatureClassifier):
            split(inner, facts.get("feature_layer"), False)  # takes away the entry of an earlier split
        inner.load_state_dict(state)
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not load into a {type(inner).__name__}: {reason}") from error
    if isinstance(model, FeatureClassifier):
        model.normalize = facts.get("normalize", model.normalize)
        return model
    if marked:
        facts |= {"feature_layer": marked[0].rpartition(".")[0], "normalize": True}
    loaded = split(inner, facts.get("feature_layer"), facts.get("normalize"), facts.get("num_classes"))
    loaded.settles = "num_classes" not in facts  # widths alone can be mistaken
    return loaded
