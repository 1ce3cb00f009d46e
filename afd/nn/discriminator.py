"""The discriminator D(z, y): are these features of a natural image of class y, or of an attacked one?"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from afd.errors import InputError, at_least


class ProjectionDiscriminator(nn.Module):
    """D(z, y) = w·h + b + <e_y, h>, h an MLP of the features (projection head of Miyato & Koyama 2018).

    Every layer, w and e included, is spectral-normalised (Miyato et al. 2018). A forward in training mode runs one
    power iteration; in evaluation mode none. In the paper w is the third fully connected layer, hence ``depth=3``.

    Args:
        num_features: width of z.
        num_classes: number of labels.
        hidden: width of the hidden layers; by default num_features.
        depth: fully connected layers, w included; at least 1.
    """

    def __init__(self, num_features: int, num_classes: int, hidden: int | None = None, depth: int = 3) -> None:
        super().__init__()
        at_least("depth", depth, 1)
        hidden = hidden or num_features
        widths = [num_features] + [hidden] * (depth - 1)
        self.layers = nn.ModuleList(spectral_norm(nn.Linear(a, b)) for a, b in pairwise(widths))
        self.w = nn.Linear(widths[-1], 1)
        self.e = nn.Embedding(num_classes, widths[-1])
        nn.init.xavier_uniform_(self.w.weight)
        nn.init.xavier_uniform_(self.e.weight)
        spectral_norm(self.w)
        spectral_norm(self.e)
        self.num_features = num_features
        self.num_classes = num_classes

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Scores [N], high for natural features.

        Args:
            z: features [N, num_features].
            y: labels [N] int64; None leaves the class term out.

        Raises:
            InputError: z has another width, or y another length.
        """
        if z.dim() != 2 or z.shape[1] != self.num_features:
            raise InputError(f"z has shape {list(z.shape)}; it must be [N, {self.num_features}]")
        h = z
        for layer in self.layers:
            h = F.leaky_relu(layer(h), 0.2)
        score: Tensor = self.w(h).squeeze(1)
        if y is None:
            return score
        if y.shape != z.shape[:1]:
            raise InputError(f"y has shape {list(y.shape)}; it must be [{z.shape[0]}], one label for each row of z")
        return score + torch.sum(self.e(y) * h, dim=1)
