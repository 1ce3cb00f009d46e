"""What is trained where parts of a model are frozen, and in which dtypes and modes a step runs."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn

from afd.attacks import PGDSettings
from afd.errors import InputError
from afd.execution import isolated
from afd.methods import AFD, AT, Execution, Natural, NormPenalty
from afd.nn import FeatureClassifier, split
from afd.training import Trainer


def given(x, y, x_adv):
    """What a step is called with where the images are attacked already."""
    return {"x": x, "y": y, "x_adv": x_adv}


METHODS = {
    "joint": AFD(lr=0.01),
    "joint in parts": AFD(lr=0.01, micro_batches=2, clip=1.0),
    "separate": AFD.adam(loss="dcgan", penalty=1.0),
    "separate in parts": AFD.adam(micro_batches=2, clip=1.0),
    "seldom": AFD(lr=0.01, discriminator_steps=2),
    "alternating": AFD(lr=0.01, schedule="alternating"),
    "alternating in parts": AFD.adam(schedule="alternating", micro_batches=2, loss="hinge"),
    "natural": Natural(lr=0.01),
}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def batch(dtype=torch.float32):
    x = torch.rand(6, 2, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x, torch.tensor([0, 1, 2, 0, 1, 2]), (x + 0.1).clamp(0, 1)


def step_of(model, method, **settings):
    torch.manual_seed(2)
    return method.build(split(model, **settings))


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_backbone_stays_and_the_head_is_trained(method):
    model = network()
    model[1].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    step = step_of(model, METHODS[method])
    for _ in range(2):
        losses = step(**given(*batch()))
    assert all(torch.isfinite(loss) for loss in losses.values())
    moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("method", METHODS)
def test_with_a_frozen_backbone_the_head_follows_the_cross_entropy_alone(method):
    """As natural training of the same optimizer does: nothing of the game reaches it."""
    settings = METHODS[method]
    alike = {name: getattr(settings, name) for name in ("lr", "optimizer", "clip", "weight_decay", "micro_batches")}
    models = [network(), network()]
    for model in models:
        model[1].requires_grad_(False)
    betas = {"optimizers": {"task": lambda parameters: torch.optim.SGD(parameters, 0.05)}}
    settings = type(settings)(**{**vars(settings), **betas}) if method != "natural" else Natural(**alike, **betas)
    steps = [step_of(models[0], settings), step_of(models[1], Natural(**alike, **betas))]
    for _ in range(3):
        for step in steps:
            step(**given(*batch()))
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_anything_to_train_is_named(method):
    with pytest.raises(InputError, match="no parameter of the model is trainable"):
        step_of(network().requires_grad_(False), METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_trainable_parameters_that_have_no_part_in_the_logits_are_named(method):
    model = network().requires_grad_(False)
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)
    step = step_of(model, METHODS[method], feature_layer="3")
    with pytest.raises(InputError, match="no trainable parameter of the model has a part in the logits"):
        step(**given(*batch()))


@pytest.mark.parametrize("method", METHODS)
def test_a_float64_model_is_trained_as_a_float32_one_is(method):
    losses = {}
    for dtype in (torch.float32, torch.float64):
        step = step_of(network(dtype), METHODS[method])
        for _ in range(2):
            losses[dtype] = step(**given(*batch(dtype)))
        for player in step.players.values():
            assert {parameter.dtype for parameter in player.parameters()} == {dtype}
    for name, loss in losses[torch.float64].items():
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss.float(), losses[torch.float32][name], rtol=2e-3, atol=2e-3)


class Mixed(nn.Module):
    """A frozen backbone in bfloat16 under a head in float32."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 5).bfloat16().requires_grad_(False), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x.flatten(1).bfloat16()).relu().float())


@pytest.mark.parametrize("method", METHODS)
def test_parameters_may_be_of_several_dtypes(method, tmp_path):
    torch.manual_seed(0)
    model, (x, y, _) = Mixed(), batch()
    settings = METHODS[method]
    if settings.attack is not None:
        settings = replace(settings, attack=PGDSettings(eps=0.1, steps=1))
    trainer = Trainer(model, settings, ema=0.9, folder=tmp_path)
    before = model.head.weight.detach().clone()
    trainer.fit([(x, y)], [(x, y)])
    assert not torch.equal(before, model.head.weight)
    assert model.body.weight.dtype == torch.bfloat16


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 default": lambda: default_dtype(torch.float64),
    "bfloat16 default": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("method", METHODS)
def test_a_round_computes_the_same_in_whatever_mode_its_caller_is(method, ambient):
    def run():
        model = network()
        batches = batch()
        with AMBIENT[ambient]() if entered else contextlib.nullcontext():
            step = step_of(model, METHODS[method])
            losses = [step(**given(*batches)) for _ in range(2)]
        return [*(loss for one in losses for loss in one.values()), *model.parameters()]

    entered = False
    expected = run()
    entered = True
    for got, wanted in zip(run(), expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("ambient", ["autocast", "no_grad", "inference_mode", "float64 default", "deterministic"])
def test_training_computes_the_same_in_whatever_mode_its_caller_is(ambient):
    def run(mode):
        model, (x, y, _) = network(), batch()
        with mode():
            torch.manual_seed(3)
            trainer = Trainer(model, AFD(lr=0.01, attack=PGDSettings(eps=0.1, steps=1)), epochs=2, ema=0.5)
            history = trainer.fit([(x.clone(), y)] * 2, [(x.clone(), y)])
        return [report.losses for report in history], [*model.parameters(), *trainer.evaluated.parameters()]

    (expected, weights), (got, ours) = run(contextlib.nullcontext), run(AMBIENT[ambient])
    assert got == expected
    assert all(map(torch.equal, ours, weights))


def test_precision_is_the_executions_alone():
    seen = []
    model = network()
    model[3].register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    for execution in (Execution(), Execution("bf16")):
        with torch.autocast("cpu", torch.bfloat16):
            Natural(lr=0.01).build(split(model), execution)(**given(*batch()))
    assert seen == [torch.float32, torch.bfloat16]


def test_a_pass_sees_weights_that_a_step_has_changed():
    passes = Execution("bf16").passes(split(network()))
    x, _, _ = batch()
    with torch.autocast("cpu", torch.bfloat16), isolated(x.device):
        before = passes(x)[1].detach()
        with torch.no_grad():
            for parameter in passes.parameters():
                parameter.mul_(2)
        assert not torch.equal(passes(x)[1], before)


def test_a_discriminator_is_drawn_alike_under_any_default():
    def drawn():
        torch.manual_seed(3)
        model = FeatureClassifier(nn.Flatten(), 8, 3)
        torch.manual_seed(4)
        return AFD().build(model).discriminator.state_dict()

    expected = drawn()
    torch.manual_seed(3)
    model = FeatureClassifier(nn.Flatten(), 8, 3)
    with default_dtype(torch.float64), torch.device("meta"):
        torch.manual_seed(4)
        got = AFD().build(model).discriminator.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class InPlace(nn.Module):
    """A model that normalises the images that it is shown where they lie."""

    def __init__(self):
        super().__init__()
        self.body, self.last = nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.body(x.sub_(0.5).div_(0.25).flatten(1)).relu())


@pytest.mark.parametrize("method", [AFD(), NormPenalty(), AT()], ids=["afd", "norm-penalty", "at"])
def test_the_callers_images_stay_theirs_where_a_model_writes_to_its_own(method):
    x, y, _ = batch()
    before = x.clone()
    step = replace(method, attack=PGDSettings(eps=0.1, alpha=0.05, steps=2)).build(InPlace())
    for _ in range(4):
        assert all(loss.isfinite() for loss in step(x, y).values())
    assert torch.equal(x, before)
