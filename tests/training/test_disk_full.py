"""A disk that is full while a run writes: one line, and nothing that is half there."""

import json
import re

import pytest
import torch
from full_disk import PAGE, REASONS
from matplotlib.image import imread
from torch import nn

from afd.cli import main
from afd.config import TrainConfig
from afd.files import FileError
from afd.methods import Natural
from afd.training import load_checkpoint, load_weights, save_weights


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 20, 40, 60])
def test_a_run_ends_in_one_line_and_leaves_whole_files(disk, capsys, pages):
    out = disk.folder / "run"
    words = ["train", "natural", "--out", str(out), "--width", "4", "--limit", "30", "--epochs", "2"]
    with disk.full(room=pages * PAGE):
        status = main(words)
        told = capsys.readouterr().err
        assert status == 2
        assert re.fullmatch(rf"afd: error: .*{disk.folder}.*: {REASONS}.*\n", told)
        for name in disk.files():
            path = disk.folder / name
            if path.suffix == ".pt":
                assert load_checkpoint(path) if path.name != "model.pt" else torch.load(path)
            elif path.suffix == ".jsonl":
                assert [json.loads(line) for line in path.read_text().splitlines()]
            elif path.suffix == ".toml":
                assert TrainConfig.read(path).method == Natural()
            elif path.suffix == ".png":
                assert imread(path).std()
            else:
                assert "tfevents" in name or path.name in {"filler"}, name


def test_weights_on_a_full_disk_are_the_earlier_ones(disk):
    path, model = disk.folder / "model.pt", nn.Linear(4, 2)
    save_weights(str(path), model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.bias.add_(1)
    with disk.full(), pytest.raises(FileError, match=f"cannot write {path}: {REASONS}"):
        save_weights(path, model)
    assert disk.files() == ["model.pt"]
    load_weights(str(path), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
