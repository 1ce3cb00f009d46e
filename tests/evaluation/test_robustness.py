"""Accuracy: counted right, in evaluation mode, and independent of the batch size."""

import pytest
import torch
from torch import nn

from afd.attacks import PGD
from afd.errors import InputError
from afd.evaluation import accuracy, accuracy_curve
from afd.evaluation.plots import plot_curves


class Brightest(nn.Module):
    """Logits are the pixels; says whether it was in evaluation mode."""

    def forward(self, x):
        assert not self.training
        return x.flatten(1)


X = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.6, 0.5], [0.2, 0.5, 0.1], [0.3, 0.2, 0.4]])
Y = torch.tensor([0, 1, 0, 2])


def in_batches(size):
    return list(zip(X.split(size), Y.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_clean_accuracy(size):
    model = Brightest()
    assert accuracy(model, in_batches(size)) == 0.75
    assert model.training


@pytest.mark.parametrize("size", [1, 3, 4])
def test_curve_falls_where_the_margins_end(size):
    """Margins are 0.8, 0.1 and 0.1: radius 0.06 breaks the last two, 0.3 leaves the first, 0.41 nothing."""

    def attack(eps):
        return PGD(Brightest(), eps=eps, alpha=eps / 4, steps=20)

    assert accuracy_curve(Brightest(), in_batches(size), [0, 0.04, 0.06, 0.3, 0.41], attack) == [
        0.75,
        0.75,
        0.25,
        0.25,
        0,
    ]


def test_no_images_is_an_error():
    with pytest.raises(InputError, match="batches holds no images"):
        accuracy(Brightest(), [])


def test_plot_is_a_png_with_a_line_a_model(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(path, [0, 0.1], {"natural": [0.9, 0.0], "afd": [0.9, 0.7]}, title="digits", trained_at=0.1)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[0] > 400
    assert picture[..., :3].std() > 0.01
