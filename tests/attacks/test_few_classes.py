"""Two and three classes, one logit, and more target classes than there are, in every attack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from afd.attacks import APGD, FAB, FGSM, MIM, PGD, AutoAttack, Ball, ModelWarning, Square, Union
from afd.errors import InputError
from afd.metrics import predict

RADII = {"Linf": 0.2, "L2": 1.5, "L1": 8.0}
RADIUS_IN = {"Linf": "eps", "L2": "eps_l2", "L1": "eps_l1"}
STEPS = 12


def union(model, *, norm, eps):
    return Union(model, **{RADIUS_IN[norm]: eps}, steps=STEPS, choice="fooling")


MADE = {
    "pgd": lambda model, norm, eps: PGD(model, norm=norm, eps=eps, alpha=eps / 4, steps=STEPS),
    "pgd-margin": lambda model, norm, eps: PGD(model, norm=norm, eps=eps, alpha=eps / 4, steps=STEPS, loss="margin"),
    "pgd-kl": lambda model, norm, eps: PGD(model, norm=norm, eps=eps, alpha=eps / 4, steps=STEPS, loss="kl"),
    "fgsm": lambda model, norm, eps: FGSM(model, norm=norm, eps=eps),
    "mim": lambda model, norm, eps: MIM(model, norm=norm, eps=eps, alpha=eps / 4, steps=STEPS),
    "apgd": lambda model, norm, eps: APGD(model, norm=norm, eps=eps, steps=STEPS, early_stop=True),
    "apgd-margin": lambda model, norm, eps: APGD(model, norm=norm, eps=eps, steps=STEPS, loss="margin"),
    "fab": lambda model, norm, eps: FAB(model, norm=norm, eps=eps, steps=STEPS),
    "fab-t": lambda model, norm, eps: FAB(model, norm=norm, eps=eps, steps=STEPS, n_target_classes=1),
    "square": lambda model, norm, eps: Square(model, norm=norm, eps=eps, queries=60),
    "square-ce": lambda model, norm, eps: Square(model, norm=norm, eps=eps, queries=60, loss="ce"),
    "union": lambda model, norm, eps: union(model, norm=norm, eps=eps),
}


def network(classes):
    torch.manual_seed(classes)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, classes)).eval()


def images():
    return torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))


class OneLogit(nn.Module):
    """A score for each image, as a column or alone."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.net = shape, network(1)

    def forward(self, x):
        return self.net(x).reshape(len(x), *self.shape)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize(("norm", "eps"), RADII.items())
@pytest.mark.parametrize("name", MADE)
def test_two_and_three_classes_are_attacked(name, norm, eps, classes):
    model, x = network(classes), images()
    y = predict(model, x).classes
    x_adv = MADE[name](model, norm, eps)(x, y)
    ball = Ball(norm, eps)
    assert ball.holds(ball.distance(x_adv, x)).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    left = (predict(model, x_adv).classes == y).sum()
    assert left < (16 if name != "fgsm" or norm != "L1" else 17)  # one step in L1 moves few elements


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", RADII)
def test_of_two_classes_there_is_one_way_to_go(norm, targeted):
    """Towards the other class is away from one's own."""
    model, x = network(2), images()
    y = predict(model, x).classes
    found = APGD(model, norm=norm, eps=RADII[norm], steps=STEPS, loss="margin", targeted=targeted)(
        x, 1 - y if targeted else y
    )
    want = APGD(model, norm=norm, eps=RADII[norm], steps=STEPS, loss="margin")(x, y)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("name", [*MADE, "autoattack"])
def test_one_logit_is_told_to_be_two(name, norm, shape):
    x, y, model = images(), torch.zeros(16, dtype=torch.int64), OneLogit(shape).eval()
    made = {**MADE, "autoattack": lambda model, norm, eps: AutoAttack(model, norm=norm, eps=eps, attacks=["apgd-ce"])}
    words = (
        r"the model returned shape \[16(, 1)?\]; a classifier has a logit .* \(of one score s, make \[-s / 2, s / 2\]"
    )
    with pytest.raises(InputError, match=words):
        made[name](model, norm, RADII[norm])(x, y)


def test_a_score_made_two_logits_is_attacked():
    score = OneLogit((1,)).eval()

    class TwoLogits(nn.Module):
        def forward(self, x):
            s = score(x)
            return torch.cat([-s / 2, s / 2], 1)

    x = images()
    y = (score(x)[:, 0] > 0).long()
    x_adv = APGD(TwoLogits().eval(), eps=0.2, steps=STEPS)(x, y)
    assert ((score(x_adv)[:, 0] > 0).long() != y).any()


@pytest.mark.parametrize(("loss", "classes", "least"), [("dlr", 2, 3), ("dlr-targeted", 2, 4), ("dlr-targeted", 3, 4)])
def test_a_loss_that_needs_more_classes_says_so(loss, classes, least):
    words = f"loss is '{loss}', which needs at least {least} classes; the model has {classes}"
    x, y = images(), torch.zeros(16, dtype=torch.int64)
    for made in (PGD(network(classes), loss=loss), APGD(network(classes), loss=loss, n_target_classes=1)):
        with pytest.raises(InputError, match=words):
            made(x, y)


@pytest.mark.parametrize("norm", RADII)
def test_dlr_of_three_classes(norm):
    model, x = network(3), images()
    y = predict(model, x).classes
    x_adv = APGD(model, norm=norm, eps=RADII[norm], steps=STEPS, loss="dlr")(x, y)
    assert (predict(model, x_adv).classes == y).sum() < 16


# --- AutoAttack -----------------------------------------------------------------------------------------------------

FEW = {"apgd-ce": {"steps": 5}, "apgd-t": {"steps": 5}, "fab-t": {"steps": 3}, "square": {"queries": 20}}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("classes", [2, 3])
def test_it_is_said_before_anything_is_attacked_that_another_loss_is_ascended(classes):
    model, x = network(classes), images()
    attack, gradients = AutoAttack(model, attacks=FEW), []
    model.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    with pytest.raises(ModelWarning, match=f"the model has {classes} classes: apgd-t ascends the margin"):
        attack(x, torch.zeros(16, dtype=torch.int64))
    assert gradients == [False]  # the images themselves were looked at


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", RADII)
def test_autoattack_ascends_the_margin_where_classes_are_few(norm, classes):
    model, x = network(classes), images()
    y = predict(model, x).classes
    attack = AutoAttack(model, norm=norm, eps=RADII[norm] / 3, attacks=FEW)
    with pytest.warns(ModelWarning, match=f"the model has {classes} classes: apgd-t ascends the margin"):
        x_adv = attack(x, y)
    notes = [part.note for part in attack.report.parts]
    margin, fewer = "apgd-t ascends the margin: its loss needs 4 classes", "fab-t aims at {} instead of 9"
    assert notes == ["", margin, fewer.format("1 class" if classes == 2 else "2 classes"), ""]
    assert str(attack.report).endswith("\n".join(notes[1:3]))
    assert torch.equal(predict(model, x_adv).classes == y, attack.report.robust)
    assert not attack.report.robust.all()


def test_the_margin_stands_for_both_of_its_losses_with_two_classes():
    model, x = network(2), images()
    y = predict(model, x).classes
    parts = {"apgd-dlr": {"steps": 10}, "apgd-t": {"steps": 10}}
    attack = AutoAttack(model, eps=0.05, version="plus", attacks=parts)
    with pytest.warns(ModelWarning, match="2 classes: apgd-dlr ascends the margin.*; apgd-t ascends the margin"):
        attack(x, y)
    alone = APGD(model, eps=0.05, steps=10, n_restarts=5, loss="margin", early_stop=True)(x, y)
    assert torch.equal(attack.report.parts[0].broken, predict(model, alone).classes != y)


@pytest.mark.parametrize("classes", [4, 5])
def test_no_more_classes_are_aimed_at_than_there_are(classes):
    model, x = network(classes), images()
    y = predict(model, x).classes
    attack = AutoAttack(model, eps=0.03, attacks={"apgd-t": {"steps": 5}})
    with pytest.warns(ModelWarning, match=f"apgd-t aims at {classes - 1} classes instead of 9"):
        attack(x, y)
    alone = APGD(model, eps=0.03, steps=5, loss="dlr-targeted", n_target_classes=classes - 1, early_stop=True)(x, y)
    assert torch.equal(attack.report.broken, predict(model, alone).classes != y)
    told = f"aims at 9 other classes; the model has {classes}, so n_target_classes is at most {classes - 1}"
    for alone in (APGD(model, eps=0.03, steps=5, loss="dlr-targeted"), FAB(model, eps=0.03, n_target_classes=9)):
        with pytest.raises(InputError, match=told):
            alone(x, y)
