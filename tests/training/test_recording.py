"""Captured training steps. On the CPU a tape stands for the CUDA graph: it knows only the numbers of its capture."""

import itertools
import warnings

import pytest
import torch
from recorded_attacks import held
from torch import nn

from afd.attacks import APGDSettings, CaptureWarning, PGDSettings, base, replay
from afd.data import Batches, Images
from afd.data.images import CropAndFlip
from afd.graphs import KEPT
from afd.methods import AFD, Execution, Natural
from afd.methods.attacking import GivenAttack
from afd.methods.optimizers import make_recordable
from afd.nn import FeatureClassifier
from afd.training import Trainer, load_checkpoint, recording

CPU = torch.device("cpu")
BATCHES, EPOCHS = 4, 6  # of 8 images, the last of 6


def images(count=30):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (count, 1, 6, 6), generator=generator).to(torch.uint8)
    return Images(pixels, torch.arange(count) % 3, scale=255.0, num_classes=3, name="noise")


def batches(device=CPU):
    return Batches(images(), 8, shuffle=True, augment=CropAndFlip(padding=1), device=device)


def model():
    """Draws at random in training, and gathers statistics."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 5)
    )
    return FeatureClassifier(encoder, 5, 3)


PGD_2 = {"attack": PGDSettings(eps=0.1, alpha=0.05, steps=2), "validation_attack": None}
APGD_3 = {"attack": APGDSettings(eps=0.1, steps=3, n_restarts=2), "validation_attack": None}
# a tape is a mode, in which no layers are joined: in bfloat16 that would be more than rounding
L2 = PGDSettings(norm="L2", eps=1.0, alpha=0.5, steps=2, precision="bf16", fold_batchnorm=False)
L2_2 = {"attack": L2, "validation_attack": None}
CASES = {
    "joint": {"method": AFD(hidden=8, **PGD_2), "schedule": "cosine"},
    "adam": {
        "method": AFD.adam(loss="dcgan", penalty=1.0, clip=1.0, discriminator_steps=2, **APGD_3),
        "schedule": "one-cycle",
        "eps_warmup": 1.0,
        "ema": 0.9,
    },
    "alternating": {
        "method": AFD(schedule="alternating", loss="hinge", micro_batches=2, label_smoothing=0.1, **L2_2),
        "execution": Execution("bf16", graph=True),
    },
    "natural": {"method": Natural(momentum=0.0), "schedule": "cosine"},
}
# all of the 24 steps but the first of its kind: shorter batches, steps without an answer, that before the features'
# optimizer has its state; those in which eps grows are replayed as well
REPLAYS = {"joint": 22, "adam": 20, "alternating": 22, "natural": 22}


def trainer(case, **settings):
    defaults = {"epochs": EPOCHS, "log_every": 3, "execution": Execution(graph=True)}
    return Trainer(model(), **{**defaults, **CASES[case], **settings})


def run(case, folder, **settings):
    torch.manual_seed(5)
    trained = trainer(case, folder=folder, **settings)
    history = trained.fit(batches(), batches())
    assert trained.step.steps == trained.position.global_step
    return load_checkpoint(folder / "last.pt")[0], [{**vars(report), "images_per_second": 0} for report in history]


def eagerly(monkeypatch):
    monkeypatch.setattr(recording.GraphedStep, "_capture", lambda *_: None)


def assert_same(left, right, path=""):
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}.{i}")
    else:
        assert left == right, path


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_equal_eager_ones(case, tapes, monkeypatch, tmp_path):
    """Weights, statistics, u and v, momenta, averages, random generators and losses, to the last bit."""
    replayed = run(case, tmp_path / "replayed")
    assert sum(one.replays for one in tapes) == REPLAYS[case]
    with monkeypatch.context() as patch:
        eagerly(patch)
        eager = run(case, tmp_path / "eager")
    assert sum(one.replays for one in tapes) == REPLAYS[case]
    assert_same(replayed, eager)


@pytest.mark.parametrize("case", ["joint", "adam"])
def test_what_would_be_captured_for_good_is_noticed(case, tapes, monkeypatch, tmp_path):
    """The tape is no mere function call: a seed that is a number stays the one of the capture."""
    with monkeypatch.context() as patch:
        real = recording.CapturedStep.run
        patch.setattr(recording.CapturedStep, "run", lambda self, inputs, _seed: real(self, inputs, 0))
        stale = run(case, tmp_path / "stale")
    assert not torch.equal(
        stale[0]["model"]["classifier.weight"], run(case, tmp_path / "right")[0]["model"]["classifier.weight"]
    )


def test_a_tape_knows_only_the_numbers_of_its_capture(tape):
    rate, on_device, weight = 2.0, torch.tensor(2.0), torch.ones(3)
    graph = tape.Tape()
    with graph.capture():
        weight.mul_(rate).add_(on_device)
    assert weight.tolist() == [1, 1, 1]
    rate, _ = 5.0, on_device.fill_(7.0)
    graph.replay()
    assert weight.tolist() == [9, 9, 9]
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), graph.capture():
        float(weight.sum())


def test_a_run_goes_on_from_a_checkpoint_of_captured_steps(tapes, tmp_path):
    """Exact resume: state that was on the device is there again, and the graph flag itself is free to change."""
    whole = run("adam", tmp_path / "whole")
    torch.manual_seed(5)
    first = trainer("adam", folder=tmp_path / "parts", log_every=1)
    first.callbacks = [lambda report: first.stop() if report.global_step == 14 else None]
    first.fit(batches(), batches())
    resumed = trainer("adam", folder=tmp_path / "parts", resume="auto")
    resumed.fit(batches(), batches())
    state = load_checkpoint(tmp_path / "parts" / "last.pt")[0]
    assert_same(state["model"], whole[0]["model"])
    assert_same(state["optimizers"], whole[0]["optimizers"])
    without = trainer("adam", folder=tmp_path / "parts", resume="auto", execution=Execution(), epochs=EPOCHS)
    assert len(without.fit(batches(), batches())) == EPOCHS


def test_failed_captures_are_told_once_and_change_nothing(tapes, monkeypatch, tmp_path):
    class Waits(nn.Module):
        """Waits for the device in the backward of every second pass in training: that of x', of whose gradients two
        sets are then about."""

        def forward(self, x):
            x = x * 1.0
            if self.training and next(passes) % 2 and x.requires_grad:
                x.register_hook(lambda grad: grad if float(grad.sum()) < 1e9 else -grad)
            return x

    passes = itertools.count()  # no attribute, which would speak against a capture

    def waiting():
        net = model()
        net.encoder.append(Waits())
        return net

    ends = []
    for captured in (True, False):
        torch.manual_seed(5)
        trained = Trainer(waiting(), AFD.adam(**PGD_2), epochs=3, execution=Execution(graph=True))
        with warnings.catch_warnings(record=True) as told, monkeypatch.context() as patch:
            warnings.simplefilter("always")
            if not captured:
                eagerly(patch)
            trained.fit(batches(), batches())
        told = [str(one.message) for one in told if one.category is CaptureWarning]
        expected = "steps run without a CUDA graph, because its capture failed: operation not permitted"
        assert len(told) == captured
        assert not captured or told[0].startswith(expected)
        assert trained.step.steps == 12
        ends.append([trained.network.state_dict(), trained.step.players["discriminator"].state_dict()])
    assert_same(*ends)
    assert all(one.replays == 0 for one in tapes)


def test_what_stands_against_a_capture_is_told_and_training_goes_on():
    trained = Trainer(model(), Natural(), execution=Execution(graph=True))
    with pytest.warns(CaptureWarning, match="steps run without a CUDA graph, because the model is on cpu, and"):
        (report,) = trained.fit(batches(), batches())
    assert report.global_step == BATCHES
    assert trained.step.optimizers["task"].param_groups[0]["lr"] == pytest.approx(
        0.01
    )  # a number, as without the graph
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(model(), Natural()).fit(batches(), batches())


def test_obstacles():
    cuda, step = torch.device("cuda"), AFD().build(model())
    assert recording.obstacle(cuda, 1, step) is None
    assert recording.obstacle(cuda, 1, Natural(optimizer="adam").build(model())) is None
    assert recording.obstacle(cuda, 2, step) == "2 processes average their gradients in them"
    own = AFD(attack=GivenAttack(lambda _model: lambda x, _y: x)).build(model())
    assert recording.obstacle(cuda, 1, own) == "the attack is a function, none of those in afd.attacks"
    adagrad = Natural(optimizers={"task": torch.optim.Adagrad}).build(model())
    assert recording.obstacle(cuda, 1, adagrad) == (
        "the optimizer 'task' is a Adagrad; those that can be captured are SGD, Adam, AdamW"
    )


def test_what_a_graph_writes_to_is_kept(tapes):
    """The weights of joined layers belong to the attack, which lets go of them when it sees the layers changed."""
    trained = trainer("joint", epochs=2)
    trained.fit(batches(), batches())
    captured = held(trained.run_step.cache)
    assert captured
    (attack,) = trained.step.attacks
    pairs = attack._joining.pairs
    assert pairs
    assert all(set(pairs.values()) <= set(one.kept[1][0]) for one in captured)


def test_weights_that_move_make_another_capture(tapes):
    net = model()
    graphed = recording.GraphedStep(net, Natural().build(net), CPU)
    x, y = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    for _ in range(4):
        graphed(x, y, seed=0)
    assert [one.replays for one in tapes] == [3]
    net.classifier.weight.data = net.classifier.weight.data.clone()
    for _ in range(2):
        graphed(x, y, seed=0)
    assert [one.replays for one in tapes] == [3, 1]
    for rows in (1, 2, 3) * 3:
        graphed(x[:rows], y[:rows], seed=0)
    assert len(held(graphed.cache)) <= KEPT


def test_attacks_capture_nothing_where_whole_steps_are_captured(tapes, tape, monkeypatch):
    """A graph of their own would be looked at, which is not permitted in a capture, and hold memory twice."""
    made = []
    monkeypatch.setattr(replay, "Graph", lambda _: made.append(tape.Tape()) or made[-1])
    for module in (base, replay):
        monkeypatch.setattr(module, "capturable", lambda _: not tape.Tape.recording)
    trained = trainer("adam")
    trained.fit(batches(), batches())
    assert not trained.run_step.cache.refused
    assert sum(one.replays for one in tapes) == REPLAYS["adam"]
    assert not made


def trained_with(steps_later):
    """Weights after four epochs, the training attack's steps changed by a callback after two of them."""
    torch.manual_seed(5)
    trained = trainer("joint", epochs=4)

    def change(report):
        (attack,) = trained.step.attacks
        attack.steps = steps_later if report.epoch >= 2 else 2

    trained.callbacks = [change]
    trained.fit(batches(), batches())
    return trained.network.state_dict()


def test_settings_of_the_attack_that_a_callback_changes_make_another_capture(tapes, monkeypatch):
    replayed = trained_with(steps_later=6)
    assert not torch.equal(replayed["classifier.weight"], trained_with(steps_later=2)["classifier.weight"])
    eagerly(monkeypatch)
    assert_same(replayed, trained_with(steps_later=6))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("begun", [False, True])
def test_recordable_optimizers_take_the_same_steps(kind, begun):
    """Beside torch's own; also one that has taken steps already, and with rates that change."""
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.5, 0.9)}
    torch.manual_seed(0)
    start = torch.randn(3, 5)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    recordable, plain = (kind([p], lr=0.1, weight_decay=0.01, **settings) for p in (ours, theirs))
    for step in range(5):
        if step == (2 if begun else 0):
            make_recordable(recordable, CPU)
        grad = torch.randn(3, 5)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        for optimizer in (recordable, plain):
            rate = optimizer.param_groups[0]["lr"]
            if isinstance(rate, torch.Tensor):
                rate.fill_(0.1 / (step + 1))
            else:
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours, start)


# --- On a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(cuda, case, **settings):
    torch.manual_seed(5)
    defaults = {"epochs": EPOCHS, "log_every": 3, "execution": Execution(graph=True)}
    net = model().to(cuda)
    net.encoder[4] = nn.Identity()  # dropout draws otherwise in a graph
    return Trainer(net, **{**defaults, **CASES[case], **settings})


GPU_CASES = [case for case in CASES if case != "adam"]  # whose gradient penalty draws at random


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_captured_steps_train_as_eager_ones_do(case, cuda, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        captured = on_gpu(cuda, case)
        ours = captured.fit(batches(cuda), batches(cuda))
    assert held(captured.run_step.cache)
    assert not captured.run_step.cache.refused
    with monkeypatch.context() as patch:
        eagerly(patch)
        eager = on_gpu(cuda, case)
        theirs = eager.fit(batches(cuda), batches(cuda))
    for a, b in zip(ours, theirs, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-3, abs=1e-3)
    for name, weight in captured.network.state_dict().items():
        torch.testing.assert_close(weight, eager.network.state_dict()[name], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_captured_steps_of_adam_train(cuda):
    trained = on_gpu(cuda, "adam")
    history = trained.fit(batches(cuda), batches(cuda))
    assert held(trained.run_step.cache)
    assert all(value == value for report in history for value in report.losses.values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_never_waits_for_the_device(case, cuda):
    trained = on_gpu(cuda, case, eps_warmup=0.0)
    trained.fit(batches(cuda), batches(cuda))
    x, y = next(iter(batches(cuda)))
    trained.network.train()
    for _ in range(4):
        trained.run_step(x, y, seed=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trained.run_step(x, y, seed=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
