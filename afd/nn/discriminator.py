"""The discriminator D(z, y): are these features of a natural image of class y, or of an attacked one?"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from afd.errors import InputError, InputTypeError, at_least
from afd.nn.spectral import SpectralEmbedding, SpectralGroup, SpectralLayer, SpectralLinear
from afd.ops.spectral import projection_network

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
