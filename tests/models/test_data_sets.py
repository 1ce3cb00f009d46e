"""Hugging Face data sets, the real ones, as images of ours and as loaders."""

from __future__ import annotations

import image_files
import numpy as np
import pytest
import torch

from afd.data.sources import RowsSource
from afd.data.stored import stored
from afd.data.streaming import ResizedCropAndFlip, StreamedBatches
from afd.methods import AT
from afd.nn import build_model
from afd.training import Trainer

pytestmark = pytest.mark.models


def data_set(tmp_path, decode=True):
    """24 images of three classes, as ``load_dataset("imagefolder")`` has them, with nothing fetched."""
    import datasets

    paths, labels = [], []
    for number in range(24):
        path = image_files.write(tmp_path / f"{number}.png", number, height=16 + number % 3, width=16)
        paths.append(str(path))
        labels.append(number % 3)
    features = datasets.Features(
        {"image": datasets.Image(decode=decode), "label": datasets.ClassLabel(names=["ant", "bee", "cat"])}
    )
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


@pytest.mark.parametrize("decode", [True, False])
def test_rows_of_a_data_set_are_images_with_the_names_of_its_classes(tmp_path, decode):
    images = stored(RowsSource(data_set(tmp_path, decode)), image_size=16, resize=16, workers=2)
    assert images.classes == ("ant", "bee", "cat")
    assert images.labels.tolist() == [number % 3 for number in range(24)]
    found = images.loaded().pixels[3].permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.asarray(image_files.picture(3, 16, 16)))


def test_a_data_set_trains_by_our_batches(tmp_path):
    images = stored(RowsSource(data_set(tmp_path)), image_size=16, workers=1)
    torch.manual_seed(0)
    trainer = Trainer(build_model("resnet18", (3, 16, 16), 3, width=2), AT(validation_attack=None), epochs=2)
    train = StreamedBatches(images, 8, shuffle=True, augment=ResizedCropAndFlip(16, 0.5))
    history = trainer.fit(train, StreamedBatches(images, 24))
    assert len(history) == 2


def test_a_data_set_in_torchs_format_trains_by_a_loader_of_torchs(tmp_path):
    def scaled(rows):
        images = [torch.from_numpy(np.asarray(one.resize((16, 16)))).permute(2, 0, 1) / 255 for one in rows["image"]]
        return {"image": images, "label": torch.tensor(rows["label"])}

    rows = data_set(tmp_path).with_transform(scaled)
    loader = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    trainer = Trainer(build_model("resnet18", (3, 16, 16), 3, width=2), AT(validation_attack=None), epochs=1)
    assert len(trainer.fit(loader, torch.utils.data.DataLoader(rows, batch_size=24))) == 1
