"""What no method can be told: one clear error each, before anything is built."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from afd.attacks import PGDSettings, UnionSettings
from afd.errors import InputError, InputTypeError
from afd.methods import (
    AFD,
    ALP,
    AT,
    AWP,
    FGSMRS,
    GAT,
    JARN,
    LLR,
    MART,
    TRADES,
    Execution,
    Free,
    Natural,
    NormPenalty,
    NuAT,
    Run,
)
from afd.methods.supervised import Supervised
from afd.nn import FeatureClassifier


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TRADES, {"beta": -1.0}, "beta is -1.0; it must be a finite number >= 0.0"),
        (TRADES, {"beta": float("nan")}, "beta is nan; it must be a finite number"),
        (MART, {"beta": float("inf")}, "beta is inf; it must be a finite number"),
        (ALP, {"weight": -0.5}, "weight is -0.5; it must be a finite number >= 0.0"),
        (NormPenalty, {"weight": -0.5}, "weight is -0.5"),
        (NormPenalty, {"distance": "L3"}, "distance is 'L3'; allowed are L1, L2, squared-L2"),
        (Free, {"replays": 0}, "replays is 0; it must be a finite number >= 1"),
        (Free, {"eps": -0.1}, "eps is -0.1"),
        (Free, {"alpha": -0.1}, "alpha is -0.1"),
        (Free, {"norm": "L7"}, "norm is 'L7'; allowed are"),
        (Free, {"keyed": "name"}, "keyed is 'name'; allowed are position, index"),
        (LLR, {"task_weight": -1.0}, "task_weight is -1.0; it must be a finite number >= 0.0"),
        (LLR, {"linearity": float("nan")}, "linearity is nan"),
        (LLR, {"slope": -0.1}, "slope is -0.1"),
        (LLR, {"eps": -0.1}, "eps is -0.1"),
        (LLR, {"search_rate": -0.1}, "search_rate is -0.1"),
        (LLR, {"search_steps": -1}, "search_steps is -1; it must be a finite number >= 0"),
        (LLR, {"norm": "L7"}, "norm is 'L7'; allowed are"),
        (LLR, {"ascent": "slope"}, "ascent is 'slope'; allowed are loss, gap"),
        (GAT, {"weight": -1.0}, "weight is -1.0"),
        (GAT, {"growth": -1.0}, "growth is -1.0"),
        (GAT, {"growth_epoch": 0}, "growth_epoch is 0; it must be a finite number >= 1"),
        (GAT, {"attack": PGDSettings(loss="margin")}, "the attack's loss is 'margin'; GAT attacks the cross-entropy"),
        (NuAT, {"attack": PGDSettings(targeted=True)}, "the attack's targeted is True; NuAT attacks the cross-entropy"),
        (NuAT, {"weight": -1.0}, "weight is -1.0"),
        (NuAT, {"micro_batches": 2}, "micro_batches is 2, but the losses of NuAT couple the rows of a batch"),
        (AFD, {"adversarial_weight": -1.0}, "adversarial_weight is -1.0"),
        (AFD, {"divergence_weight": -1.0}, "divergence_weight is -1.0"),
        (AFD, {"schedule": "both"}, "schedule is 'both'; allowed are simultaneous, alternating, joint"),
        (
            AFD,
            {"schedule": "joint", "optimizers": {"features": torch.optim.SGD}},
            "optimizers has the key 'features', but schedule is 'joint', where θ has one optimizer, that of 'task'",
        ),
        (JARN, {"beta": -1.0}, "beta is -1.0"),
        (JARN, {"gamma": float("nan")}, "gamma is nan"),
        (JARN, {"eps": -0.1}, "eps is -0.1"),
        (JARN, {"norm": "L7"}, "norm is 'L7'; allowed are"),
        (JARN, {"start_step": -1}, "start_step is -1; it must be a finite number >= 0"),
        (JARN, {"update_interval": 0}, "update_interval is 0; it must be a finite number >= 1"),
        (JARN, {"discriminator_width": 0}, "discriminator_width is 0"),
        (JARN, {"discriminator_layers": 0}, "discriminator_layers is 0"),
        (JARN, {"channels": 0}, "channels is 0"),
        (JARN, {"optimizers": {"features": torch.optim.SGD}}, "allowed are task, adapter, discriminator"),
        (AT, {"nesterov": True, "momentum": 0.0}, "nesterov is True with momentum 0; it is a kind of SGD's momentum"),
        (AT, {"nesterov": True, "optimizer": "adamw"}, "nesterov is True with optimizer 'adamw'"),
        (AT, {"optimizer": "lion"}, "optimizer is 'lion'; allowed are sgd, adam, adamw"),
    ],
)
def test_what_is_out_of_range_is_named(kind, settings, message):
    with pytest.raises(InputError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TRADES, {"beta": "6"}, "beta is '6', a str; it must be a number"),
        (Free, {"replays": 2.5}, "replays is 2.5, a float; it must be a whole number"),
        (LLR, {"search_steps": 2.5}, "search_steps is 2.5, a float; it must be a whole number"),
        (LLR, {"slope": "1.2"}, "slope is '1.2', a str; it must be a number"),
        (GAT, {"growth_epoch": 1.5}, "growth_epoch is 1.5, a float; it must be a whole number"),
        (AT, {"lr": None}, "lr is None, a NoneType; it must be a number"),
        (AT, {"micro_batches": 1.5}, "micro_batches is 1.5, a float; it must be a whole number"),
        (JARN, {"start_step": 0.5}, "start_step is 0.5, a float; it must be a whole number"),
        (AFD, {"discriminator_steps": True}, "discriminator_steps is True, a bool; it must be a whole number"),
    ],
)
def test_what_is_no_number_is_named(kind, settings, message):
    with pytest.raises(InputTypeError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -0.01}, "gamma is -0.01"),
        ({"start_epoch": 0}, "start_epoch is 0; it must be a finite number >= 1"),
        ({"weight_decay_at": "nowhere"}, "weight_decay_at is 'nowhere'; allowed are perturbed, original"),
    ],
)
def test_so_it_is_of_a_wrapper(settings, message):
    with pytest.raises(InputError, match=message):
        AWP(AT(), **settings)


@pytest.mark.parametrize("kind", [MART, ALP, NormPenalty, FGSMRS])
def test_a_method_that_takes_one_attacked_image_takes_no_average_over_balls(kind):
    said = (
        "attack is a union with choice 'average', which makes 2 images of each; "
        f"{kind.__name__} takes one, so 'worst' and 'random' are allowed"
    )
    with pytest.raises(InputError, match=said):
        kind(attack=UnionSettings(eps=0.1, eps_l2=0.5, choice="average"))
    for choice in ("worst", "random"):
        kind(attack=UnionSettings(eps=0.1, eps_l2=0.5, choice=choice))
    kind(attack=UnionSettings(eps=0.1, choice="average"))  # of one ball
    with pytest.raises(InputError, match=r"validation_attack is a union with choice 'average'.*; validation takes one"):
        AT(validation_attack=UnionSettings(eps=0.1, eps_l2=0.5, choice="average"))


def test_a_wrapper_goes_around_no_game():
    with pytest.raises(InputTypeError, match="AWP goes around a supervised method, which AFD is not"):
        AWP(AFD())
    with pytest.raises(InputTypeError, match="AWP goes around a supervised method, which JARN is not"):
        AWP(JARN())


@pytest.mark.parametrize("method", [MART(), AFD(), JARN(channels=1), AWP(MART())])
def test_a_loss_of_classes_takes_no_soft_labels(method):
    """Said of the run, and by a step that is given some all the same, before anything moves."""
    with pytest.raises(InputError, match=r"labels are soft, \[N, K\], and (MART|AFD|JARN) asks for classes \[N\]"):
        method.check_run(Run(soft=True))
    for other in (AT(), TRADES(), ALP(), Free(), NormPenalty(), LLR(), GAT(), NuAT(), AWP(TRADES())):
        other.check_run(Run(soft=True))
    torch.manual_seed(0)
    model = FeatureClassifier(torch.nn.Flatten(), 4, 3)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    step = method.build(model)
    with pytest.raises(InputError, match=r"labels are soft, \[N, K\], and (MART|AFD|JARN) asks for classes"):
        step(torch.rand(2, 1, 2, 2), torch.full((2, 3), 1 / 3))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(processes=2), "keyed is 'index' with 2 processes, which meet other images in each epoch"),
        (Run(recorded=True), "keyed is 'index' with recorded steps, which do not see which images are new"),
    ],
)
@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_perturbation_by_index_is_of_one_eager_process(around, run, message):
    with pytest.raises(InputError, match=message):
        around(Free(keyed="index")).check_run(run)
    around(Free()).check_run(run)
    around(Free(keyed="index")).check_run(Run())


def test_a_perturbation_by_index_needs_one():
    step = Free(keyed="index").build(FeatureClassifier(torch.nn.Flatten(), 4, 3))
    with pytest.raises(InputError, match="keyed is 'index', but the batch has none"):
        step(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))


def tiny(*layers):
    torch.manual_seed(0)
    return FeatureClassifier(torch.nn.Sequential(*layers, torch.nn.Flatten()), 4, 3)


@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_second_derivative_is_not_compiled(around):
    with pytest.raises(InputError, match="compile is True, but LLR differentiates twice, which torch"):
        around(LLR()).build(tiny(), Execution(compile=True))


def test_statistics_of_other_processes_images_are_not_the_clean_batchs():
    with pytest.raises(
        InputError, match="LLR passes images with the clean batch's statistics and the model has a Sync"
    ):
        LLR().build(tiny(torch.nn.SyncBatchNorm(1)))


class Calling(torch.nn.Module):
    """An activation that is a function, as a layer holds it."""

    def __init__(self, function):
        super().__init__()
        self.activation = function

    def forward(self, x):
        return self.activation(x)


@pytest.mark.parametrize("layer", [torch.nn.ReLU(), torch.nn.LeakyReLU(), Calling(torch.nn.functional.relu)])
@pytest.mark.parametrize("around", [lambda method: method, AWP])
def test_a_piecewise_linear_activation_is_warned_of(around, layer):
    with pytest.warns(
        UserWarning, match="LLR differentiates the gradient of the loss, and the model has a .*(eLU|relu)"
    ) as seen:
        around(LLR()).build(tiny(layer))
    assert len(seen) == 1
    assert seen[0].filename == __file__


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layer", [torch.nn.Softplus(), torch.nn.SiLU(), Calling(torch.nn.functional.silu)])
def test_a_smooth_activation_is_no_matter(layer):
    LLR().build(tiny(layer))
    GAT().build(tiny(torch.nn.ReLU()))


@pytest.mark.parametrize("method", [LLR(), GAT(), NuAT()])
def test_images_alone_have_no_loss(method):
    step = method.build(tiny())
    with pytest.raises(InputError, match="y is None; the loss needs labels"):
        step(torch.rand(2, 1, 2, 2))


def test_losses_that_couple_a_batch_are_of_whole_batches():
    @dataclass(frozen=True, kw_only=True)
    class Coupled(Supervised):
        coupled: ClassVar[bool] = True
        attack: PGDSettings = PGDSettings()

        def losses(self, model, batch):
            return {"task": torch.linalg.matrix_norm(model(batch.x), "nuc") / len(batch)}

    Coupled()
    with pytest.raises(InputError, match="micro_batches is 2, but the losses of Coupled couple the rows of a batch"):
        Coupled(micro_batches=2)
    Natural(micro_batches=2)
