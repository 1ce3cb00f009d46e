"""Checkpoints of the paper's released code (Bashivan et al. 2021): F, C and D out of its one pickled dict.

Layout: ``E_state_dict`` (encoder), ``Dc_state_dict`` (one linear layer), ``EDa_state_dict`` (encoder and discriminator:
``linear1``, ``linear2``, ``l7``, ``l_y``, each with old-style spectral norm: ``weight_orig``, ``weight_u`` and, but for
very old ones, ``weight_v``), and optimizers, which are left behind.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.checkpoint import CheckpointError
from afd.nn import FeatureClassifier, ProjectionDiscriminator, ResNet18

State = Mapping[str, Tensor]

# How the released discriminator's layers are called here, in the form of torch's parametrized spectral norm. The one
# place that knows names inside of ours.
LAYERS = {"linear1": "layers.0", "linear2": "layers.1", "l7": "w", "l_y": "e"}
PARTS = {
    "weight_orig": "parametrizations.weight.original",
    "weight_u": "parametrizations.weight.0._u",
    "weight_v": "parametrizations.weight.0._v",
    "bias": "bias",
}


@dataclass(frozen=True)
class Released:
    """What a released checkpoint holds.

    Attributes:
        encoder: state_dict of F under its own names.
        classifier: weight and bias of C.
        discriminator: state_dict of D under its own names.
        epoch: epochs trained.
        network: its name of the encoder, e.g. "resnet18norm"; "norm" in it says that features are normalised.
    """

    encoder: State
    classifier: State
    discriminator: State
    epoch: int
    network: str

    @property
    def normalize(self) -> bool:
        """Whether its features are scaled to length 1."""
        return "norm" in self.network


def load_released(path: Path | str) -> Released:
    """Reads a checkpoint of the released code; needs no code from the file.

    Raises:
        CheckpointError: it cannot be read, or has another layout.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        prefix = "encoder."
        return Released(
            _plain(content["E_state_dict"]),
            {name.rpartition(".")[2]: tensor for name, tensor in _plain(content["Dc_state_dict"]).items()},
            {key: t for key, t in _plain(content["EDa_state_dict"]).items() if not key.startswith(prefix)},
            int(content["epoch"]),
            str(content["enc_model"]),
        )
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not have the layout of a released AFD checkpoint: no {error}") from error


def into_model(released: Released, model: FeatureClassifier) -> FeatureClassifier:
    """Fills a classifier whose encoder is the released one, or `ResNet18` of the same widths; returns it.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    own = model.encoder.state_dict().keys()
    encoder = released.encoder
    if not own <= encoder.keys():
        encoder = {ResNet18.name_of(name): tensor for name, tensor in encoder.items()}
    _load(model.encoder, encoder, "F")
    _load(model.classifier, released.classifier, "C")
    model.normalize = released.normalize
    return model


def into_discriminator(released: Released, discriminator: ProjectionDiscriminator) -> ProjectionDiscriminator:
    """Fills a discriminator of three layers; returns it.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    state = {}
    for name, tensor in _with_v(released.discriminator).items():
        layer, _, part = name.partition(".")
        if layer not in LAYERS or part not in PARTS:
            raise CheckpointError(f"the released discriminator has {name!r}; its layers should be {', '.join(LAYERS)}")
        state[f"{LAYERS[layer]}.{PARTS[part]}"] = tensor
    _load(discriminator, state, "D")
    return discriminator


def _plain(state: State) -> dict[str, Tensor]:
    """Without the prefix that DataParallel puts before every name."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _with_v(state: State) -> dict[str, Tensor]:
    """Adds each right singular vector that is missing: one half of a power iteration from the left one."""
    filled = dict(state)
    for name, u in state.items():
        layer, _, part = name.rpartition(".")
        if part == "weight_u" and f"{layer}.weight_v" not in state:
            filled[f"{layer}.weight_v"] = F.normalize(state[f"{layer}.weight_orig"].flatten(1).T @ u, dim=0)
    return filled


def _load(module: nn.Module, state: State, player: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the released {player} does not fit: {reason}") from error
