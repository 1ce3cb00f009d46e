"""Networks that are not afd's own, by name: of timm, torchvision and Hugging Face, or made by a function of the user's.

All are built with fresh weights, from what is installed here; nothing is fetched.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from afd.errors import AfdError, InputError, in_a_line
from afd.installation import require
from afd.nn.outputs import linear_layers

Shape = tuple[int, int, int]  # channels, height, width
SOURCES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}  # with the package that has them


class UnusableModelError(AfdError):
    """A model cannot be had from what was named, or does not fit the data."""


def source_of(name: str) -> tuple[str, str]:
    """Where a network is from and its name there; ("", name) for a ``package.module:function`` or one of afd's."""
    source, colon, rest = name.partition(":")
    return (source, rest) if colon and source in SOURCES else ("", name)


def build_foreign(
    name: str, shape: Shape, num_classes: int, *, drop_path: float = 0.0, described: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """A fresh network of a library, or what a function returns.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``hf:FOLDER``, or ``package.module:function``, which
            is given ``num_classes`` if it takes that.
        shape: (channels, height, width) of an image.
        num_classes: number of logits; a function that is not given it has its own.
        drop_path: stochastic depth, the rate of the last block.
        described: what an earlier call found, for a network that is to be built as it was then.

    Returns:
        The network, and what describes it besides its name, in plain JSON, if anything does.

    Raises:
        ExtraMissingError: the library is not installed.
        UnusableModelError: there is no such network, or it cannot be built for such images.
    """
    source, rest = source_of(name)
    if not source:
        if drop_path:
            raise UnusableModelError(f"drop-path is {drop_path:g}, but model {name} is a function, which sees to that")
        return from_function(name, num_classes), None
    require(SOURCES[source], f"model {name}")
    build = {"timm": _of_timm, "torchvision": _of_torchvision, "hf": _of_hugging_face}[source]
    try:
        return build(rest, shape, num_classes, drop_path, described)
    except AfdError:
        raise
    except Exception as error:  # whatever a library raises where a network is not for such images
        size = "x".join(map(str, shape))
        raise UnusableModelError(
            f"model {name} cannot be built for {size} images and {num_classes} classes: {told(error)}"
        ) from error


def _check_known(name: str, rest: str, known: Iterable[str], count: int = 4) -> None:
    """Raises UnusableModelError, with near names, unless a library has a network of that name."""
    names = list(known)
    if rest in names:
        return
    near = get_close_matches(rest, names, count, 0.5) or sorted(one for one in names if rest and rest in one)[:count]
    hint = f"near names are {', '.join(near)}" if near else f"it has {len(names)} others"
    raise UnusableModelError(f"model is {name}:{rest}, which {SOURCES[name]} does not have; {hint}")


def _of_timm(
    name: str, shape: Shape, num_classes: int, drop_path: float, _described: Mapping[str, Any] | None
) -> tuple[nn.Module, None]:
    import timm

    _check_known("timm", name.partition(".")[0], timm.list_models())  # behind a dot come pretrained weights
    known, (channels, height, width) = timm.get_pretrained_cfg(name), shape
    settings: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    if known is not None and known.fixed_input_size:
        settings["img_size"] = (height, width)
    try:  # explicitly, as a network may have a rate of its own
        return timm.create_model(name, pretrained=False, drop_path_rate=drop_path, **settings), None
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        _no_stochastic_depth(f"timm:{name}", drop_path)
    return timm.create_model(name, pretrained=False, **settings), None


def _of_torchvision(
    name: str, shape: Shape, num_classes: int, drop_path: float, _described: Mapping[str, Any] | None
) -> tuple[nn.Module, None]:
    from torchvision import models, ops

    _check_known("torchvision", name, models.list_models(module=models))
    channels, height, width = shape
    if channels != 3:
        raise UnusableModelError(f"model torchvision:{name} takes images of 3 channels, and these have {channels}")
    settings: dict[str, Any] = {"num_classes": num_classes}
    if name.startswith("vit_"):
        if height != width:
            raise UnusableModelError(f"model torchvision:{name} takes square images, and these are {height}x{width}")
        settings["image_size"] = height
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = True  # as is the default, of which it warns
    network = models.get_model(name, weights=None, **settings)
    depths = [layer for layer in network.modules() if isinstance(layer, ops.StochasticDepth)]
    most = max((layer.p for layer in depths), default=0.0)
    if not most:
        _no_stochastic_depth(f"torchvision:{name}", drop_path)
    for layer in depths:  # not all of its functions take a rate
        layer.p *= drop_path / most
    return network, None


def _no_stochastic_depth(name: str, drop_path: float) -> None:
    if drop_path:
        raise UnusableModelError(f"drop-path is {drop_path:g}, but model {name} has no stochastic depth")


def _of_hugging_face(
    name: str, shape: Shape, num_classes: int, drop_path: float, described: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoConfig, AutoModelForImageClassification

    channels, height, width = shape
    if described is None:
        config = _hugging_face_config(name)
        config.num_labels = num_classes
        if hasattr(config, "num_channels"):
            config.num_channels = channels
        if hasattr(config, "image_size"):
            config.image_size = height if height == width else (height, width)
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = drop_path
        else:
            _no_stochastic_depth(f"hf:{name}", drop_path)
    else:
        config = AutoConfig.for_model(**described)
    return AutoModelForImageClassification.from_config(config), _plain(config)


def _plain(config: Any) -> dict[str, Any]:
    """A Hugging Face config in plain JSON, from which ``AutoConfig.for_model`` makes it again."""
    noted: dict[str, Any] = config.to_diff_dict()
    labels = noted.pop("id2label", None)
    for name in ("label2id", "transformers_version", "dtype", "torch_dtype", "architectures"):
        noted.pop(name, None)
    return {**noted, "num_labels": len(labels) if labels else config.num_labels}


def _hugging_face_config(name: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

    path = Path(name)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        if not (folder / "config.json").is_file():
            raise UnusableModelError(f"model is hf:{name}, a folder without config.json")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type not in CLASSIFIERS:
            raise UnusableModelError(
                f"model is hf:{name}, of type {config.model_type}, which classifies no images in transformers"
            )
        return config
    if name in CLASSIFIERS and name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    if "/" not in name:
        _check_known("hf", name, [one for one in CLASSIFIERS if one in CONFIG_MAPPING])
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UnusableModelError(
            f"model is hf:{name}; there is no such folder, and Hugging Face's cache has no config of that name, and "
            "nothing is fetched (hf download, of huggingface_hub, does that)"
        ) from error


def as_hugging_face_reads(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A state_dict by the names that a Hugging Face model has in memory, which are not always those of its files.

    Any other model's is returned as it is.
    """
    if "transformers" not in sys.modules:  # then it is none of theirs
        return state
    from transformers import PreTrainedModel
    from transformers.utils import logging

    if not isinstance(model, PreTrainedModel):
        return state
    loud, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # what does not fit is told by us
    logging.disable_progress_bar()
    try:
        read, found = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(loud)
        if bar:
            logging.enable_progress_bar()
    others = {name for name, *_shapes in found["mismatched_keys"]} | {*found["unexpected_keys"]}
    named = {name: one for name, one in read.state_dict().items() if name not in found["missing_keys"]}
    return named | {name: state[name] for name in others if name in state}


# --- Functions of the user's ------------------------------------------------------------------------------------------


def from_function(spec: str, num_classes: int | None = None) -> nn.Module:
    """What ``package.module:function`` returns, which is given ``num_classes`` if it takes that and it is known.

    Raises:
        UnusableModelError: it cannot be imported, is not callable, fails, or returns no nn.Module.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UnusableModelError(f"model is {spec!r}; a function is named as package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: a factory may lie beside the user
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UnusableModelError(f"model {spec} cannot be imported: {in_a_line(error)}") from error
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is told, and is the cause
        raise UnusableModelError(f"model {spec} cannot be imported: {told(error)}") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        raise UnusableModelError(f"model {spec}: {module_name} has no {attribute!r}") from error
    if not callable(factory):
        raise UnusableModelError(
            f"model {spec} is a {type(factory).__name__}; it must be a function that returns a model"
        )
    given = {} if num_classes is None or not _takes_classes(factory) else {"num_classes": num_classes}
    try:
        network = factory(**given)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is told, and is the cause
        raise UnusableModelError(f"model {spec} failed with {told(error)}") from error
    if not isinstance(network, nn.Module):
        raise UnusableModelError(f"model {spec} returned a {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _takes_classes(function: Callable[..., Any]) -> bool:
    try:
        return "num_classes" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of what is written in C
        return False


def told(error: BaseException) -> str:
    """Kind and words of an error of somebody else's code, in a line."""
    kind, said = type(error).__name__, in_a_line(error)
    return kind if said == kind else f"{kind}: {said}"


def with_new_head(model: nn.Module, num_classes: int) -> nn.Module:
    """The model with a fresh last linear layer, the one that `afd.nn.split` takes, of so many outputs.

    Raises:
        InputError: it has no linear layer, or is split already, by a layer of its own.
    """
    if hasattr(model, "features_and_logits"):
        raise InputError(
            f"new-head is {num_classes}, but the model is a {type(model).__name__}, split already; give it a new head "
            "there"
        )
    name, old = list(linear_layers(model).items())[-1]
    fresh = nn.Linear(
        old.in_features, num_classes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    if not name:
        return fresh
    holder, _, own = name.rpartition(".")
    setattr(model.get_submodule(holder), own, fresh)
    return model
