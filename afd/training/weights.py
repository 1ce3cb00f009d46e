"""The trained network as a plain state_dict of the user's own model, which loads without afd.

What else belongs to the trained function, whether its features are scaled to length 1 and before which layer, is in the
state_dict's metadata, where `load_state_dict` overlooks it and `load_weights` finds it. Where scaling changes what the
model computes, an entry `afd.nn.classifier.MARKER` says so besides, which a model without it refuses to load.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError
from afd.errors import in_a_line
from afd.files import write_whole
from afd.nn import FeatureClassifier, FeatureSplit, Normalized, split
from afd.nn.classifier import MARKER, entrance_of, unscaled, unwrapped
from afd.nn.modes import without_wrappers
from afd.nn.networks import recipe_of
from afd.nn.normalized import stats_from, stats_of
from afd.training.weight_files import KEY, by_own_names, fit_into, published, read_weights

NETWORK = "network"  # of a checkpoint's metadata: what `facts_of` says
SCALED_FOR = "scaled for"  # what features of length 1 are given to, by `normalize`
SCALED = {None: "discriminator", True: "discriminator and feature layer", False: "nothing"}


def facts_of(model: nn.Module) -> dict[str, Any]:
    """What belongs to a network's function beside its weights, in plain JSON; see `load_state`.

    "recipe" says how to build it again, where afd knows (`afd.nn.networks.recipe_of`), "input_stats" the mean and
    deviation of an `afd.nn.Normalized`.
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
    stats = stats_of(_encoder_or(inner))
    return {**facts, **({} if stats is None else {"input_stats": stats}), "recipe": recipe_of(model)}


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


def load_state(
    state: Mapping[str, Any], facts: Mapping[str, Any], model: nn.Module, source: str, *, fresh_head: bool = False
) -> Any:
    """Loads a state_dict into a model, and returns it split as it was trained.

    Args:
        state: names may carry the prefixes of `by_own_names`, or be those of `published`.
        facts: "normalize", "feature_layer", "num_classes" and "input_stats" of the trained network, as far as they are
            known. A plain model gets the `afd.nn.Normalized` that it was trained in.
        model: whose weights they are, or a wrapper of it.
        source: where they come from, for the error.
        fresh_head: whether the last linear layer keeps its own weights.

    Raises:
        CheckpointError: they do not fit.
    """
    model = without_wrappers(model)
    inner = _normalized_alike(model, facts, source)
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
    unscaled(inner)
    named = by_own_names(state, inner, source) if renamed is None else renamed
    fit_into(inner, named, source, head_of(model), fresh_head=fresh_head)
    if isinstance(model, FeatureClassifier):
        normalize = facts.get("normalize") if renamed is None else False
        model.normalize = model.normalize if normalize is None else normalize
        return model
    chosen = dict(facts)
    if marked:
        layer = marked[0].rpartition(".")[0]
        chosen |= {"feature_layer": f"model.{layer}" if isinstance(inner, Normalized) else layer, "normalize": True}
    if fresh_head:
        chosen.pop("num_classes", None)
    try:
        loaded = split(inner, chosen.get("feature_layer"), chosen.get("normalize"), chosen.get("num_classes"))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{source} does not load into a {type(inner).__name__}: {in_a_line(error)}") from error
    loaded.settles = "num_classes" not in chosen  # widths alone can be mistaken
    return loaded


def load_plainly(
    state: Mapping[str, Any], model: nn.Module, source: str, facts: Mapping[str, Any] | None = None, *,
    fresh_head: bool = False,
) -> nn.Module:  # fmt: skip
    """Loads a state_dict into a model, split or not, and returns the model, split as it is.

    Args:
        state: as of `load_state`, like source and fresh_head.
        model: that takes it.
        source: see there.
        facts: likewise, of which only "input_stats" is asked for, and must be the model's.
        fresh_head: see there.

    Raises:
        CheckpointError: it does not fit.
    """
    inner = _normalized_alike(model, facts or {}, source)
    renamed = published(state, inner, source)
    named = by_own_names(state, inner, source) if renamed is None else renamed
    fit_into(inner, named, source, head_of(without_wrappers(model)), fresh_head=fresh_head)
    if renamed is not None:
        inner.normalize = False  # type: ignore[assignment]
    return without_wrappers(model)


def head_of(model: nn.Module) -> str:
    """The name, in a state_dict, of the linear layer that features enter: by default the last; "" where there is none.

    A `Normalized` has the names of the model inside.
    """
    inner = unwrapped(model)
    if isinstance(model, FeatureClassifier):
        return "classifier"
    if isinstance(model, FeatureSplit):
        found = model.feature_layer
    else:
        found = next((name for name, one in reversed([*inner.named_modules()]) if isinstance(one, nn.Linear)), "")
    return found.removeprefix("model.") if isinstance(inner, Normalized) else found


def _normalized_alike(model: nn.Module, facts: Mapping[str, Any], source: str) -> nn.Module:
    """The user's own module, normalising images as the network did that the facts are of."""
    inner = unwrapped(model)
    theirs, ours = facts.get("input_stats"), stats_of(_encoder_or(inner))
    if not facts or theirs == ours:
        return inner
    if ours is None and theirs is not None and not isinstance(model, FeatureClassifier | FeatureSplit):
        stats = stats_from(theirs)
        assert stats is not None
        return Normalized(inner, *stats)
    told = [
        "as they are" if one is None else f"normalised by {','.join(f'{each:g}' for each in one['mean'] + one['std'])}"
        for one in (theirs, ours)
    ]
    raise CheckpointError(f"{source} is of a network that takes images {told[0]}, and this one takes them {told[1]}")


def _encoder_or(model: nn.Module) -> nn.Module:
    return model.encoder if isinstance(model, FeatureClassifier) else model
