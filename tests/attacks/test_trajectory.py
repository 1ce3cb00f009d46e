"""Trajectories: loss and radius at every point, for whole batches, chunks, dropped samples and several runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import APGD, FGSM, MIM, PGD, Ball, Square, Union
from afd.attacks.losses import Recorder
from afd.errors import InputError

RADII = {"Linf": 0.1, "L2": 0.8, "L1": 4.0}
KINDS = {
    "pgd": lambda model, **settings: PGD(model, alpha=0.03, steps=5, **settings),
    "fgsm": FGSM,
    "mim": lambda model, **settings: MIM(model, alpha=0.03, steps=5, **settings),
    "apgd": lambda model, **settings: APGD(model, steps=5, **settings),
}
POINTS = {"pgd": 6, "fgsm": 2, "mim": 6, "apgd": 6}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).eval()


@pytest.fixture
def batch(model):
    x = torch.rand(13, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1)


def seen_by(model, attack, x, y):
    """What the attack returns, and all that the model was shown meanwhile, by number of call."""
    shown = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: shown.append(inputs[0].detach().clone()))
    x_adv = attack(x, y)
    handle.remove()
    return x_adv, shown


@pytest.mark.parametrize(("norm", "eps"), RADII.items())
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_losses_and_distances_of_what_the_model_was_shown(model, batch, name, norm, eps):
    x, y = batch
    attack = KINDS[name](model, norm=norm, eps=eps)
    assert attack.trajectory is None
    plain = attack(x, y)
    assert attack.trajectory is None
    attack.record_trajectory = True
    x_adv, shown = seen_by(model, attack, x, y)
    assert torch.equal(x_adv, plain)
    loss, radius = attack.trajectory.loss, attack.trajectory.radius
    points = shown[1:] if name == "apgd" else shown  # the first is x itself
    stages = 3 if (name, norm) == ("apgd", "L1") else 1
    assert loss.shape == radius.shape == (POINTS[name] + stages - 1, 13)
    assert loss.device.type == "cpu"
    assert len(points) == len(loss)
    for row, point in enumerate(points):
        with torch.no_grad():
            torch.testing.assert_close(loss[row], F.cross_entropy(model(point), y, reduction="none"))
        torch.testing.assert_close(radius[row].double(), Ball(norm, eps).distance(point, x), atol=1e-5, rtol=1e-5)
    if name != "apgd":
        assert torch.equal(points[-1], x_adv)
    if name in ("fgsm", "mim"):
        assert not radius[0].any()
    attack.record_trajectory = False
    attack(x, y)
    assert attack.trajectory is None


@pytest.mark.parametrize("name", KINDS)
def test_chunks_give_the_rows_of_the_whole(model, batch, name):
    whole, chunked = KINDS[name](model, eps=0.1), KINDS[name](model, eps=0.1, chunk_size=4)
    for attack in (whole, chunked):
        attack.record_trajectory = True
        attack(*batch)
    torch.testing.assert_close(chunked.trajectory.loss, whole.trajectory.loss)
    torch.testing.assert_close(chunked.trajectory.radius, whole.trajectory.radius)


@pytest.mark.parametrize("norm", ["Linf", "L1"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_samples_that_were_dropped_are_nan_from_there_on(model, batch, chunk_size, norm):
    x, y = batch
    y = torch.where(torch.arange(13) < 2, (y + 1) % 5, y)  # two are wrong to begin with
    settings = {
        "norm": norm, "eps": RADII[norm] / 2, "steps": 10, "loss": "dlr-targeted", "n_target_classes": 3,
        "chunk_size": chunk_size,
    }  # fmt: skip
    full, early = APGD(model, **settings), APGD(model, early_stop=True, **settings)
    for attack in (full, early):
        attack.record_trajectory = True
        attack(x, y)
    want, found = full.trajectory.loss, early.trajectory.loss
    rows = 13 if norm == "L1" else 11
    assert want.shape == (3 * rows, 13)
    assert not want.isnan().any()
    assert found.isnan()[:, :2].all()
    there = ~found.isnan()
    padded = torch.full_like(want, torch.nan)
    padded[: len(found)] = found  # runs in which nothing was left have no rows
    there = ~padded.isnan()
    torch.testing.assert_close(padded[there], want[there], atol=1e-4, rtol=1e-4)
    assert 0 < there.sum() < there[:, 2:].numel()
    assert torch.equal(there, ~torch.cat([early.trajectory.radius, padded[len(found) :]]).isnan())
    assert not (there[1:] & ~there[:-1]).any()  # once dropped, always


def test_runs_come_in_their_order_and_targeted_losses_as_they_are(model, batch):
    x, y = batch
    target = (y + 1) % 5
    attack = APGD(model, eps=0.1, steps=4, n_restarts=2, targeted=True)
    attack.record_trajectory = True
    attack(x, target)
    assert attack.trajectory.loss.shape == (10, 13)
    alone = APGD(model, eps=0.1, steps=4, targeted=True, seed=1)
    alone.record_trajectory = True
    alone(x, target)
    assert torch.equal(attack.trajectory.loss[5:], alone.trajectory.loss)
    assert alone.trajectory.loss[-1].mean() < alone.trajectory.loss[0].mean()
    assert (alone.trajectory.loss > 0).all()


def test_draws_are_averaged(batch):
    class Drawing(nn.Module):
        calls = 0

        def forward(self, x):
            Drawing.calls += 1
            return x.flatten(1)[:, :5] * (1 if Drawing.calls % 2 else 3)

    x, y = batch
    attack = APGD(Drawing().eval(), eps=0.1, steps=0, loss="margin", eot_iter=2)
    attack.record_trajectory = True
    _, shown = seen_by(attack.model, attack, x, y)
    logits = shown[-1].flatten(1)[:, :5]
    margin = logits.scatter(1, y[:, None], -torch.inf).amax(1) - logits.gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(attack.trajectory.loss[0], 2 * margin)  # of once and three times that


def test_graphs_are_not_replayed_meanwhile(model, batch, tapes):
    attack = PGD(model, eps=0.1, steps=3)
    for _ in range(4):
        attack(*batch)
    recorded, want = len(tapes), attack(*batch)
    assert recorded
    attack.record_trajectory = True
    assert torch.equal(attack(*batch), want)
    assert attack.trajectory.loss.shape == (4, 13)
    assert len(tapes) == recorded
    attack.record_trajectory = False
    assert torch.equal(attack(*batch), want)


def test_a_loss_for_the_whole_batch_is_everybodys(model, batch):
    attack = PGD(model, eps=0.1, steps=2, loss=lambda logits, y: F.cross_entropy(logits, y))
    attack.record_trajectory = True
    attack(*batch)
    loss = attack.trajectory.loss
    assert loss.shape == (3, 13)
    assert torch.equal(loss, loss[:, :1].expand(-1, 13))


@pytest.mark.parametrize("made", [lambda model: Union(model, eps=0.1), Square])
def test_attacks_without_a_trajectory_say_so(model, batch, made):
    attack = made(model)
    attack.record_trajectory = True
    with pytest.raises(InputError, match=r"record_trajectory is True; (Union|Square) keeps none"):
        attack(*batch)


def test_a_recorder_orders_points_of_runs():
    recorder = Recorder()
    for run in (1, 0):
        recorder.run = (run,)
        for point in (1, 0):
            recorder.add(point, slice(run, run + 1), torch.tensor([10.0 * run + point]), torch.tensor([0.5]))
    nan = torch.nan
    expected = torch.tensor([[0.0, nan], [1.0, nan], [nan, 10.0], [nan, 11.0]])
    assert torch.equal(recorder.trajectory(2).loss.nan_to_num(-1), expected.nan_to_num(-1))
