"""Whatever a trainer writes is evaluated as what was trained: the report has the figure that is measured in Python."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import afd.nn
from afd.attacks import PGDSettings
from afd.cli import main
from afd.data import Images
from afd.errors import AfdError
from afd.evaluation import accuracy, command
from afd.evaluation import protocol as protocols
from afd.evaluation.attacks import Epsilon
from afd.evaluation.command import EvaluateConfig, load, name_of, trained_at
from afd.evaluation.model import Model, architecture
from afd.evaluation.outcome import read_results
from afd.methods import AFD, METHODS, Execution, Natural
from afd.nn.networks import from_recipe, recipe_of
from afd.training import CheckpointError, Trainer, load_checkpoint, load_weights, save_checkpoint, save_weights
from afd.training.rebuilt import rebuild

CPU = torch.device("cpu")
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def some(name="digits", classes=10, count=40):
    """Images of a data set's shape whose classes are their brightness, so that a few steps teach something."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % classes
    noise = torch.rand(count, *SHAPES[name], generator=generator)
    pixels = (noise * 40 + labels.view(-1, 1, 1, 1) * 20).to(torch.uint8)
    return Images(pixels, labels, 255.0, classes, name)


def batches(images):
    return [(images.images(rows), images.labels[rows]) for rows in torch.arange(len(images)).split(20)]


class LeNet(nn.Module):
    """A network of one's own, with a view that channels-last tensors do not have."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body, self.head = nn.Linear(6 * 16, 12), nn.Linear(12, classes)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 2)
        return self.head(self.body(x.reshape(len(x), -1)).relu())


def small(name="digits", network="convnet", width=2, normalize=True):
    torch.manual_seed(0)
    model = afd.nn.build_model(network, SHAPES[name], 10, width)
    model.normalize = normalize
    return model


def lenet():
    torch.manual_seed(0)
    return LeNet()


PGD_1 = {"attack": PGDSettings(eps=0.05, alpha=0.05, steps=1), "validation_attack": None}
GAME = {"lr": 0.05, "lr_discriminator": 0.01, "lr_features": 0.01, **PGD_1}
# name: (data, model, method, further settings of the trainer, whether the checkpoint names its network)
CASES = {
    "natural": ("digits", small, Natural(lr=0.05), {}, True),
    "afd": ("digits", small, AFD(**GAME), {}, True),
    "hinge": ("digits", small, AFD("hinge", hidden=7, **GAME), {}, True),
    "dcgan, alternating": ("digits", small, AFD("dcgan", "alternating", **GAME), {}, True),
    "average": ("digits", small, Natural(lr=0.05), {"ema": 0.5}, True),
    "features as they are": ("digits", lambda: small(normalize=False), AFD(**GAME), {}, True),
    "compiled": ("digits", lambda: torch.compile(small(), backend="eager"), Natural(lr=0.05), {}, True),
    "mnist": ("mnist", lambda: small("mnist"), Natural(lr=0.05), {}, True),
    "cifar, resnet18": ("cifar10", lambda: small("cifar10", "resnet18"), AFD(**GAME), {"ema": 0.5}, True),
    "a config of one's own": (
        "digits",
        small,
        Natural(),
        {"config": {"data": "digits", "model": 3, "method": []}},
        True,
    ),
    "lenet": ("digits", lenet, Natural(lr=0.05), {"ema": 0.5}, False),
    "lenet, features scaled": ("digits", lenet, AFD(**GAME), {"normalize": True, "ema": 0.5}, False),
    "lenet, features not scaled": ("digits", lenet, AFD(**GAME), {"normalize": False}, False),
    "lenet, another layer": ("digits", lenet, AFD(**GAME), {"feature_layer": "body", "normalize": True}, False),
    "lenet, compiled": ("digits", lambda: torch.compile(lenet(), backend="eager"), Natural(), {}, False),
}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Twenty images of the trainers' data sets and one cheap attack: what is measured is the clean figure."""
    monkeypatch.setattr(protocols, "QUICK_QUERIES", 2)
    monkeypatch.setattr("afd.data.load", lambda name, *_, **__: type("Splits", (), {"test": some(name)}))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, from which --model takes functions."""
    names = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\n"
    (tmp_path / "mine_of_rebuild.py").write_text(
        names + "import torch\nfrom test_rebuild import LeNet, lenet, small\nfrom afd.nn import ConvNet, FeatureSplit\n"
        "def other():\n    torch.manual_seed(9)\n    return LeNet()\n"
        "def split():\n    return FeatureSplit(LeNet(), 'head', True)\n"
        "def few():\n    return LeNet(3)\n"
        "def plain():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    return "mine_of_rebuild:"


def trained(case, folder):
    data, build, method, settings, _ = CASES[case]
    execution = Execution(channels_last="lenet" not in case)
    trainer = Trainer(build(), method, epochs=2, folder=folder, execution=execution, **settings)
    trainer.fit(batches(some(data)), batches(some(data)))
    return trainer


def clean_of(capsys, *words):
    out = Path(f"report-{len(list(Path().glob('report-*')))}")
    assert main(["evaluate", *map(str, words), "--images", "40", "--batch-size", "20", "--out", str(out)]) == 0, (
        capsys.readouterr().err
    )
    return read_results(out)


@pytest.mark.filterwarnings("ignore:model is compiled")
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_evaluated_as_what_was_trained(case, tmp_path, mine, monkeypatch, capsys):
    trainer = trained(case, tmp_path / "run")
    data, *_, named = CASES[case]
    wanted = accuracy(trainer.evaluated, batches(some(data)))
    function = [] if named else ["--model", f"{mine}other"]
    monkeypatch.setattr("afd.evaluation.command.named", cheap)
    results = clean_of(capsys, tmp_path / "run" / "last.pt", "--data", data, *function)
    assert results["clean"] == wanted
    model = load(str(tmp_path / "run" / "last.pt"), CPU, *function[1:])
    x = some(data).images()
    same(model.network(x), trainer.evaluated.eval()(x))
    assert (model.discriminator is not None) == isinstance(trainer.method, AFD)
    if model.discriminator is not None:
        z, y = trainer.evaluated.features(x), some(data).labels
        same(model.discriminator(z, y), trainer.step.players["discriminator"].eval()(z, y))
    if not named:
        with pytest.raises(CheckpointError, match=r"does not say which network it holds; name .* --model"):
            load(str(tmp_path / "run" / "last.pt"), CPU)


def same(one, other):
    """Equal but for the rounding of another memory layout."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def cheap(*_, trained_at, **__):
    from afd.evaluation.attacks import Stage
    from afd.evaluation.protocol import Protocol

    stages = [Stage("pgd", "pgd", "Linf", (trained_at,), {"steps": 1}, first=4)]
    stages += [s for s in protocols.probes("Linf", trained_at) if s.attack in ("noise", "fgsm", "pgd")]
    few = [dataclasses.replace(stage, settings=dict.fromkeys(stage.settings, 1), first=4) for stage in stages]
    return Protocol("quick", "Linf", trained_at, tuple(few))


@pytest.mark.parametrize("case", ["average", "lenet", "lenet, features scaled", "lenet, another layer"])
def test_plain_weights_are_evaluated_as_what_was_trained(case, tmp_path, mine, monkeypatch, capsys):
    trainer = trained(case, None)
    save_weights(str(tmp_path / "model.pt"), trainer.evaluated)
    wanted = accuracy(trainer.evaluated, batches(some()))
    monkeypatch.setattr("afd.evaluation.command.named", cheap)
    function = [] if CASES[case][-1] else ["--model", f"{mine}other"]
    assert clean_of(capsys, tmp_path / "model.pt", "--data", "digits", *function)["clean"] == wanted
    if function:
        again = clean_of(capsys, tmp_path / "model.pt", "--data", "digits", "--model", f"{mine}split")
        assert again["clean"] == wanted


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_any_state_dict_of_any_model(wrap, tmp_path, mine):
    """Without a linear layer before the logits, even, and under the names of a wrapper."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save(wrap(model).state_dict(), tmp_path / "any.pth")
    x = some().images()
    assert torch.equal(load(str(tmp_path / "any.pth"), CPU, f"{mine}plain").network(x), model(x))


def test_a_runs_folder_stands_for_its_best_checkpoint(tmp_path):
    trained("natural", tmp_path / "run")
    assert load(str(tmp_path / "run"), CPU).source == str(tmp_path / "run" / "best.pt")
    with pytest.raises(CheckpointError, match=r"is a folder without best\.pt"):
        load(str(tmp_path), CPU)


def test_what_does_not_fit_is_told_in_one_line(tmp_path, mine, capsys):
    trained("lenet", tmp_path / "run")
    checkpoint = tmp_path / "run" / "best.pt"
    save_weights(tmp_path / "w.pt", lenet())
    torch.save({"epoch": 3, "mine": lenet().state_dict()}, tmp_path / "nested.pt")
    torch.save({"E_state_dict": {}, "epoch": 3}, tmp_path / "released.pt")

    def told(*words):
        assert main(["evaluate", *map(str, words), "--out", "x"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("afd: error: ")
        assert error.count("\n") == 1
        assert len(error) < 700
        return error

    assert "does not load into a LeNet: its last layer, head, has 10 classes there and 3 here" in told(
        checkpoint, "--model", f"{mine}few"
    )
    assert "does not load into a FeatureClassifier" in told(checkpoint, "--model", f"{mine}small")
    assert "does not load into a Sequential" in told(tmp_path / "w.pt", "--model", f"{mine}plain")
    assert "w.pt does not say which network it holds" in told(tmp_path / "w.pt", "--data", "digits")
    assert "holds no state_dict of a model, but epoch, mine" in told(tmp_path / "nested.pt")
    assert "see afd.training.released" in told(tmp_path / "released.pt")
    assert "name it with --data" in told(checkpoint, "--model", f"{mine}lenet")
    assert "does not take mnist's 1x28x28 images" in told(checkpoint, "--model", f"{mine}lenet", "--data", "mnist")
    assert "is a function already" in told(f"{mine}lenet", "--model", f"{mine}lenet", "--data", "digits")
    assert "has no 'nothing'" in told(checkpoint, "--model", f"{mine}nothing", "--data", "digits")
    assert "checkpoint is missing" in told("--model", f"{mine}lenet")
    assert "transfer-from is missing" in told(checkpoint, "--transfer-model", f"{mine}lenet")
    assert "was trained on 'flowers', of which afd knows no" in told(flowers(tmp_path))
    assert not Path("x").exists()


def flowers(folder):
    model = small()
    network = {"recipe": recipe_of(model), "normalize": True}
    save_checkpoint(
        folder / "f.pt", {"model": model.state_dict()}, {"network": network, "config": {"data": {"name": "flowers"}}}
    )
    return folder / "f.pt"


def test_a_model_that_was_changed_since_it_was_built_has_no_recipe():
    built = small()
    assert recipe_of(built) == {
        "name": "convnet", "shape": [1, 8, 8], "classes": 10, "width": 2, "activation": "relu", "normalize": True,
    }  # fmt: skip
    assert recipe_of(copy.deepcopy(built)) == recipe_of(built)
    changed = small()
    changed.encoder.layers[1] = nn.GELU()
    assert recipe_of(changed) is None
    smooth = small("cifar10", "resnet18")
    assert recipe_of(smooth) is not None
    smooth.encoder.stages[1].activation = nn.functional.silu
    assert recipe_of(smooth) is None
    hooked = small()
    hooked.encoder.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert recipe_of(hooked) is None
    assert recipe_of(afd.nn.FeatureClassifier(nn.Flatten(), 64, 10)) is None
    assert recipe_of(nn.Linear(2, 2)) is None


def test_another_head_and_other_settings_are_in_the_recipe():
    model = small(normalize=False)
    model.classifier, model.num_classes = nn.Linear(128, 3), 3
    again = from_recipe(recipe_of(model))
    again.load_state_dict(model.state_dict())
    x = some().images()
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("network", ["convnet", "resnet18", "preactresnet18", "wideresnet28-10", "vgg11-bn"])
def test_the_activation_is_in_the_recipe_and_is_relu_in_those_that_do_not_say(network):
    torch.manual_seed(0)
    model = afd.nn.build_model(network, SHAPES["cifar10"], 10, 1, "softplus").eval()
    recipe = recipe_of(model)
    again = from_recipe(recipe).eval()
    again.load_state_dict(model.state_dict())
    x = some("cifar10", count=4).images()
    assert torch.equal(again(x), model(x))
    earlier = from_recipe({name: one for name, one in recipe.items() if name != "activation"}).eval()
    earlier.load_state_dict(model.state_dict())
    relu = afd.nn.build_model(network, SHAPES["cifar10"], 10, 1).eval()
    relu.load_state_dict(model.state_dict())
    assert torch.equal(earlier(x), relu(x))
    assert not torch.equal(earlier(x), model(x))


def test_a_table_names_the_network_and_an_activation_that_is_not_relu():
    for activation, words in {"relu": "resnet18 (width 2)", "silu": "resnet18 (width 2, silu)"}.items():
        model = afd.nn.build_model("resnet18", SHAPES["cifar10"], 10, 2, activation)
        assert architecture(Model("x", "x", model, metadata={"network": {"recipe": recipe_of(model)}})) == words
    old = {"config": {"model": {"name": "convnet", "width": 8, "normalize": True}}}
    assert architecture(Model("x", "x", model, metadata=old)) == "convnet (width 8)"


def test_asking_for_a_recipe_draws_no_random_numbers():
    model, before = small(), torch.get_rng_state()
    recipe_of(model)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("normalize", [True, False, None])
def test_checkpoints_of_earlier_days_say_how_features_were_scaled(normalize, tmp_path, mine):
    """They have no "network"; "scaled for" and the weights' marker say it."""
    torch.manual_seed(0)
    trainer = Trainer(lenet(), Natural(lr=0.05), epochs=1, folder=tmp_path / "run", normalize=normalize)
    trainer.fit(batches(some()), batches(some()))
    state, metadata = load_checkpoint(tmp_path / "run" / "last.pt")
    del metadata["network"]
    save_checkpoint(tmp_path / "old.pt", state, metadata)
    x = some().images()
    found = load(str(tmp_path / "old.pt"), CPU, f"{mine}other").network
    same(found(x), trainer.network.eval()(x))
    assert found.normalize is normalize


# --- Methods that nobody knows, and checkpoints of the time before methods had attacks --------------------------------


@pytest.mark.parametrize("told", ["evaluate", "rebuild", "weights"])
@pytest.mark.parametrize("where", ["method", "config"])
@pytest.mark.parametrize("name", ["nonsense", "natural+nonsense", ["at"], {"lr": 1}])
def test_a_checkpoint_of_an_unknown_method_is_refused_by_name(name, where, told, tmp_path, monkeypatch, capsys):
    trained("natural", tmp_path / "run")
    state, metadata = load_checkpoint(tmp_path / "run" / "last.pt")
    if where == "method":
        metadata["method"] = name
    else:  # as was written before
        del metadata["method"]
        metadata["config"] = {"method": {"name": name}}
    path = tmp_path / "odd.pt"
    save_checkpoint(path, state, metadata)
    message = f"checkpoint {path} is of the method {name!r}; known are {', '.join(METHODS)}"
    if told == "rebuild":
        with pytest.raises(CheckpointError) as refused:
            rebuild(path)
        assert str(refused.value) == message
        return
    monkeypatch.undo()  # of the few images
    words = {
        "evaluate": ["evaluate", str(path), "--data", "digits"],
        "weights": ["train", "--width", "2", "--weights", str(path)],
    }
    assert main([*words[told], "--out", str(tmp_path / "out")]) == 2
    assert f"afd: error: {message}\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mine_of_nobody:Method", "a.b.c:D.E", "at+mine_of_nobody:Wrapper", "natural"])
def test_somebodys_own_method_need_not_be_there_to_look_at_its_network(name, tmp_path):
    trainer = trained("natural", tmp_path / "run")
    state, metadata = load_checkpoint(tmp_path / "run" / "last.pt")
    save_checkpoint(tmp_path / "own.pt", state, {**metadata, "method": name})
    x = some().images()
    same(rebuild(tmp_path / "own.pt").network(x), trainer.network.eval()(x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Natural):
    """Somebody's own method."""


def test_a_checkpoint_says_which_method_it_is_of(tmp_path):
    for number, (method, name) in enumerate([(Natural(), "natural"), (AFD(**GAME), "afd"), (Own(), f"{__name__}:Own")]):
        trainer = Trainer(small(), method, folder=tmp_path / str(number))
        trainer.fit(batches(some()), batches(some()))
        rebuilt = rebuild(tmp_path / str(number))
        assert rebuilt.metadata["method"] == name
        assert (rebuilt.discriminator is not None) == (name == "afd")


def earlier(path, method, attack=None):
    """A checkpoint of `afd train` as it was written when attacks were not their method's own; returns its network."""
    trainer = trained("afd" if method["name"] == "afd" else "natural", path.parent / "trained")
    state, metadata = load_checkpoint(path.parent / "trained" / "last.pt")
    config = {
        "data": {"name": "digits", "root": None, "validation": 0.1, "batch_size": 128, "augment": False},
        "model": {"name": "convnet", "width": 2, "normalize": True},
        "attack": {"name": "pgd", "eps": 0.15, "steps": 1, "alpha": None, "eval_steps": 20, **(attack or {})},
        "method": {
            "optimizer": "sgd", "lr": 0.1, "lr_discriminator": 0.1, "lr_features": 0.5, "momentum": 0.9,
            "weight_decay": 1e-4, "label_smoothing": 0.0, "clip": None, "micro_batches": 1, "discriminator_steps": 1,
            "penalty": 0.0, "loss": "wgan", "schedule": "simultaneous", **method,
        },
        "epochs": 2, "lr_schedule": "step", "milestones": [0.5, 0.8333333333333334], "eps_warmup": 0.0, "ema": None,
        "precision": "fp32", "compile": False, "sync_batchnorm": False, "graph": False, "seed": 0, "device": "auto",
        "out": "runs/0001", "overwrite": False, "resume": None, "weights": None, "save_every": 0, "log_every": 50,
    }  # fmt: skip
    del metadata["method"]
    metadata |= {"config": config, "run": {"afd": metadata["afd"], "processes": 1, **config}}
    save_checkpoint(path, state, metadata)
    return trainer.network.eval()


@pytest.mark.parametrize(("method", "name"), [({"name": "afd"}, "AFD-WGAN"), ({"name": "natural"}, "natural")])
def test_a_checkpoint_of_earlier_attacks_is_rebuilt_and_evaluated(method, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = earlier(tmp_path / "old.pt", method)
    rebuilt, x = rebuild(tmp_path / "old.pt"), some().images()
    same(rebuilt.network(x), network(x))
    assert (rebuilt.discriminator is not None) == (method["name"] == "afd")
    model = load(str(tmp_path / "old.pt"), CPU)
    assert trained_at(model, "digits") == Epsilon.of("0.15")
    monkeypatch.setattr("afd.evaluation.command.named", cheap)
    results = clean_of(capsys, tmp_path / "old.pt")
    assert results["clean"] == accuracy(network, batches(some()))
    assert results["subject"]["name"] == name
    assert results["protocol"]["reference"]["text"] == "0.15"


def test_the_radius_of_an_earlier_trainers_attack_is_found(tmp_path):
    """Without a config: what was said of the trainer's own settings."""
    network = small()
    for attack, eps in (({"name": "PGD", "eps": 0.05, "steps": 1}, "0.05"), (None, "0.2")):
        model = Model("", "", network, metadata={"run": {"attack": attack, "method": {"name": "AFD"}}})
        assert trained_at(model, "digits") == Epsilon.of(eps)


def test_a_checkpoint_of_earlier_attacks_may_be_begun_with_and_not_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # of the few images
    old, few = tmp_path / "old.pt", ["--width", "2", "--limit", "20", "--attack-steps", "1", "--eval-steps", "1"]
    monkeypatch.setattr("afd.experiments.train.TEST_STEPS", 1)
    network = earlier(old, {"name": "afd"})
    begun = ["train", "--epochs", "1", *few, "--weights", str(old), "--out", str(tmp_path / "new")]
    still = ["--lr", "1e-12", "--lr-features", "0", "--weight-decay", "0"]
    assert main([*begun, *still]) == 0
    weights = torch.load(tmp_path / "new" / "model.pt")
    for name, value in network.named_parameters():
        torch.testing.assert_close(weights[name], value.detach(), rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main(["train", "--epochs", "2", *few, "--resume", str(old), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"afd: error: {old} is of an afd in which attacks were not their method's own; its run cannot be gone on with, "
        "but another may begin with its weights (--weights)"
    )
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
    with pytest.raises(CheckpointError, match="attacks were not their method's own"):
        Trainer(small(), AFD(**GAME), resume=old, epochs=2).fit(batches(some()), batches(some()))


# --- What a checkpoint says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss": "wgan", "adversarial_weight": 0.0, "divergence_weight": 0.0}, "AFD-WGAN"),
        ({"loss": "wgan", "adversarial_weight": 0.5}, "AFD-WGAN + CE(x')"),
        ({"loss": "dcgan", "adversarial_weight": 0.5, "divergence_weight": 1.0}, "AFD-DCGAN + CE(x') + KL"),
    ],
)
def test_an_afd_with_terms_that_the_papers_has_not_is_called_so(settings, name):
    metadata = {"config": {"method": {"name": "afd", **settings}}}
    assert name_of(SimpleNamespace(metadata=metadata, path=Path("best.pt"))) == name


def test_names_and_radii_follow_the_run(tmp_path):
    for case, name in (("natural", "natural"), ("hinge", "AFD-HINGE"), ("dcgan, alternating", "AFD-DCGAN")):
        trained(case, tmp_path / case)
        rebuilt = rebuild(tmp_path / case)
        assert name_of(rebuilt) == name
        eps = "0.2" if case == "natural" else "0.05"
        assert str(trained_at(Model("", "", rebuilt.network, metadata=rebuilt.metadata), "digits")) == eps


@pytest.mark.parametrize("attack", [{"eps": [0.1, 0.2]}, {"eps": "0.1"}, {"eps": 0.5, "norm": "L2"}, "pgd", None])
def test_a_radius_that_is_none_in_linf_is_not_taken(attack):
    model = Model("", "", nn.Identity(), metadata={"config": {"attack": attack}})
    assert trained_at(model, "digits") == Epsilon.of("0.2")


@pytest.mark.parametrize("noted", ["digits", {"name": 3}, {"root": "x"}, 3, None, []])
def test_a_config_of_ones_own_may_hold_anything(noted, tmp_path):
    model = Model("", "p.pt", nn.Identity(), metadata={"config": {"data": noted}})
    with pytest.raises(AfdError, match="name it with --data"):
        command.test_images(EvaluateConfig("p.pt"), model, type("Place", (), {"leads": True}))
    found = command.test_images(EvaluateConfig("p.pt", data="digits"), model, type("Place", (), {"leads": True}))
    assert len(found) == 40


def test_what_weights_belong_to_another_network_is_said_by_load_weights(tmp_path):
    save_weights(tmp_path / "w.pt", lenet())
    with pytest.raises(CheckpointError, match="does not load into a LeNet"):
        load_weights(tmp_path / "w.pt", LeNet(3))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(tmp_path / "none.pt", LeNet())
