"""The models that an evaluation is about: a classifier, where it came from, and what is known of it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from afd.attacks.engine import evaluating
from afd.data import Images
from afd.errors import AfdError


class SubjectError(AfdError):
    """A model cannot be had from what was named, or does not fit the data."""


@dataclass(frozen=True)
class Subject:
    """A classifier under evaluation.

    Attributes:
        name: what tables and plots call it.
        source: the checkpoint or factory it came from.
        model: images [N, C, H, W] in [0, 1] -> logits [N, classes].
        discriminator: the D(z, y) it was trained against, if there was one.
        metadata: what its checkpoint says of its training, in plain types.
        training_modules: how many of its modules were in training mode when it was handed over.
    """

    name: str
    source: str
    model: nn.Module
    discriminator: nn.Module | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    training_modules: int = 0

    def digest(self) -> str:
        """SHA-256 over the names and values of its parameters and buffers, so that a result names its weights."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def from_factory(spec: str, device: torch.device) -> Subject:
    """The model that ``package.module:function`` returns when called without arguments.

    Raises:
        SubjectError: it cannot be imported, is not callable, fails, or returns no nn.Module.
    """
    module_name, _, attribute = spec.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: a factory may lie beside the user
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise SubjectError(f"model {spec} cannot be imported: {error}") from error
    except AttributeError as error:
        raise SubjectError(f"model {spec}: {module_name} has no {attribute!r}") from error
    if not callable(factory):
        raise SubjectError(f"model {spec} is a {type(factory).__name__}; it must be a function that returns a model")
    try:
        model = factory()
    except Exception as error:  # the user's own code: whatever it raises is told, with its traceback as the cause
        raise SubjectError(f"model {spec} failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SubjectError(f"model {spec} returned a {type(model).__name__}; it must return a torch.nn.Module")
    training = sum(module.training for module in model.modules())
    return Subject(attribute, spec, model.to(device).eval(), training_modules=training)


def check_fit(subject: Subject, images: Images) -> int:
    """The number of classes of a model that takes these images.

    Raises:
        SubjectError: it cannot take images of that shape, or has another number of classes than the data.
    """
    shape = "x".join(map(str, images.shape))
    probe = images.images(torch.arange(min(2, len(images))))
    try:
        with evaluating(subject.model), torch.no_grad():
            logits = subject.model(probe)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SubjectError(f"model {subject.source} does not take {images.name}'s {shape} images: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(probe):
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SubjectError(f"model {subject.source} returned {found} for {len(probe)} images; it must be logits [N, K]")
    if logits.shape[1] != images.num_classes:
        raise SubjectError(
            f"model {subject.source} has {logits.shape[1]} classes, but data set {images.name} has {images.num_classes}"
        )
    return int(logits.shape[1])
