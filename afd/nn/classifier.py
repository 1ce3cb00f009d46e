"""A classifier split where AFD needs it: an encoder whose features are L2-normalised, then one linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeatureClassifier(nn.Module):
    """C(F(x)): encoder, normalisation of its features to length 1, linear classifier (Bashivan et al. 2021, section 3).

    Args:
        encoder: maps images [N, C, H, W] to raw features [N, num_features].
        num_features: width of the features.
        num_classes: number of logits.
    """

    def __init__(self, encoder: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(num_features, num_classes)
        self.num_features = num_features
        self.num_classes = num_classes

    def features(self, x: Tensor) -> Tensor:
        """Features of length 1, [N, num_features], of images [N, C, H, W] in [0, 1]."""
        return F.normalize(self.encoder(x), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1]."""
        logits: Tensor = self.classifier(self.features(x))
        return logits
