"""Layers whose weights are spectral-normalised (Miyato et al. 2018), and the discriminator that is made of them.

A layer's parameters are the plain ones, its state the vectors u and v of the power iteration. In training mode each
forward takes n_iter iterations; in evaluation mode u and v stay, and σ follows from them. A whole group of layers takes
them with one op.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd import ops
from afd.errors import InputError, InputTypeError, at_least, one_of
from afd.ops import Spectrum
from afd.ops.library import transformed
from afd.ops.spectral.network import projection_network

WARM_UP = 15  # power iterations of a new layer, as torch.nn.utils.parametrizations.spectral_norm takes


class SpectralLayer(nn.Module):
    """What the layers share: a weight [rows, columns], its u and v, and an optional bias [rows].

    Alone, a layer runs its own power iteration; in a `SpectralGroup`, it is handed its spectrum. State dictionaries in
    the forms of torch's two spectral norms are read too (`afd.nn.spectral`).

    Args:
        weight: the initial weight.
        bias: the initial bias, or None.
        n_iter: power iterations a training forward takes where the layer stands alone.
        eps: see `afd.ops.spectral_norm`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, n_iter: int, eps: float) -> None:
        super().__init__()
        at_least("n_iter", n_iter, 0)
        self.n_iter, self.eps = n_iter, eps
        # The bias comes first: so do the parametrised layers of torch have it, and optimizers number parameters.
        self.bias = None if bias is None else nn.Parameter(bias)
        self.weight = nn.Parameter(weight)
        self.u: Tensor
        self.v: Tensor
        self.register_buffer("u", F.normalize(torch.randn_like(weight[:, 0]), dim=0))
        self.register_buffer("v", F.normalize(torch.randn_like(weight[0]), dim=0))
        self.settle()
        self.register_load_state_dict_pre_hook(read_older)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Fits u and v to a weight that has just been given new values."""
        power_iterate([self], ["weight"], WARM_UP, self.eps)

    def spectrum(self) -> Spectrum:
        """The layer's own spectrum, after the iterations that this forward takes."""
        return power_iterate([self], ["weight"], self.n_iter if self.training else 0, self.eps)[0]


class SpectralLinear(SpectralLayer):
    """A linear layer and its activation: ``act(x (W/σ)ᵀ + b)``.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether there is one.
        negative_slope: of a LeakyReLU, in (0, 1]; 1 is no activation.
        n_iter: power iterations a training forward takes where the layer stands alone.
        eps: see `afd.ops.spectral_norm`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        negative_slope: float = 1.0,
        n_iter: int = 1,
        eps: float = 1e-12,
    ) -> None:
        start = nn.Linear(in_features, out_features, bias)
        super().__init__(start.weight.detach(), None if start.bias is None else start.bias.detach(), n_iter, eps)
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, spectrum: Spectrum | None = None) -> Tensor:
        """Activations [N, out_features] of x [N, in_features]; a group passes the spectrum.

        Under autocast, x that it made float16 or bfloat16 is widened to the weight's dtype; everything is computed in
        that, whatever mode of torch is on. In inference mode, and inside torch.func, likewise.

        Raises:
            InputTypeError, InputError: as of `afd.ops.spectral_linear`.
        """
        spectrum = spectrum or self.spectrum()
        return ops.spectral_linear(x, self.weight, self.bias, spectrum, negative_slope=self.negative_slope)


class SpectralEmbedding(SpectralLayer):
    """A table of vectors: the rows of E/σ.

    Args:
        num_embeddings: rows.
        embedding_dim: width of a row.
        n_iter: power iterations a training forward takes where the layer stands alone.
        eps: see `afd.ops.spectral_norm`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, n_iter: int = 1, eps: float = 1e-12) -> None:
        super().__init__(torch.randn(num_embeddings, embedding_dim), None, n_iter, eps)

    def forward(self, y: Tensor, spectrum: Spectrum | None = None) -> Tensor:
        """Rows [*y.shape, embedding_dim] of the table, normalised."""
        if not isinstance(y, Tensor):
            raise InputTypeError(f"y is a {type(y).__name__}; it must be a torch.Tensor")
        _, u, v = spectrum or self.spectrum()
        (sigma,) = (found.sigma for found in ops.spectral_norm([self.weight], [u], [v], n_iter=0, eps=self.eps))
        return F.embedding(y, self.weight) / sigma


class SpectralGroup(nn.Module):
    """The layers of one network, power-iterated by one op a forward.

    The group refers to its layers and does not hold them: they stay where the network has them, with their parameters
    and state. Call it once a forward, and hand each layer its spectrum::

        for layer, spectrum in zip(layers, group()):
            x = layer(x, spectrum)

    Args:
        layers: pairs of the name that error messages use and the layer.
        n_iter: power iterations a training forward takes.
        eps: see `afd.ops.spectral_norm`.
    """

    def __init__(self, layers: Iterable[tuple[str, SpectralLayer]], n_iter: int = 1, eps: float = 1e-12) -> None:
        super().__init__()
        at_least("n_iter", n_iter, 0)
        named = list(layers)
        self.layers, self.weights = tuple(layer for _, layer in named), tuple(f"{name}.weight" for name, _ in named)
        self.n_iter, self.eps = n_iter, eps

    def forward(self) -> list[Spectrum]:
        """A spectrum for each layer; the layers' u and v have moved on if the group is in training mode.

        Raises:
            InputError: layers that disagree in dtype or device; on the CPU, a weight that is not finite. The message
                names the layer.
        """
        return power_iterate(self.layers, self.weights, self.n_iter if self.training else 0, self.eps)


def power_iterate(layers: Sequence[SpectralLayer], names: Sequence[str], n_iter: int, eps: float) -> list[Spectrum]:
    """Spectra of the layers after n_iter iterations, which become the layers' state.

    The state is written in place, so that its memory stays where DistributedDataParallel and CUDA graphs know it, and
    the spectra are tensors of their own: what a backward needs of them does not change when the state does.
    """
    us, vs = [layer.u for layer in layers], [layer.v for layer in layers]
    with torch.no_grad():
        spectra = ops.spectral_norm([layer.weight for layer in layers], us, vs, n_iter=n_iter, eps=eps, names=names)
        if n_iter:
            _move(names, us + vs, [found.u for found in spectra] + [found.v for found in spectra])
    return spectra


def _move(names: Sequence[str], state: list[Tensor], moved: list[Tensor]) -> None:
    if transformed():
        raise InputError(
            f"{names[0]} takes a power iteration, and a transform of torch.func lets no state move on; put its network "
            "into evaluation mode"
        )
    try:
        torch._foreach_copy_(state, moved)
    except RuntimeError as error:
        if not any(tensor.is_inference() for tensor in state):
            raise
        raise InputError(
            f"the state of {names[0]} was made in torch.inference_mode, and cannot move on outside of it; make the "
            "layer elsewhere"
        ) from error


# --- State in its three forms ---------------------------------------------------------------------------------------


T = TypeVar("T")

FORMS: dict[str, tuple[str, str, str]] = {
    "afd": ("weight", "u", "v"),
    "parametrized": (
        "parametrizations.weight.original",
        "parametrizations.weight.0._u",
        "parametrizations.weight.0._v",
    ),
    "hooked": ("weight_orig", "weight_u", "weight_v"),
}


def convert_spectral_state(state: Mapping[str, T], form: str) -> dict[str, T]:
    """A state dictionary with every spectral-normalised layer in it, whichever form it has, in the form asked for.

    Keys of other layers, biases among them, stay as they are, and so does the order.

    Args:
        state: of a module, at any depth.
        form: "afd", "parametrized" or "hooked".

    Raises:
        InputError: unknown form.
    """
    one_of("form", form, FORMS)
    renamed = {}
    for names in FORMS.values():
        for prefix in _layers_in(state, names):
            renamed.update({prefix + old: prefix + new for old, new in zip(names, FORMS[form], strict=True)})
    return {renamed.get(key, key): value for key, value in state.items()}


def _layers_in(state: Mapping[str, Any], names: tuple[str, str, str]) -> list[str]:
    """Prefixes under which all three names are found."""
    prefixes = (key.removesuffix(names[0]) for key in state if f".{key}".endswith(f".{names[0]}"))
    return [prefix for prefix in prefixes if all(prefix + name in state for name in names)]


def read_older(_module: Any, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Renames the older forms of one layer's state in place, before the layer reads it."""
    for names in FORMS.values():
        if all(prefix + name in state for name in names):
            for old, new in zip(names, FORMS["afd"], strict=True):
                state[prefix + new] = state.pop(prefix + old)


# --- The discriminator ----------------------------------------------------------------------------------------------


SLOPE = 0.2  # of every LeakyReLU


class ProjectionDiscriminator(nn.Module):
    """D(z, y) = w·h + b + <e_y, h>, h an MLP of the features (projection head of Miyato & Koyama 2018).

    Every layer, w and e included, is spectral-normalised (Miyato et al. 2018). A forward in training mode runs one
    power iteration of all of them; in evaluation mode none. In the paper w is the third fully connected layer, hence
    ``depth=3``.

    Natural and attacked features belong into one forward, concatenated: one power iteration an update. Two forwards,
    as in the authors' released code, take two.

    Args:
        num_features: width of z.
        num_classes: number of labels.
        hidden: width of the hidden layers; by default num_features.
        depth: fully connected layers, w included; at least 1.
        n_iter: power iterations a training forward takes.
        eps: see `afd.ops.spectral_norm`.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        hidden: int | None = None,
        depth: int = 3,
        n_iter: int = 1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        at_least("depth", depth, 1)
        hidden = hidden or num_features
        widths = [num_features] + [hidden] * (depth - 1)
        self.layers = nn.ModuleList(SpectralLinear(a, b, negative_slope=SLOPE) for a, b in pairwise(widths))
        self.w = SpectralLinear(widths[-1], 1)
        self.e = SpectralEmbedding(num_classes, widths[-1])
        for layer in (self.w, self.e):
            nn.init.xavier_uniform_(layer.weight)
            layer.settle()
        named = [(name, module) for name, module in self.named_modules() if isinstance(module, SpectralLayer)]
        self.spectra = SpectralGroup(named, n_iter, eps)
        self.num_features = num_features
        self.num_classes = num_classes

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Scores [N], high for natural features.

        Args:
            z: features [N, num_features], N >= 1, of the weights' dtype. Under autocast, float16 and bfloat16 are
                widened to it: the discriminator computes in its own precision, whatever mode of torch is on.
            y: labels [N] int64 in [0, num_classes); None leaves the class term out.

        Raises:
            InputTypeError: z or y is of another type or dtype.
            InputError: z has another width or is empty, y another length, or (on the CPU, where looking does not wait)
                a label is out of range or a weight not finite.
        """
        for name, given in (("z", z), ("y", y)):
            if not (isinstance(given, Tensor) or (name == "y" and given is None)):
                raise InputTypeError(f"{name} is a {type(given).__name__}; it must be a torch.Tensor")
        if z.dim() != 2 or z.shape[1] != self.num_features:
            raise InputError(f"z has shape {list(z.shape)}; it must be [N, {self.num_features}]")
        if not z.shape[0]:
            raise InputError("z is an empty batch; it must hold at least one sample")
        if y is not None and y.shape != z.shape[:1]:
            raise InputError(f"y has shape {list(y.shape)}; it must be [{z.shape[0]}], one label for each row of z")
        parameters = [p for layer in (*self.layers, self.w) for p in (layer.weight, layer.bias)]
        spectra = self.spectra()
        return projection_network(z, y, [*parameters, self.e.weight], spectra, negative_slope=SLOPE)
