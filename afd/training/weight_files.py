"""Files of weights as others write them: read, brought to a network's names and loaded into it, or told why not."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from afd.checkpoint import CheckpointError
from afd.errors import in_a_line
from afd.installation import needed_by, require
from afd.nn import Encoder, FeatureClassifier
from afd.nn.normalized import Normalized, plain_model
from afd.nn.sources import as_hugging_face_reads

KEY = "afd"  # of a state_dict's metadata: what `afd.training.weights.facts_of` says
# where training scripts keep the weights, beside what else they save: the model's before an average's
WITHIN = ("state_dict", "model_state_dict", "model", "net", "model_ema", "state_dict_ema")
OUTERMOST = re.compile(r"^(module|_orig_mod|model)\.")
OUTER = re.compile(r"^((module|_orig_mod|model)\.)+")
ATTACKER = re.compile(r"^(module\.)?attacker\.")  # of the library robustness, which keeps the model twice
# means and deviations of images, inside of a network
STATS = re.compile(r"^(module\.|normali[sz]er?\.)*(new_)?(mu|mean|sigma|std)$")
TOLD = 3  # names of each kind, where weights do not fit
SAFETENSORS = ".safetensors"


class OtherHeadError(CheckpointError):
    """Weights of the same network for another number of classes."""


def read_weights(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state_dict from a file, and what `save_weights` noted beside it: nothing, if that did not write it.

    The file is one of torch.save, or of safetensors by its ending. It may also hold the state_dict under one of
    `WITHIN`, and anything besides that is made of tensors and plain types.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
        ExtraMissingError: safetensors is not installed.
    """
    if Path(path).suffix == SAFETENSORS:
        return _safetensors(path), {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on other files, and damaged ones, the unpickler stumbles in any way it can
        if is_of_objects(error):
            raise of_objects(path) from error
        raise CheckpointError(f"{path} cannot be read: {in_a_line(error)}") from error
    found = _state_dict_in(state)
    if found is None:
        held = ", ".join(map(str, list(state)[:8])) if isinstance(state, Mapping) else type(state).__name__
        hint = "; see afd.training.released for the paper's checkpoints" if "E_state_dict" in held else ""
        raise CheckpointError(f"{path} holds no state_dict of a model, but {held or 'nothing'}{hint}")
    return dict(found), dict(getattr(found, "_metadata", {}).get(KEY, {}))


def _state_dict_in(content: Any) -> Mapping[str, Any] | None:
    """The state_dict among what a file holds: itself, or what lies under the first name of `WITHIN` that has one."""
    if not isinstance(content, Mapping):
        return None
    within = (_state_dict_in(content[name]) for name in WITHIN if name in content)
    found = next((one for one in within if one is not None), None)
    if found is not None:
        return found
    named = all(isinstance(name, str) for name in content)
    return content if named and any(isinstance(value, Tensor) for value in content.values()) else None


def _safetensors(path: Path | str) -> dict[str, Any]:
    require("safetensors", f"{path}")
    with needed_by(f"{path}"):
        from safetensors.torch import load_file
    try:
        return dict(load_file(path))
    except Exception as error:  # whatever the library raises on a damaged file
        raise CheckpointError(f"{path} cannot be read: {in_a_line(error)}") from error


def is_of_objects(error: BaseException | None) -> bool:
    """Whether a file could not be read because it holds objects of Python classes, which would run its code."""
    return isinstance(error, pickle.UnpicklingError) and re.search("nsupported (global|class)", str(error)) is not None


def of_objects(path: Path | str) -> CheckpointError:
    """What to do about such a file."""
    return CheckpointError(
        f"{path} holds pickled Python objects beside its tensors (as dill writes them, and many training scripts), and "
        "reading those would run code of the file; where you trust it, keep its tensors alone, such as "
        "torch.save(torch.load(FILE, weights_only=False)['model'], NEW) (pickle_module=dill for one of the library "
        "robustness), and name that"
    )


# --- Names ------------------------------------------------------------------------------------------------------------


def published(state: Mapping[str, Any], model: nn.Module, source: str) -> dict[str, Any] | None:
    """A published state_dict by the names of a network of afd's; None if it is no such one.

    Known are RobustBench's classes ``WideResNet`` (as TRADES's), ``PreActResNet`` and ``ResNet``, the usual VGG for
    CIFAR, and torchvision's ResNet-50. Names may begin with ``module.`` or ``model.``. No such network scales its
    features to length 1. What names do not tell is the user's to know: the activation, and, where the file holds no
    means and deviations, whether images were normalised before the network saw them.
    DeepMind's layout (``batchnorm_0``, ``conv_0``) is that of another network, whose convolutions pad otherwise.

    Args:
        state: names and tensors.
        model: that is to take them.
        source: where they come from, for the error.

    Raises:
        CheckpointError: the published network normalises images, and the model does not, or otherwise.
    """
    if not isinstance(model, FeatureClassifier):
        return None
    encoder = plain_model(model.encoder)
    if not isinstance(encoder, Encoder) or encoder.published_head is None:
        return None
    plain = {OUTER.sub("", name): value for name, value in _once(state).items()}
    head = encoder.published_head
    if f"{head}.weight" not in plain or any(name.startswith("encoder.") for name in plain):
        return None
    plain = _without_stats(plain, model.encoder, source)
    renamed = {}
    for name, value in plain.items():
        layer, _, part = name.rpartition(".")
        own = f"classifier.{part}" if layer == head else encoder.name_of(name)
        if own is not None:
            renamed[own if layer == head else f"encoder.{own}"] = value
    return renamed


def by_own_names(state: Mapping[str, Any], model: nn.Module, source: str) -> dict[str, Any]:
    """A state_dict by the names of any network, without what wrappers around the network that was saved put before.

    Those are DataParallel's and torch.compile's, ``model.`` (RobustBench, and others whose module holds the network),
    and the two of the library robustness, whose checkpoints have all weights twice.

    Args:
        state: names and tensors.
        model: that is to take them; a `Normalized` takes the same as the model inside.
        source: where they come from, for the error.

    Raises:
        CheckpointError: the network that was saved normalises images, and the model does not, or otherwise.
    """
    own = model.state_dict().keys()
    once = _once(state)
    forms = [{**state}, once]
    while (bare := {OUTERMOST.sub("", name): value for name, value in forms[-1].items()}).keys() != forms[-1].keys():
        forms.append(bare)
    named = max(forms, key=lambda form: len(form.keys() & own))  # of equals, that with the most before its names
    named = _without_stats(named, model, source, own)
    return named if named.keys() == own else as_hugging_face_reads(named, plain_model(model))


def _once(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not ATTACKER.match(name)}


def _without_stats(state: dict[str, Any], model: nn.Module, source: str, own: Any = ()) -> dict[str, Any]:
    """Without means and deviations of images, which must be those of the model."""
    found = {name: value for name, value in state.items() if STATS.match(name) and name not in own}
    if not found:
        return state
    told = " and ".join(sorted(found))
    given = [_numbers(value) for name, value in sorted(found.items(), key=lambda one: "s" in one[0][-5:].lower())]
    ours = [list(part) for part in model.stats] if isinstance(model, Normalized) else None
    if ours is not None and len(given) == 2 and all(map(_alike, given, ours)):
        return {name: value for name, value in state.items() if name not in found}
    theirs = ",".join(f"{one:.6g}" for part in given for one in part)
    have = "as they are, in [0, 1]" if ours is None else f"by {','.join(f'{one:.6g}' for part in ours for one in part)}"
    raise CheckpointError(
        f"{source} holds {told}: its network normalises images, and this one takes them {have}; go on with "
        f"--input-stats {theirs} (afd.nn.Normalized), or load it into its own class, which afd takes as well"
    )


def _numbers(value: Any) -> list[float]:
    return [float(one) for one in value.flatten()] if isinstance(value, Tensor) else []


def _alike(theirs: list[float], ours: list[float]) -> bool:
    theirs = theirs * len(ours) if len(theirs) == 1 else theirs
    return len(theirs) == len(ours) and all(abs(a - b) <= 1e-4 for a, b in zip(theirs, ours, strict=True))


# --- Fit --------------------------------------------------------------------------------------------------------------


def fit_into(model: nn.Module, state: Mapping[str, Any], source: str, head: str, *, fresh_head: bool = False) -> None:
    """Loads a state_dict by a network's own names.

    Args:
        model: that takes it.
        state: names and tensors.
        source: where they come from, for the error.
        head: name of the model's last linear layer.
        fresh_head: whether that keeps its own weights, whatever the state_dict has for it.

    Raises:
        OtherHeadError: all fits but the number of classes.
        CheckpointError: it does not fit; the message lists what is missing, what is not of the model, and what has
            another shape.
    """
    spoilt = [name for name, one in state.items() if isinstance(one, Tensor) and not one.isfinite().all()]
    if spoilt:
        raise CheckpointError(f"{source} holds {len(spoilt)} tensors with NaN or infinite values ({_first(spoilt)})")
    own = model.state_dict()
    if fresh_head:
        kept = {name: one for name, one in own.items() if name.startswith(f"{head}.")}
        state = {name: one for name, one in state.items() if not name.startswith(f"{head}.")} | kept
    try:
        model.load_state_dict(dict(state))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _misfit(model, own, state, source, head, error) from error


def _misfit(
    model: nn.Module, own: Mapping[str, Any], state: Mapping[str, Any], source: str, head: str, error: Exception
) -> CheckpointError:
    """Why weights do not fit, the first few names of each kind and how many there are."""
    counted = ".num_batches_tracked"  # which old files lack, and torch fills in
    missing = [name for name in own if name not in state and not name.endswith(counted)]
    strange = [name for name in state if name not in own]
    shapes = {
        name: (list(state[name].shape), list(one.shape))
        for name, one in own.items()
        if isinstance(one, Tensor) and isinstance(state.get(name), Tensor) and state[name].shape != one.shape
    }
    kind = type(plain_model(model)).__name__
    if not (missing or strange or shapes):  # what the model's own loading has against it
        return CheckpointError(f"{source} does not load into a {kind}: {in_a_line(error)}")
    if not (missing or strange) and all(name.startswith(f"{head}.") for name in shapes):
        there, here = next(iter(shapes.values()))
        return OtherHeadError(
            f"{source} does not load into a {kind}: its last layer, {head}, has {there[0]} classes there and "
            f"{here[0]} here"
        )
    others = [f"{name}: {there} there, {here} here" for name, (there, here) in shapes.items()]
    kinds = (("missing", missing), ("not of the model", strange), ("of another shape", others))
    parts = (f"{len(names)} {told} ({_first(names)})" for told, names in kinds if names)
    return CheckpointError(f"{source} does not load into a {kind}: of {len(own)} tensors, {'; '.join(parts)}")


def _first(names: list[str]) -> str:
    return ", ".join(names[:TOLD]) + (", …" if len(names) > TOLD else "")
