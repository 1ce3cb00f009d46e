"""The models that an evaluation is about: a classifier, where it came from, what is known of it, and its features."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from afd.attacks.engine import evaluating
from afd.attacks.inputs import outside_inference
from afd.data import Batches, Images
from afd.errors import AfdError, InputError, ModelWarning, in_a_line, look_up, warn_caller
from afd.evaluation.protocol import Protocol
from afd.metrics import predict
from afd.nn.classifier import unwrapped
from afd.nn.modes import local, without_wrappers
from afd.nn.normalized import Normalized
from afd.nn.sources import UnusableModelError, from_function, told


@dataclass(frozen=True)
class Model:
    """A classifier under evaluation.

    Attributes:
        name: what tables and plots call it.
        source: the checkpoint or factory it came from.
        network: images [N, C, H, W] in [0, 1] -> logits [N, classes], in any form of `afd.nn.outputs`.
        discriminator: the D(z, y) it was trained against, if there was one.
        metadata: what its checkpoint says of its training, in plain types.
        training_modules: how many of its modules were in training mode when it was handed over.
    """

    name: str
    source: str
    network: nn.Module
    discriminator: nn.Module | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    training_modules: int = 0

    def digest(self) -> str:
        """SHA-256 over the names and values of its parameters and buffers, so that a result names its weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            if not isinstance(value, Tensor) or value.is_quantized or value.layout != torch.strided:
                found.update(name.encode() + _saved(value))  # get_extra_state() may be anything
                continue
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def structure(self) -> str:
        """SHA-256 over what else the model is made of: the kinds of its modules, and whether it scales its features."""
        inner = unwrapped(self.network)
        kinds: list[tuple[Any, ...]] = [(name, type(module).__qualname__) for name, module in inner.named_modules()]
        kinds += [module.stats for module in inner.modules() if isinstance(module, Normalized)]
        scaled = getattr(without_wrappers(self.network), "normalize", None)
        return hashlib.sha256(f"{kinds} {scaled if isinstance(scaled, bool) else None}".encode()).hexdigest()


def _saved(value: Any) -> bytes:
    """A part of a state_dict that is no plain tensor, as the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@dataclass(frozen=True, eq=False, repr=False)
class Given(Images):
    """Somebody's own images, as floats in [0, 1] of any shape: pixels [N, ...], scale 1, no class more than 0."""

    def __post_init__(self) -> None:  # `evaluate` has checked them
        object.__setattr__(self, "pixels", outside_inference(self.pixels.detach()))
        object.__setattr__(self, "labels", outside_inference(self.labels))

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one image."""
        return tuple(self.pixels.shape[1:])

    def images(self, index: Tensor | None = None) -> Tensor:
        """See `Images`."""
        return self.pixels.clone() if index is None else self.pixels.index_select(0, self._positions(index))


def describe(model: Model) -> dict[str, Any]:
    """A model in plain types."""
    return {
        "name": model.name,
        "source": model.source,
        "sha256": model.digest(),
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "architecture": architecture(model),
        "metadata": model.metadata,
    }


def architecture(model: Model) -> str:
    """What a table calls the network."""
    recipe = look_up(model.metadata, "network", "recipe") or look_up(model.metadata, "config", "model")
    if isinstance(recipe, dict) and ":" in str(recipe.get("name")):
        return str(recipe["name"])
    if isinstance(recipe, dict) and {"name", "width"} <= set(recipe):
        smooth = "" if recipe.get("activation", "relu") == "relu" else f", {recipe['activation']}"
        return f"{recipe['name']} (width {recipe['width']}{smooth})"
    return type(unwrapped(model.network)).__name__


def check_metadata(model: Model) -> None:
    """Raises UnusableModelError unless results.json can hold what is known of the model."""
    try:
        json.dumps(model.metadata)
    except (TypeError, ValueError) as error:
        raise UnusableModelError(f"metadata of model {model.source} must be plain JSON: {in_a_line(error)}") from error


def from_factory(spec: str, device: torch.device) -> Model:
    """The model that ``package.module:function`` returns when called without arguments.

    Raises:
        UnusableModelError: as of `from_function`, or it cannot be put into evaluation mode there.
    """
    return evaluated(from_function(spec), spec, device)


def evaluated(network: nn.Module, source: str, device: torch.device) -> Model:
    """A model in evaluation mode on a device.

    Raises:
        UnusableModelError: it cannot be put there.
    """
    training = sum(bool(getattr(module, "training", False)) for module in network.modules())
    try:
        network = network.to(device).eval()
    except (Exception, SystemExit) as error:  # its own code again, or weights that are not there
        raise UnusableModelError(
            f"model {source} cannot be put into evaluation mode on {device}: {told(error)}"
        ) from error
    return Model(source.rpartition(":")[2], source, network, training_modules=training)


def check_fit(model: Model, images: Images, sizes: Iterable[int] = (2,)) -> int:
    """The number of classes of a model that takes these images.

    Args:
        model: the model.
        images: what it will be shown.
        sizes: of the batches that it will be shown them in; each is tried.

    Raises:
        UnusableModelError: it cannot take images of that shape, or so many at a time, returns no logits, or has another
            number of classes than the data, where that is known.
    """
    shape = "x".join(map(str, images.shape))
    classes = 0
    for size in sorted({min(size, len(images)) for size in sizes}):
        probe = images.images(torch.arange(size, device="cpu"))
        try:
            classes = predict(model.network, probe).num_classes
        except (Exception, SystemExit) as error:  # the model's own: whatever it raises is told, with its traceback
            reason = in_a_line(error)
            verb = "is of no use for" if isinstance(error, AfdError) else "does not take"
            raise UnusableModelError(
                f"model {model.source} {verb} {images.name}'s {shape} images, {size} at a time: {reason}"
            ) from error
        _check_classes(model, images, classes)
    return classes


def _check_classes(model: Model, images: Images, classes: int) -> None:
    if classes != (images.num_classes or classes):
        raise UnusableModelError(
            f"model {model.source} has {classes} classes, but data set {images.name} has {images.num_classes}"
        )


# --- Features, and how far attacked ones lie from natural ones (Bashivan et al. 2021, sections 4-5) -------------------

EXPLAINED = 0.99  # of the variance


def feature_summary(model: nn.Module, images: Images, batch_size: int) -> dict[str, Any] | None:
    """Principal components for 99% of the variance of F(x), and how many features are never or always zero.

    Args:
        model: with a method ``features`` from images to [N, num_features], finite; for any other, the result is None.
        images: clean ones.
        batch_size: of the passes.
    """
    found = []
    for x, _ in Batches(images, batch_size):
        of_batch = features_of(model, x)
        if of_batch is None or not of_batch.isfinite().all():
            return None
        found.append(of_batch)
    features = torch.cat(found).double()
    return {
        "count": features.shape[1],
        "components": principal_components(features, EXPLAINED),
        "explained": EXPLAINED,
        "never_zero": int((features != 0).all(0).sum()),
        "always_zero": int((features == 0).all(0).sum()),
    }


def has_features(model: nn.Module, x: Tensor) -> bool:
    """Whether a model has features to speak of, which images x show.

    Warns:
        ModelWarning: it has a method ``features`` that images cannot be given to.
    """
    try:
        return features_of(model, x) is not None
    except Exception as error:  # a method of that name that was meant for something else
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warn_caller(f"nothing is said of features, as the model's method of that name raises {reason}", ModelWarning)
        return False


def features_of(model: nn.Module, x: Tensor) -> Tensor | None:
    """F(x) [N, num_features], in evaluation mode; None for a model without, such as one whose features are maps."""
    inner = local(model)
    if not callable(getattr(inner, "features", None)):
        return None
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        found = inner.features(x.clone())  # type: ignore[operator]
    plain = isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2 and len(found) == len(x)
    return found if plain else None


def principal_components(features: Tensor, share: float) -> int:
    """The smallest number of principal components that hold `share` of the variance of features [N, D]."""
    variances = torch.linalg.svdvals(features - features.mean(0)).square()
    total = variances.sum()
    if total == 0:
        return 0
    held = variances.cumsum(0) / total
    return int((held < share - 1e-12).sum()) + 1


class DomainCounter:
    """Counts how the discriminator takes images: the two shares that the HΔH distance is made of.

    Args:
        model: with a method ``features``.
        discriminator: (features [N, D], labels [N]) -> scores [N], high for natural.
    """

    def __init__(self, model: nn.Module, discriminator: nn.Module) -> None:
        self.model, self.discriminator = model, discriminator

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, int]:
        """How many of these images there are, and how many are taken for natural and for attacked ones."""
        features = features_of(self.model, x)
        if features is None:
            raise InputError("the model returns no features [N, D] for its discriminator")
        with evaluating(self.discriminator), torch.no_grad():
            scores = self.discriminator(features, y)
        return {"judged": len(y), "natural": int((scores > 0).sum()), "attacked": int((scores < 0).sum())}


def divergence(natural: Mapping[str, int], attacked: Mapping[str, int]) -> float | None:
    """The estimated HΔH distance 2 |α - 1|, α = P[D > 0 on natural] + P[D < 0 on attacked]; None without images."""
    if not natural.get("judged") or not attacked.get("judged"):
        return None
    alpha = natural["natural"] / natural["judged"] + attacked["attacked"] / attacked["judged"]
    return 2 * abs(alpha - 1)


def domain_counter(model: Model, protocol: Protocol) -> DomainCounter | None:
    """What counts natural and attacked images: in the paper's protocol, for a model that kept its discriminator."""
    if protocol.name != "paper" or model.discriminator is None:
        return None
    return DomainCounter(model.network, model.discriminator)
