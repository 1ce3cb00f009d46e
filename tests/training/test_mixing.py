"""Mixup and CutMix: literal formulas, drawn once a joint batch, alike in any number of processes and after a stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from afd.attacks import PGDSettings
from afd.checkpoint import CheckpointError, load_checkpoint
from afd.data import Batches, Images
from afd.errors import InputError, InputTypeError
from afd.methods import AFD, AT, Execution, Natural
from afd.training import Mixing, Trainer
from afd.training.mixing import KEY

CLASSES = 4


def batch(rows=8, shape=(3, 6, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, *shape, dtype=dtype, generator=generator)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def stream(seed, step):
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(step, KEY))))


def partners(rows):
    return [row ^ 1 if row ^ 1 < rows else row for row in range(rows)]


def literal_mixup(x, y, share):
    """Zhang et al. (2018), row by row."""
    other = partners(len(x))
    hot = torch.eye(CLASSES, dtype=x.dtype)[y]
    images = torch.stack([share * x[i] + (1 - share) * x[other[i]] for i in range(len(x))])
    return images, torch.stack([share * hot[i] + (1 - share) * hot[other[i]] for i in range(len(x))])


def literal_cutmix(x, y, share, cy, cx):
    """The authors' rand_bbox (Yun et al. 2019) and what they do with it, row by row and pixel by pixel."""
    height, width = x.shape[2:]
    ratio = math.sqrt(1.0 - share)
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    y1, y2 = np.clip(cy - cut_h // 2, 0, height), np.clip(cy + cut_h // 2, 0, height)
    x1, x2 = np.clip(cx - cut_w // 2, 0, width), np.clip(cx + cut_w // 2, 0, width)
    images, other = x.clone(), partners(len(x))
    for row in range(len(x)):
        for i in range(y1, y2):
            for j in range(x1, x2):
                images[row, :, i, j] = x[other[row], :, i, j]
    share = 1 - (y2 - y1) * (x2 - x1) / (height * width)
    hot = torch.eye(CLASSES, dtype=x.dtype)[y]
    return images, torch.stack([share * hot[i] + (1 - share) * hot[other[i]] for i in range(len(x))])


@pytest.mark.parametrize("rows", [8, 7, 1])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_is_its_formula(alpha, rows):
    x, y = batch(rows)
    for step in range(5):
        found = Mixing(mixup=alpha)(x, y, CLASSES, seed=3, step=step)
        expected = literal_mixup(x, y, stream(3, step).beta(alpha, alpha))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rows", [8, 7, 1])
def test_cutmix_is_its_authors_code(rows):
    x, y = batch(rows)
    areas = set()
    for step in range(12):
        draws = stream(3, step)
        share = draws.beta(1.0, 1.0)
        cy, cx = draws.randint(6), draws.randint(5)
        found = Mixing(cutmix=1.0)(x, y, CLASSES, seed=3, step=step)
        torch.testing.assert_close(found, literal_cutmix(x, y, share, cy, cx), rtol=0, atol=1e-15)
        areas.add(round(float(found[1].amax(1).min()), 6))
    assert len(areas) > 3 or rows == 1


def test_of_both_each_comes_at_half_the_time():
    x, y = batch(2)
    pasted = 0
    for step in range(400):
        mixed, _ = Mixing(mixup=1.0, cutmix=1.0)(x, y, CLASSES, seed=0, step=step)
        pasted += bool(((mixed == x) | (mixed == x.flip(0))).all())
    assert 160 < pasted < 240


def test_labels_are_shares_of_one_and_soft_ones_are_mixed_alike():
    x, y = batch()
    for settings in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        for step in range(6):
            images, soft = Mixing(**settings)(x.float(), y, CLASSES, seed=1, step=step)
            assert images.dtype == soft.dtype == torch.float32
            torch.testing.assert_close(soft.sum(1), torch.ones(8))
            assert images.min() >= 0
            assert images.max() <= 1
            again = Mixing(**settings)(x.float(), F.one_hot(y, CLASSES).double(), CLASSES, seed=1, step=step)
            assert torch.equal(images, again[0])
            assert torch.equal(soft, again[1])


def test_what_is_mixed_is_left_as_it_was_and_keeps_its_layout():
    x, y = batch(dtype=torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone(), y.clone()
    for settings in ({"mixup": 1.0}, {"cutmix": 1.0}):
        images, _ = Mixing(**settings)(x, y, CLASSES, seed=0)
        assert images.stride() == x.stride()
        images.fill_(7)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_nothing_to_mix_by_leaves_images_and_sure_labels():
    x, y = batch()
    images, soft = Mixing()(x, y, CLASSES, seed=0)
    assert torch.equal(images, x)
    assert torch.equal(soft, F.one_hot(y, CLASSES).double())
    assert not Mixing().active


def test_draws_are_of_seed_and_step_and_nothing_else():
    x, y = batch()

    def mixed(**given):
        return Mixing(mixup=1.0)(x, y, CLASSES, **given)[0]

    first = mixed(seed=5, step=7)
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(mixed(seed=5, step=7), first)
    others = [mixed(seed=5, step=8), mixed(seed=6, step=7), mixed(seed=6, step=6), mixed(seed=7, step=5)]
    assert all(not torch.allclose(one, first) for one in others)
    assert not torch.allclose(others[0], others[1])


@pytest.mark.parametrize("settings", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
def test_processes_mix_their_rows_as_one_process_would(settings):
    x, y = batch(12)
    mixing = Mixing(**settings)
    for step in range(6):
        whole = mixing(x, y, CLASSES, seed=2, step=step)
        for count in (2, 3):
            rows = 12 // count
            parts = [
                mixing(x[at : at + rows], y[at : at + rows], CLASSES, seed=2, step=step, first_sample=at)
                for at in range(0, 12, rows)
            ]
            assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


def test_of_odd_rows_only_the_pair_that_two_processes_share_stays_as_it_is():
    x, y = batch(10)
    whole, _ = Mixing(mixup=1.0)(x, y, CLASSES, seed=2)
    halves = [Mixing(mixup=1.0)(x[at : at + 5], y[at : at + 5], CLASSES, seed=2, first_sample=at)[0] for at in (0, 5)]
    found = torch.cat(halves)
    assert torch.equal(found[4:6], x[4:6])
    rest = [0, 1, 2, 3, 6, 7, 8, 9]
    assert torch.equal(found[rest], whole[rest])


@pytest.mark.gpu
def test_mixing_never_waits_for_the_device(cuda):
    x, y = (one.to(cuda) for one in batch(dtype=torch.float32))
    expected = Mixing(mixup=1.0, cutmix=1.0)(x.cpu(), y.cpu(), CLASSES, seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = Mixing(mixup=1.0, cutmix=1.0)(x, y, CLASSES, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close([one.cpu() for one in found], list(expected))


@pytest.mark.parametrize(
    ("settings", "given", "kind", "message"),
    [
        ({"mixup": -1}, {}, InputError, "mixup is -1"),
        ({"cutmix": math.nan}, {}, InputError, "cutmix is nan"),
        ({"mixup": math.inf}, {}, InputError, "mixup is inf"),
        ({"cutmix": "1"}, {}, InputTypeError, "cutmix is '1', a str; it must be a number"),
        ({"mixup": True}, {}, InputTypeError, "mixup is True"),
        (
            {"cutmix": 1},
            {"x": torch.rand(8, 5)},
            InputError,
            r"x has shape \[8, 5\]; CutMix needs images \[N, C, H, W\]",
        ),
        ({"mixup": 1}, {"y": None}, InputError, "y is None; mixup and CutMix need labels"),
        ({"mixup": 1}, {"y": torch.zeros(7).long()}, InputError, r"y has shape \[7\]; it must be \[8\]"),
        ({"mixup": 1}, {"y": torch.zeros(8)}, InputTypeError, "y is torch.float32; labels must be torch.int64"),
        (
            {"mixup": 1},
            {"y": torch.ones(8, 3)},
            InputError,
            r"y has shape \[8, 3\]; soft labels of 4 classes are \[N, 4\]",
        ),
        ({"mixup": 1}, {"y": torch.ones(7, 4)}, InputError, r"y has shape \[7, 4\]; it must have a row for each image"),
        ({"mixup": 1}, {"seed": -1}, InputError, "seed is -1"),
    ],
)
def test_a_mistake_is_named(settings, given, kind, message):
    x, y = batch()
    with pytest.raises(kind, match=message):
        Mixing(**settings)(**{"x": x, "y": y, "num_classes": CLASSES, "seed": 0, **given})


# --- In a run ---------------------------------------------------------------------------------------------------------


PIXELS = torch.randint(256, (22, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
IMAGES = Images(PIXELS, torch.arange(22) % CLASSES, 255.0, CLASSES, "noise")
VALIDATION = Batches(IMAGES, 22)
PGD_1 = PGDSettings(eps=0.1, alpha=0.05, steps=1)
MIXING = Mixing(mixup=1.0, cutmix=1.0)


@dataclass(frozen=True, kw_only=True)
class Noting(AT):
    """Adversarial training that notes its batches, and what became of them."""

    attack: PGDSettings = PGD_1
    validation_attack: None = None

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "seen", [])

    def losses(self, model, batch):
        self.seen.append((batch.x.clone(), batch.y.clone(), batch.index))
        return super().losses(model, batch)


@dataclass(frozen=True, kw_only=True)
class Repeating(Noting):
    """As if each batch were trained on twice."""

    @property
    def repeats(self):
        return 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def fit(method, train=None, **settings):
    trainer = Trainer(network(), method, **{"mixing": MIXING, "epochs": 2, **settings})
    trainer.fit(Batches(IMAGES, 8, shuffle=True) if train is None else train, VALIDATION)
    return trainer


def test_a_run_trains_on_what_is_mixed_by_its_seed_and_step():
    method = Noting()
    fit(method, seed=3)
    assert len(method.seen) == 6
    for step, (x, y, index) in enumerate(method.seen):
        expected = MIXING(IMAGES.images(index), IMAGES.labels[index], CLASSES, seed=3, step=step)
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])


def test_attack_and_loss_have_the_soft_labels():
    """One step by hand: PGD ascends, and the loss is, the cross-entropy of the mixed labels."""
    train = Batches(IMAGES, 22)
    found = fit(AT(lr=0.1, momentum=0.0, weight_decay=0.0, attack=PGD_1, validation_attack=None), train, epochs=1)
    model = network()
    x, y = MIXING(IMAGES.images(), IMAGES.labels, CLASSES, seed=0)
    attack = PGDSettings(eps=0.1, alpha=0.05, steps=1, random_start=True).build(model)
    x_adv = attack(x, y, seed=0)
    loss = -(y * model(x_adv).log_softmax(1)).sum(1).mean()
    loss.backward()
    for ours, theirs in zip(found.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=1e-5, atol=1e-6)
    assert found.history[0].losses["task"] == pytest.approx(loss.item(), abs=1e-6)


def test_the_repeats_of_a_batch_are_mixed_alike():
    method = Repeating()
    fit(method, [(IMAGES.images(), IMAGES.labels)] * 4, epochs=1)
    batches = [x for x, *_ in method.seen]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[2], batches[3])
    assert not torch.equal(batches[1], batches[2])


def test_a_run_that_goes_on_in_mid_epoch_mixes_as_if_nothing_had_come_between(tmp_path):
    whole = fit(Noting())
    method = Noting()
    run = Trainer(network(), method, epochs=2, folder=tmp_path, mixing=MIXING, log_every=1)
    run.callbacks = [lambda report: run.stop() if report.global_step == 4 else None]
    run.fit(Batches(IMAGES, 8, shuffle=True), VALIDATION)
    rest = fit(Noting(), folder=tmp_path, resume="auto")
    assert all(map(torch.equal, rest.model.parameters(), whole.model.parameters()))
    with pytest.raises(CheckpointError, match=r"mixing\.cutmix is 1\.0 there and not set here.*mixing\.mixup"):
        fit(Noting(), folder=tmp_path, resume="auto", mixing=Mixing())
    assert "mixing" in load_checkpoint(tmp_path / "last.pt")[1]["run"]


def test_a_run_without_says_nothing_of_it_as_those_before_it(tmp_path):
    fit(Noting(), folder=tmp_path, mixing=Mixing())
    assert "mixing" not in load_checkpoint(tmp_path / "last.pt")[1]["run"]


@pytest.mark.parametrize(
    ("method", "mixing", "train", "message"),
    [
        (AFD(attack=PGD_1), MIXING, None, r"train: labels are soft.* and AFD asks .* \(mixup and cutmix"),
        (
            AT(attack=PGDSettings(loss="dlr"), validation_attack=None), MIXING, None,
            r"labels are soft.* loss 'dlr' asks for classes",
        ),
        (
            Natural(), Mixing(cutmix=1.0), [(torch.rand(4, 16), torch.zeros(4).long())],
            "train: x has shape .* CutMix needs",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_named_before_the_first_step(method, mixing, train, message):
    validation = VALIDATION if train is None else train
    train = Batches(IMAGES, 8) if train is None else train
    trainer = Trainer(network(), method, mixing=mixing)
    with pytest.raises(InputError, match=message):
        trainer.fit(train, validation)
    assert trainer.step.steps == 0


def test_a_mixing_of_another_type_is_named():
    with pytest.raises(InputTypeError, match=r"mixing is a float; it must be an afd\.training\.Mixing"):
        Trainer(network(), Natural(), mixing=0.2)


def test_a_run_of_captured_steps_mixes_as_an_eager_one(tapes):
    """Mixed outside of the graphs: one capture for each shape, and soft labels are copied into it."""
    attack = PGDSettings(eps=0.1, alpha=0.05, steps=1, fold_batchnorm=False)
    method = AT(lr=0.05, attack=attack, validation_attack=None)
    eager = fit(method, epochs=3)
    assert not tapes
    captured = fit(method, epochs=3, execution=Execution(graph=True))
    assert len(tapes) == 2  # of 8 rows, and of the last 6
    torch.testing.assert_close(
        list(captured.model.parameters()), list(eager.model.parameters()), rtol=1e-5, atol=1e-6
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::afd.errors.ModelWarning")
def test_the_command_mixes(tmp_path: Path):
    from afd.cli import main

    words = [
        "--epochs",
        "1",
        "--width",
        "2",
        "--limit",
        "40",
        "--attack-steps",
        "1",
        "--eval-steps",
        "1",
        "--batch-size",
        "20",
    ]
    for name, options in {"plain": [], "mixed": ["--mixup", "1/5", "--cutmix", "1"]}.items():
        assert main(["train", "at", *words, *options, "--out", str(tmp_path / name)]) == 0
    assert main(["train", "--config", str(tmp_path / "mixed" / "run.toml"), "--out", str(tmp_path / "again")]) == 0
    plain, mixed, again = (torch.load(tmp_path / name / "model.pt") for name in ("plain", "mixed", "again"))
    assert all(torch.equal(mixed[name], again[name]) for name in mixed)
    assert any(not torch.equal(mixed[name], plain[name]) for name in mixed)
    configs = [load_checkpoint(tmp_path / name / "last.pt")[1]["config"] for name in ("plain", "mixed")]
    assert "mixup" not in configs[0]
    assert (configs[1]["mixup"], configs[1]["cutmix"]) == (0.2, 1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("at --mixup -1", "mixup is -1"),
        ("at --cutmix nan", "cutmix is nan"),
        (
            "afd --mixup 1 --epochs 1 --width 2 --limit 20",
            "labels are soft, [N, K], and AFD asks",
        ),
    ],
)
def test_the_command_names_a_mistake(words, message, tmp_path, capsys):
    from afd.cli import main

    assert main(["train", *words.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
