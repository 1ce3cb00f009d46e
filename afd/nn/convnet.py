"""A small convolutional encoder for small grey images: quick on a CPU, and free of BatchNorm."""

from __future__ import annotations

from torch import Tensor, nn

from afd.errors import InputError


class ConvNet(nn.Module):
    """Three 3x3 convolutions (two of them halving the image) and a linear layer, with ReLU after each.

    Args:
        image_shape: (channels, height, width); height and width at least 4.
        width: filters of the first convolution; the others have twice as many.
        num_features: length of the feature vector.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 32, num_features: int = 128) -> None:
        super().__init__()
        channels, height, width_in = image_shape
        if min(height, width_in) < 4:
            raise InputError(f"image_shape is {image_shape}; height and width must be at least 4")
        cells = ((height + 3) // 4) * ((width_in + 3) // 4)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(2 * width * cells, num_features),
            nn.ReLU(inplace=True),
        )
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        """Raw features [N, num_features]."""
        features: Tensor = self.layers(x)
        return features
