"""Models that somebody else wrote: where their head is registered, what is wrapped around them, what they return."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from afd.attacks import PGDSettings
from afd.errors import InputError, InputTypeError
from afd.evaluation import accuracy
from afd.methods import AFD, Execution, Natural
from afd.methods.attacking import GivenAttack
from afd.nn import FeatureClassifier, split
from afd.nn.classifier import MARKER
from afd.training import CheckpointError, Trainer, load_checkpoint, load_weights, save_checkpoint, save_weights

X = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4
BATCHES = [(X, Y)] * 2
PGD_1 = PGDSettings(eps=0.1, alpha=2 / 255, steps=1)
ATTACKED = {"lr": 0.01, "attack": PGD_1, "validation_attack": None}  # of the methods that attack


class Body(nn.Module):
    """Two linear layers called in the order of their names, whatever the order they are registered in."""

    def __init__(self, *order):
        super().__init__()
        layers = {"body": nn.Linear(16, 8), "head": nn.Linear(8, 4), **self.others()}
        for name in order or layers:
            self.add_module(name, layers[name])

    def others(self):
        return {}

    def raw(self, x):
        return self.body(x).relu()

    def forward(self, x):
        return self.head(self.raw(x))


class Projected(Body):
    def others(self):
        return {"projection": nn.Linear(8, 32)}


class Gated(Body):
    def others(self):
        return {"gate": nn.Linear(8, 8)}

    def raw(self, x):
        h = super().raw(x)
        return h * self.gate(h).sigmoid()


class Auxiliary(Body):
    """A second head of as many classes, which the logits do not come from; called or not."""

    called = True

    def others(self):
        return {"auxiliary": nn.Linear(16, 4)}

    def forward(self, x):
        return (super().forward(x), self.auxiliary(x)) if self.called else super().forward(x)


class Averaged(Auxiliary):
    def forward(self, x):
        return sum(super().forward(x)) / 2


class Cooled(Body):
    def forward(self, x):
        return super().forward(x) / 3


class Padded(Body):
    def forward(self, x):
        return nn.functional.pad(super().forward(x), (0, 2))


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Attention(nn.Module):
    """Tokens of a row each; the head is registered before the encoder."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)
        self.embed = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x.unflatten(1, (4, 4)))).mean(1))


class LastIsAttention(Body):
    def others(self):
        return {"attention": nn.MultiheadAttention(8, 2, batch_first=True)}

    def raw(self, x):
        h = super().raw(x)[:, None]
        return self.attention(h, h, h)[0][:, 0]


def fit(model, method=None, **settings):
    torch.manual_seed(1)
    trainer = Trainer(model, method or AFD(**ATTACKED), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what tuples hold
        trainer.fit(BATCHES, BATCHES)
    return trainer


@pytest.mark.parametrize(
    ("model", "features", "classes"),
    [
        (lambda: Projected(), 8, 4),
        (lambda: Gated(), 8, 4),
        (lambda: Body("head", "body"), 8, 4),
        (lambda: Auxiliary(), 8, 4),
        (lambda: Averaged(), 8, 4),
        (lambda: Padded(), 8, 6),
        (lambda: Attention(), 8, 4),
        (lambda: LastIsAttention(), 8, 4),
    ],
)
def test_a_named_layer_is_enough_wherever_it_is_registered(model, features, classes):
    torch.manual_seed(0)
    model = model()
    before = copy.deepcopy(model.state_dict())
    trainer = fit(model, feature_layer="head")
    discriminator = trainer.step.players["discriminator"]
    assert (discriminator.num_features, discriminator.num_classes) == (features, classes)
    assert trainer.network.num_classes == classes
    assert not torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(next(iter(model.parameters())), next(iter(before.values())))


def test_a_named_hidden_layer_whose_width_no_other_layer_has_is_settled_by_the_first_images():
    class Pooled(nn.Sequential):
        def forward(self, x):
            return self[2](nn.functional.max_pool1d(self[1](self[0](x)), 2))

    model = Pooled(nn.Linear(16, 12), nn.ReLU(), nn.Linear(6, 4))
    trainer = Trainer(model, AFD(**ATTACKED), feature_layer="0", ema=0.5)
    assert trainer.step.players["discriminator"].num_classes == 12  # as the widths say
    trainer.fit(BATCHES, BATCHES)
    assert trainer.step.players["discriminator"].num_classes == trainer.evaluated.num_classes == 4
    model = Pooled(nn.Linear(16, 12), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(InputError, match=r"give its number of classes to afd.nn.split as num_classes"):
        AFD(lr=0.01).build(split(model, "0"))(X, Y, x_adv=X)
    AFD(lr=0.01).build(split(model, "0", num_classes=4))(X, Y, x_adv=X)


@pytest.mark.parametrize("model", [Body, Cooled, LastIsAttention, lambda: Gated("body", "gate", "head")])
def test_the_last_linear_layer_is_found_where_nothing_is_named(model):
    trainer = fit(model())
    assert trainer.network.feature_layer == "head"
    assert trainer.step.players["discriminator"].num_features == 8


def test_features_are_what_enters_a_head_that_is_more_than_a_plain_layer():
    class Own(nn.Linear):
        pass

    heads = [Own(8, 4), parametrizations.weight_norm(nn.Linear(8, 4)), parametrizations.spectral_norm(nn.Linear(8, 4))]
    for head in heads:
        model = Body()
        model.head = head
        trainer = fit(model)
        assert trainer.network.feature_layer == "head"
        torch.testing.assert_close(
            trainer.network.features(X), nn.functional.normalize(model.raw(X)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Body("head", "body"), "the last linear layer is 'body', but the logits are what 'head' puts out"),
        (Projected, "the last linear layer is 'projection', but the logits are what 'head' puts out"),
        (Auxiliary, "the last linear layer is 'auxiliary', but the logits are what 'head' puts out"),
        (Attention, "the last linear layer is 'encoder.layers.0.linear2', but the logits are what 'head' puts out"),
        (Averaged, r"'auxiliary', but what it puts out, \[6, 4\], is not the logits, .*: 'head', 'auxiliary'\)"),
        (Padded, r"'head', but what it puts out, \[6, 4\], is not the logits, \[6, 6\] \(of that shape: none\)"),
    ],
)
@pytest.mark.parametrize("method", [AFD(**ATTACKED), Natural(lr=0.01)])
def test_a_last_layer_that_the_logits_do_not_come_from_is_named_before_training(model, message, method):
    trained = model()
    before = copy.deepcopy(trained.state_dict())
    with pytest.raises(InputError, match=f"{message}.*name the layer that the features enter as feature_layer"):
        fit(trained, method)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_an_adapter_around_the_head_is_named_and_its_base_can_be():
    model = Body()
    model.head = Adapted(model.head)
    with pytest.raises(InputError, match=r"'head.up', but what it puts out, .*: 'head.base', 'head.up'\)"):
        fit(model)
    trainer = fit(model, feature_layer="head.base")
    assert (trainer.network.num_features, trainer.network.num_classes) == (8, 4)


def test_what_has_no_features_is_named_at_construction():
    lazy = nn.Sequential(nn.Linear(16, 8), nn.LazyLinear(4))
    with pytest.raises(InputError, match=r"the model's 1.weight has no shape yet; call the model once"):
        Trainer(lazy, AFD())
    lazy(X)
    assert fit(lazy).network.num_features == 8
    with pytest.raises(InputError, match=r"model is a Sequential without a linear layer, which features would enter$"):
        Trainer(nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten()), AFD())
    with pytest.raises(InputError, match=r"feature_layer is 'attention.out_proj'; the model's linear layers are body"):
        Trainer(LastIsAttention(), AFD(), feature_layer="attention.out_proj")
    with pytest.raises(InputTypeError, match=r"model is a function; it must be a torch.nn.Module"):
        Trainer(lambda x: x, AFD())
    with torch.inference_mode():
        made = Body()
    with pytest.raises(InputError, match=r"the model's body.weight was made in torch.inference_mode"):
        Trainer(made, AFD())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [torch.jit.script, lambda m: torch.jit.trace(m, X), lambda m: torch.jit.freeze(torch.jit.script(m.eval()))],
)
def test_a_torchscript_model_is_named_at_construction(make):
    with pytest.raises(InputError, match=r"without a linear layer.*; pass the Python module that the TorchScript"):
        Trainer(make(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))), Natural())


def test_an_exported_program_is_named_at_construction():
    exported = torch.export.export(Body(), (X,)).module()
    with pytest.raises(InputError, match=r"without a linear layer.*; pass the Python module that the TorchScript or"):
        Trainer(exported, Natural())


def test_images_that_a_model_does_not_take_are_named_before_training():
    with pytest.raises(InputError, match=r"the model does not take images \[6, 16\] of torch.float32: .*dtype"):
        Trainer(Body().double(), Natural()).fit(BATCHES, BATCHES)
    with pytest.raises(InputError, match=r"x is torch.float32 and the model torch.float64"):
        Trainer(FeatureClassifier(nn.Linear(16, 8), 8, 4).double(), Natural()).fit(BATCHES, BATCHES)
    with pytest.raises(InputError, match=r"the model does not take images \[6, 3\] of torch.float32"):
        Trainer(Body(), Natural()).fit([(X[:, :3], Y)], [(X[:, :3], Y)])


# --- Wrappers --------------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (compiled, r"model is compiled; .*Execution\(compile=True\) compiles the passes"),
        (nn.DataParallel, "model is a DataParallel; the module inside of it is trained, on one device"),
        (lambda model: compiled(nn.DataParallel(model)), "model is compiled"),
    ],
)
def test_the_module_inside_of_a_wrapper_is_trained(wrap, message, tmp_path):
    torch.manual_seed(0)
    model, method = Body(), AFD(**ATTACKED)
    plain = copy.deepcopy(model)
    wrapped = wrap(model)
    with pytest.warns(UserWarning, match=message):
        trainer = Trainer(wrapped, method, folder=tmp_path)
    torch.manual_seed(1)
    trainer.step = method.build(trainer.network)  # drawn as that of the plain model is
    trainer.fit(BATCHES, BATCHES)
    other = Trainer(plain, method)
    torch.manual_seed(1)
    other.step = method.build(other.network)
    other.fit(BATCHES, BATCHES)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert list(load_checkpoint(tmp_path / "last.pt")[0]["model"]) == list(plain.state_dict())
    save_weights(tmp_path / "model.pt", wrapped)
    fresh = Body()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(load_weights(tmp_path / "model.pt", compiled(Body()))(X), fresh(X))


def test_a_compiled_part_is_trained_unless_the_feature_layer_is_inside():
    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    with pytest.raises(InputError, match=r"'inner._orig_mod.head' is inside of 'inner', which is compiled; pass the"):
        Trainer(Around(compiled(Body())), Natural())
    in_place = Body()
    in_place.compile(backend="eager")
    with pytest.raises(InputError, match="'head' is inside of 'a model', which is compiled"):
        Trainer(in_place, Natural())
    model = nn.Sequential(compiled(nn.Sequential(nn.Linear(16, 8), nn.ReLU())), nn.Linear(8, 4))
    before = model[1].weight.detach().clone()
    fit(model)
    assert not torch.equal(before, model[1].weight)


class Empty(Body):
    """Has a length, which is 0."""

    def __len__(self):
        return 0


def test_no_model_is_asked_for_its_truth_value(tmp_path):
    trainer = fit(Empty(), AFD(**ATTACKED | {"validation_attack": PGD_1}), ema=0.5, folder=tmp_path)
    assert trainer.history[0].robust is not None

    class Attack(nn.Module):  # a validation attack that is a module of length 0
        def __init__(self, model):
            super().__init__()
            self.model = [model]

        def __len__(self):
            return 0

        def forward(self, x, _y, **_settings):
            return x

    trainer = Trainer(Body(), Natural(validation_attack=GivenAttack(Attack)))
    assert trainer.fit(BATCHES, BATCHES)[0].robust is not None


# --- What is saved is what was trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [None, False])
def test_the_trained_function_is_the_plain_models(normalize, tmp_path):
    model = Body()
    trainer = fit(model, normalize=normalize)
    fresh = Body()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(X), trainer.network(X))
    lengths = trainer.network.features(X).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(6) if normalize is None else model.raw(X).norm(dim=1))
    save_weights(tmp_path / "model.pt", trainer.network)
    assert load_weights(tmp_path / "model.pt", Body()).normalize is normalize


def test_weights_that_mean_a_scaled_model_do_not_load_into_another(tmp_path, capsys):
    model = Body()
    trainer = fit(model, normalize=True, folder=tmp_path, ema=0.5)
    assert capsys.readouterr().err.count("the model now scales what enters 'head' to length 1") == 1
    save_weights(tmp_path / "model.pt", trainer.network)
    torch.save(model.state_dict(), tmp_path / "own.pt")
    checkpoint = load_checkpoint(tmp_path / "last.pt")[0]
    saved = [torch.load(tmp_path / "model.pt"), torch.load(tmp_path / "own.pt")]
    for state in (*saved, checkpoint["model"], checkpoint["average"]["weights"]):
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"head.{MARKER}"'):
            Body().load_state_dict(state)
    expected = model.head(nn.functional.normalize(model.raw(X)))
    torch.testing.assert_close(trainer.network(X), expected)
    for name in ("model.pt", "own.pt"):
        for target in (Body(), split(Body(), normalize=True), split(Body()), split(Body(), "body", False)):
            if getattr(target, "feature_layer", "head") == "head" or isinstance(target, Body):
                loaded = load_weights(tmp_path / name, target)
            else:
                loaded = load_weights(tmp_path / name, target.model)
            assert loaded.normalize is True
            torch.testing.assert_close(loaded(X), expected)


def test_weights_of_earlier_days_say_in_their_metadata_that_features_were_scaled(tmp_path):
    model = Body()
    state = model.state_dict()
    state._metadata["afd"] = {"normalize": True, "feature_layer": "head"}
    torch.save(state, tmp_path / "model.pt")
    loaded = load_weights(tmp_path / "model.pt", Body())
    assert loaded.normalize is True
    torch.testing.assert_close(loaded(X), model.head(nn.functional.normalize(model.raw(X))))


def test_plain_weights_load_into_a_model_that_was_scaled_before(tmp_path):
    save_weights(tmp_path / "model.pt", split(model := Body(), normalize=False))
    loaded = load_weights(tmp_path / "model.pt", split(Body(), normalize=True))
    torch.testing.assert_close(loaded(X), model(X))


def test_a_checkpoint_of_the_earlier_default_is_gone_on_from_with_normalize_true_only(tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(Body(), Natural(lr=0.01), epochs=2, folder=tmp_path, normalize=True, ema=0.5)
    trainer.callbacks = [lambda report: trainer.stop() if report.global_step == 2 else None]
    trainer.fit(BATCHES, BATCHES)
    state, metadata = load_checkpoint(tmp_path / "last.pt")
    for weights in (state["model"], state["average"]["weights"]):
        del weights[f"head.{MARKER}"]
    del metadata["run"]["scaled for"], state["average"]["wide"]
    metadata["run"]["normalize"] = None
    save_checkpoint(tmp_path / "last.pt", state, metadata)
    settings = {"epochs": 2, "folder": tmp_path, "resume": "auto", "ema": 0.5}
    with pytest.raises(CheckpointError, match=r"scaled its features to length 1 for its own layer .* normalize=True$"):
        Trainer(Body(), Natural(lr=0.01), **settings).fit(BATCHES, BATCHES)
    resumed = Trainer(Body(), Natural(lr=0.01), normalize=True, **settings)
    assert len(resumed.fit(BATCHES, BATCHES)) == 2
    with pytest.raises(CheckpointError, match="scaled for is discriminator and feature layer there and discriminator"):
        Trainer(Body(), Natural(lr=0.01), **settings).fit(BATCHES, BATCHES)


# --- What models take for granted ------------------------------------------------------------------------------------


class LeNet(nn.Module):
    """Flattens what convolutions put out by a view."""

    def __init__(self, channels=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 6, 3), nn.Conv2d(6, 8, 3)
        self.body, self.head = nn.Linear(8 * 4 * 4, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.body(x.view(x.size(0), -1)).relu())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_view_behind_convolutions_is_trained_in_the_usual_layout(channels):
    x = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for execution in (Execution(), Execution(channels_last=False)):
        torch.manual_seed(0)
        model = LeNet(channels)
        trainer = Trainer(model, SHIFTED, execution=execution, epochs=2, ema=0.5)
        trainer.fit([(x, Y)] * 2, [(x, Y)])
        found.append([*model.parameters(), *trainer.evaluated.parameters()])
    assert all(map(torch.equal, *found))


def shifted(_model):
    return lambda x, _y, **_settings: (x + 0.1).clamp(0, 1)


SHIFTED = AFD(lr=0.01, attack=GivenAttack(shifted), validation_attack=None)


def test_a_view_in_an_encoder_is_trained_in_the_usual_layout():
    encoder = LeNet()
    encoder.head = nn.Identity()
    x = torch.rand(6, 3, 8, 8)
    trainer = Trainer(FeatureClassifier(encoder, 16, 4), SHIFTED)
    assert trainer.fit([(x, Y)], [(x, Y)])[0].natural >= 0


@pytest.mark.parametrize("method", [AFD(lr=0.01), AFD(lr=0.01, schedule="alternating"), Natural(lr=0.01)])
def test_a_view_that_a_round_of_its_own_cannot_take_is_explained(method):
    x = torch.rand(6, 3, 8, 8)
    with pytest.raises(InputError, match=r"train it with Execution\(channels_last=False\)"):
        method.build(Execution().prepare(split(LeNet())))(x, Y, x_adv=x)
    method.build(split(LeNet()), Execution(channels_last=False))(x, Y, x_adv=x)


class Writing(Body):
    """Normalises its input in place."""

    def raw(self, x):
        return super().raw(x.sub_(0.5).div_(0.25))


class Reading(Body):
    def raw(self, x):
        return super().raw((x - 0.5) / 0.25)


METHODS = [
    Natural(lr=0.01),
    Natural(lr=0.01, micro_batches=2),
    AFD(**ATTACKED),
    AFD.adam(attack=PGD_1, validation_attack=None),
    AFD(schedule="alternating", **ATTACKED),
    AFD(schedule="alternating", discriminator_steps=2, **ATTACKED),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_writes_to_its_images_trains_as_one_that_does_not(method):
    found, x = [], X.clone()
    for kind in (Writing, Reading):
        torch.manual_seed(0)
        model = kind()
        Trainer(model, method, epochs=2).fit([(x, Y)] * 2, [(x, Y)])
        assert torch.equal(x, X)
        found.append(list(model.parameters()))
    assert all(map(torch.equal, *found))


def test_training_waits_while_another_thread_evaluates_the_model():
    def train(watched):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        done = threading.Event()

        def watch():
            while not done.wait(0.0005):
                accuracy(model, BATCHES)

        watcher = threading.Thread(target=watch)
        if watched:
            watcher.start()
        try:
            callback = [lambda _report: accuracy(model, BATCHES)]
            Trainer(model, Natural(lr=0.05), epochs=2, callbacks=callback).fit(BATCHES * 40, BATCHES)
        finally:
            done.set()
        if watched:
            watcher.join()
        return list(model.state_dict().values())

    assert all(map(torch.equal, train(False), train(True)))


def test_a_last_batch_of_one_image_is_explained_where_batchnorm_cannot_take_it():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(InputError, match=r"BatchNorm was shown a single image.*drop_last=True of the loader\)$"):
        Trainer(model, Natural()).fit([(X, Y), (X[:1], Y[:1])], BATCHES)
    with pytest.raises(InputError, match=r"drop_last=True of the loader, or fewer than micro_batches=6\)$"):
        Trainer(model, Natural(micro_batches=6)).fit(BATCHES, BATCHES)
    Trainer(model, Natural(micro_batches=4)).fit([(X[:5], Y[:5])], BATCHES)  # no part of one


@pytest.mark.parametrize("named", ["network", "model"])
def test_saved_weights_say_which_layer_features_enter_and_how_many_classes_there_are(named, tmp_path):
    model = Body("head", "body")
    trainer = fit(model, feature_layer="head")
    save_weights(tmp_path / "model.pt", getattr(trainer, named))
    loaded = load_weights(tmp_path / "model.pt", Body("head", "body"))
    assert torch.equal(loaded.eval()(X), model.eval()(X))
    assert (loaded.feature_layer, loaded.num_classes) == ("head", 4)


def test_weights_of_a_model_that_was_never_split_load_and_count_their_classes_at_the_first_call(tmp_path):
    torch.save(Body("head", "body").state_dict(), tmp_path / "model.pt")
    loaded = load_weights(tmp_path / "model.pt", Body("head", "body"))
    assert loaded(X).shape == (6, 4)
    assert loaded.num_classes == 4
