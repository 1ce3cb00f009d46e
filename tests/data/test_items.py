"""What loaders may yield, and what is said of anything else."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from afd.data.items import images_and_labels
from afd.errors import InputTypeError

X, Y = torch.rand(4, 3), torch.arange(4)
Swapped = namedtuple("Swapped", ["label", "image"])
Other = namedtuple("Other", ["picture", "kind"])


@pytest.mark.parametrize(
    "item",
    [
        (X, Y),
        [X, Y],
        (X, Y, torch.arange(4), "names"),
        {"image": X, "label": Y},
        {"labels": Y, "images": X, "index": torch.arange(4)},
        {"pixel_values": X, "labels": Y},
        SimpleNamespace(images=X, labels=Y),
        Swapped(label=Y, image=X),
        Other(X, Y),
    ],
    ids=lambda item: type(item).__name__,
)
def test_images_and_labels_are_found(item):
    x, y = images_and_labels(item)
    assert x is X
    assert y is Y


def test_batches_of_a_loader_of_dicts():
    loader = DataLoader([{"image": X[i], "label": int(Y[i])} for i in range(4)], 2)
    assert torch.equal(torch.cat([images_and_labels(item)[1] for item in loader]), Y)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (X, "yields a Tensor; a batch must be"),
        ((X,), "yields a tuple of Tensor"),
        ([], "yields a list of nothing"),
        ({"image": X, "target": Y}, "yields a dict with the keys image, target; .*'label' / 'labels'"),
        (([X[0], X[1]], Y), "yields a tuple of list, Tensor; .*both of them tensors"),
        ((X.numpy(), Y.numpy()), "yields a tuple of ndarray, ndarray"),
        (None, "yields a NoneType"),
        ("image", "yields a str"),
    ],
)
def test_anything_else_is_named(item, message):
    with pytest.raises(InputTypeError, match=message):
        images_and_labels(item)
