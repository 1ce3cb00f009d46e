"""Of epochs with equal scores, the later one is the best: it has trained longer for the same figure."""

import pytest
import torch
from torch import nn

from afd.methods import Natural
from afd.training import EpochReport, Trainer, load_checkpoint


def report(epoch, natural, robust=None):
    return EpochReport(epoch, epoch, {}, natural, robust, 1.0, {})


@pytest.mark.parametrize(
    ("reports", "best"),
    [
        ([report(1, 0.5), report(2, 0.5)], 2),
        ([report(1, 0.5), report(2, 0.6), report(3, 0.6), report(4, 0.5)], 3),
        ([report(1, 0.9, 0.3), report(2, 0.8, 0.3), report(3, 0.99, 0.2)], 2),
        ([report(1, 0.5)], 1),
    ],
)
def test_the_later_of_equals_ranks_higher(reports, best):
    assert max(reports, key=lambda one: one.rank).epoch == best


def test_the_best_checkpoint_is_of_the_last_of_equal_epochs(tmp_path):
    torch.manual_seed(0)
    batches = [(torch.rand(8, 4), torch.zeros(8, dtype=torch.int64))]
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([9.0, 0.0]))  # right from the first epoch on
    history = Trainer(model, Natural(), epochs=3, folder=tmp_path).fit(batches, batches)
    assert [one.natural for one in history] == [1.0] * 3
    assert load_checkpoint(tmp_path / "best.pt")[1]["report"]["epoch"] == 3
