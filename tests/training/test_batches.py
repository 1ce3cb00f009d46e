"""What of a training batch reaches the method: its images' index, its labels, soft ones, or none."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from toy_methods import Perturbed, Steady

from afd.attacks import PGDSettings
from afd.data import Batches, Images
from afd.data.images import CropAndFlip
from afd.errors import AfdError, InputError, InputTypeError
from afd.methods import AFD, AT, Execution, Natural
from afd.methods.inputs import check_values
from afd.training import Trainer, recording

COUNT, BATCH, EPOCHS = 10, 4, 2
PIXELS = torch.randint(256, (COUNT, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGES = Images(PIXELS, torch.arange(COUNT) % 3, 255.0, 3, "noise")
X, Y = IMAGES.images(), IMAGES.labels
INDEX = torch.tensor([7, 0, 9, 4, 2, 8, 1, 3, 6, 5])
VALIDATION = [(X, Y)]
PGD_1 = PGDSettings(eps=0.1, alpha=0.05, steps=1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def fit(method, train, **settings):
    trainer = Trainer(network(), method, **{"epochs": EPOCHS, **settings})
    trainer.fit(train, VALIDATION)
    return trainer


def refused(method, train, message):
    """It is named before the first step."""
    trainer = Trainer(network(), method, epochs=EPOCHS)
    with pytest.raises((InputError, InputTypeError), match=message):
        trainer.fit(train, VALIDATION)
    assert trainer.step.steps == 0


# --- The index --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Noting(Natural):
    """Natural training that notes every batch."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "seen", [])  # no setting

    def update(self, step, batch):
        self.seen.append((batch.x.clone(), batch.y, None if batch.index is None else batch.index.clone()))
        return super().update(step, batch)


def noted(train, **settings):
    method = Noting()
    fit(method, train, **settings)
    return method.seen


def in_batches(*columns):
    return list(zip(*(column.split(BATCH) for column in columns), strict=True))


class Indexed(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, row):
        return X[row], Y[row], row


def test_images_in_memory_say_which_they_are_in_every_epoch():
    seen = noted(Batches(IMAGES, BATCH, shuffle=True))
    assert all(torch.equal(x, X[index]) and torch.equal(y, Y[index]) for x, y, index in seen)
    orders = [torch.cat([index for *_, index in seen[start : start + 3]]) for start in (0, 3)]
    assert all(torch.equal(order.sort().values, torch.arange(COUNT)) for order in orders)
    assert not torch.equal(*orders)
    assert all(index.dtype == torch.int64 for *_, index in seen)


def test_augmented_ones_do_as_well_and_each_process_has_its_own():
    loaders = [Batches(IMAGES, BATCH, shuffle=True, augment=CropAndFlip(1), rank=r, world_size=2) for r in range(2)]
    seen = [noted(loader, epochs=1) for loader in loaders]
    assert all(torch.equal(y, Y[index]) for half in seen for _, y, index in half)
    assert sorted(int(i) for half in seen for *_, index in half for i in index) == list(range(COUNT))


def test_a_run_that_goes_on_in_mid_epoch_is_told_the_right_ones(tmp_path):
    method = Noting()
    run = Trainer(network(), method, epochs=EPOCHS, folder=tmp_path, log_every=1)
    run.callbacks = [lambda report: run.stop() if report.global_step == 4 else None]
    torch.manual_seed(5)
    run.fit(Batches(IMAGES, BATCH, shuffle=True), VALIDATION)
    torch.manual_seed(99)
    Trainer(network(), method, epochs=EPOCHS, folder=tmp_path, resume="auto").fit(
        Batches(IMAGES, BATCH, shuffle=True), VALIDATION
    )
    assert len(method.seen) == 6
    assert all(torch.equal(x, X[index]) for x, _, index in method.seen)
    assert torch.equal(torch.cat([index for *_, index in method.seen[3:]]).sort().values, torch.arange(COUNT))


FORMS = {
    "a tuple": lambda x, y, index: (x, y, index),
    "a list": lambda x, y, index: [x, y, index],
    "a dict": lambda x, y, index: {"image": x, "label": y, "index": index},
    "a dict of other names": lambda x, y, index: {"pixel_values": x, "labels": y, "idx": index},
    "an object": lambda x, y, index: SimpleNamespace(images=x, labels=y, indices=index),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_loader_may_say_which_they_are(form):
    seen = noted([FORMS[form](*batch) for batch in in_batches(X, Y, INDEX)])
    assert torch.equal(torch.cat([index for *_, index in seen]), INDEX.repeat(EPOCHS))
    assert torch.equal(torch.cat([x for x, *_ in seen]), X.repeat(EPOCHS, 1, 1, 1))


def test_a_data_set_that_counts_its_images_says_so():
    seen = noted(DataLoader(Indexed(), BATCH, shuffle=True))
    assert all(torch.equal(x, X[index]) for x, _, index in seen)


@pytest.mark.parametrize(
    "other", [INDEX.float(), INDEX.int(), INDEX[:, None], INDEX.expand(COUNT, COUNT), F.one_hot(INDEX), INDEX.bool()]
)
def test_what_else_stands_there_is_none(other):
    for form in FORMS.values():
        assert [index for *_, index in noted([form(*batch) for batch in in_batches(X, Y, other)])] == [None] * 6


def test_where_nobody_says_it_there_is_none():
    for train in (in_batches(X, Y), [{"image": x, "label": y} for x, y in in_batches(X, Y)]):
        assert [index for *_, index in noted(train)] == [None] * 6
    assert [index for *_, index in noted([(x, y, len(x)) for x, y in in_batches(X, Y)])] == [None] * 6


@dataclass(frozen=True, kw_only=True)
class Weighing(Natural):
    """Natural training in which images count by their number."""

    def losses(self, model, batch):
        each = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        return {"task": (each * (1 + batch.index)).mean()}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_recorded_round_reads_it_anew_and_parts_have_theirs(micro_batches, tapes, monkeypatch):
    ends = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(recording.GraphedStep, "_capture", lambda *_: None)
        torch.manual_seed(5)
        method = Weighing(lr=1e-3, micro_batches=micro_batches)
        train = Batches(IMAGES, BATCH, shuffle=True)
        ends.append(fit(method, train, epochs=4, execution=Execution(graph=True)).network.state_dict())
    assert sum(one.replays for one in tapes) == 10  # of 12 steps, all but the first of either length
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# --- Labels -----------------------------------------------------------------------------------------------------------


UNLABELLED = {
    "images": lambda x: x,
    "tuples": lambda x: (x,),
    "lists": lambda x: [x],
    "without a label": lambda x: (x, None),
    "dicts": lambda x: {"image": x},
    "objects": lambda x: SimpleNamespace(images=x),
}


@pytest.mark.parametrize("form", UNLABELLED)
def test_a_method_that_asks_for_no_labels_trains_without_any(form):
    """As it does where there are some."""
    train = [UNLABELLED[form](x) for x in X.split(BATCH)]
    found, expected = fit(Steady(lr=0.01), train), fit(Steady(lr=0.01), in_batches(X, Y))
    assert all(map(torch.equal, found.network.parameters(), expected.network.parameters()))
    assert [one.losses for one in found.history] == [one.losses for one in expected.history]
    assert not all(map(torch.equal, found.network.parameters(), network().parameters()))


@pytest.mark.parametrize("form", UNLABELLED)
@pytest.mark.parametrize("method", [Natural(), AT(attack=PGD_1), AFD(attack=PGD_1)])
def test_any_other_method_asks_for_them(method, form):
    refused(method, [UNLABELLED[form](x) for x in X.split(BATCH)], "train: the loader yields a .*; a batch must be")


def test_validation_needs_labels_whatever_is_trained():
    with pytest.raises(InputTypeError, match="validation: the loader yields a Tensor"):
        Trainer(network(), Steady()).fit([X], [X])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X * 255).byte(), "train: x is torch.uint8"),
        (X * 255, r"train: x has values in \[.*\]; images must be finite and in \[0.0, 1.0\]"),
        (X[:0], r"train: x has shape \[0, 1, 4, 4\]; a batch must hold at least one image"),
        ((X, Y + 1), r"train: y holds the label 3; the model has classes 0 \.\.\. 2"),
        ((X, "a"), "train: the loader yields a tuple of Tensor, str"),
        ("a", "train: the loader yields a str"),
    ],
)
def test_wrong_images_are_named_without_labels_too(batch, message):
    refused(Steady(), [batch], message)


SMOOTH = 0.7 * F.one_hot(Y, 3) + 0.1  # as label_smoothing=0.3 has it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [lambda x, y: (x, y), lambda x, y: {"image": x, "label": y}])
def test_soft_labels_are_trained_on(form, dtype):
    """Those of label smoothing are label smoothing."""
    found = fit(Natural(), [form(x, y) for x, y in in_batches(X, SMOOTH.to(dtype))])
    expected = fit(Natural(label_smoothing=0.3), in_batches(X, Y))
    for one, other in zip(found.network.parameters(), expected.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plain = fit(Natural(), in_batches(X, Y))
    assert not torch.allclose(found.network.model[3].weight, plain.network.model[3].weight, rtol=1e-2, atol=1e-3)


def test_soft_labels_are_attacked_as_well():
    """Sure ones are attacked and trained on as the classes are."""
    method = AT(lr=0.01, attack=PGD_1, validation_attack=None)
    found, expected = fit(method, in_batches(X, F.one_hot(Y, 3).float())), fit(method, in_batches(X, Y))
    for one, other in zip(found.network.parameters(), expected.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    other = fit(method, in_batches(X, SMOOTH.flip(1)))
    assert not torch.allclose(found.network.model[3].weight, other.network.model[3].weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        (SMOOTH[:, :2], r"train: y has shape \[10, 2\]; soft labels of this model are \[10, 3\]"),
        (F.pad(SMOOTH, (0, 1)), r"train: y has shape \[10, 4\]; soft labels of this model are \[10, 3\]"),
        (SMOOTH[1:], r"train: y has shape \[9, 3\]; it must have a row for each image, \[10, \.\.\.\]"),
        (SMOOTH - 0.5, r"train: y has values in \[-0\.4, 0\.3\]; soft labels must be finite and >= 0"),
        (SMOOTH * torch.nan, "train: y has values in .*nan"),
        (SMOOTH * torch.inf, "train: y has values in .*inf"),
        (SMOOTH * 1.002, r"train: y sums to 1\.002 in row 0; soft labels must sum to 1 in each row"),
        (
            torch.cat([SMOOTH[:7], 0 * SMOOTH[7:]]),
            r"train: y sums to 0 in row 7; soft labels must sum to 1 in each row",
        ),
        (SMOOTH.half() * 1.01, r"train: y sums to 1\.0\d+ in row \d"),
        (SMOOTH[:, :0], r"train: y has shape \[10, 0\]; soft labels are \[10, K\], with a share for each class"),
        (SMOOTH.long(), r"train: y has shape \[10, 3\]; it must be \[10\]"),
        (SMOOTH[..., None], "train: y is torch.float32; labels must be torch.int64"),
    ],
)
def test_wrong_soft_labels_are_named_before_the_first_step(soft, message):
    refused(Natural(), [(X, soft)], message)


class Later:
    """A loader of which only the first batch is looked at before the run."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)


@dataclass(frozen=True, kw_only=True)
class OfClasses(AT):
    """A method that says so in a line."""

    soft_labels = False


def test_the_game_is_of_classes():
    game = AFD(attack=PGD_1, validation_attack=None)
    refused(game, in_batches(X, SMOOTH), r"train: labels are soft, \[N, K\], and AFD asks for classes \[N\]")
    with pytest.raises(InputError, match=r"labels are soft, \[N, K\], and AFD asks for classes \[N\]"):
        game.build(network())(X, SMOOTH)
    own_loop = game.build(network())
    own_loop.looks = 0
    told = r"y is soft labels \[10, 3\]; the discriminator is conditioned on classes \[N\]"
    with pytest.raises(AfdError, match=told):
        own_loop(X, SMOOTH)


def test_soft_labels_that_come_later_are_met_in_the_first_epoch():
    later = Later([(X, Y), (X, SMOOTH)])
    trainer = Trainer(network(), AFD(attack=PGD_1, validation_attack=None), epochs=EPOCHS)
    with pytest.raises(InputError, match=r"train: labels are soft, \[N, K\], and AFD asks for classes"):
        trainer.fit(later, VALIDATION)
    assert trainer.step.steps == 1
    with pytest.raises(InputError, match=r"train: y sums to 1\.1 in row 0"):
        fit(Natural(), Later([(X, SMOOTH), (X, SMOOTH + 0.1 * F.one_hot(torch.zeros_like(Y), 3))]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_soft_labels_sum_to_one_as_well_as_their_dtype_can(dtype):
    """Thousands of classes, each rounded."""
    y = torch.rand(64, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = (y / y.sum(1, keepdim=True)).to(dtype)
    x = torch.rand(64, 1, 2, 2)
    check_values(x, rounded, 1000)
    with pytest.raises(InputError, match="y sums to"):
        check_values(x, rounded * 1.05, 1000)


@pytest.mark.parametrize("method", [AT, lambda **attack: Perturbed(AT(**attack))], ids=["at", "wrapped"])
def test_an_attack_on_classes_is_refused_with_soft_labels_before_the_first_step(method):
    told = r"labels are soft, \[N, K\], and the attack's loss 'margin' asks for classes \[N\]; 'ce', 'kl' and"
    refused(method(attack=PGDSettings(loss="margin"), validation_attack=None), in_batches(X, SMOOTH), told)
    with pytest.raises(InputError, match=told):
        method(attack=PGDSettings(loss="margin")).build(network())(X, SMOOTH)
    refused_by_wrapper = Perturbed(AT(attack=PGD_1))
    object.__setattr__(refused_by_wrapper, "method", OfClasses(attack=PGD_1))
    refused(refused_by_wrapper, in_batches(X, SMOOTH), "and OfClasses asks for classes")


def test_accuracy_is_of_classes():
    with pytest.raises(InputTypeError, match=r"validation: y is torch\.float32; labels must be torch\.int64"):
        Trainer(network(), Natural()).fit(in_batches(X, SMOOTH), [(X, SMOOTH)])
