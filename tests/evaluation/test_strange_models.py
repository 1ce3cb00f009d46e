"""Whole evaluations of models that somebody else wrote, in any mode of the caller; and what is refused at once."""

import dataclasses
import json
from contextlib import ExitStack
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from ambient import MODES
from rich.console import Console
from torch import nn

from afd import installation
from afd.attacks import Report
from afd.data import Images
from afd.errors import InputError, InputTypeError, ModelWarning
from afd.evaluation import attacks
from afd.evaluation.attacks import ATTACKS, Epsilon, Target, ascending
from afd.evaluation.folder import FolderError, evaluate_to_folder
from afd.evaluation.model import Model, UnusableModelError, check_fit, feature_summary
from afd.evaluation.protocol import Protocol, Stage, autoattack, autoattack_reference, probes, quick
from afd.evaluation.runner import Runner
from afd.evaluation.store import Store
from afd.installation import ExtraMissingError
from afd.runtime import Group, device_named

COUNT = 230  # more than the checks that look at the first images look at
RADII = ascending(["0.0525", "0.2025"])


class Brightest(nn.Module):
    """Logits are the pixels, so that a margin says which radius breaks an image."""

    def forward(self, x):
        return 20 * x.flatten(1)


class Around(nn.Module):
    """Brightest, with something done to what goes in and to what comes out."""

    def __init__(self, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.inside, self.before, self.after = Brightest(), before, after

    def forward(self, x):
        return self.after(self.inside(self.before(x)))


@pytest.fixture
def bright():
    pixels = torch.randint(0, 101, (COUNT, 1, 1, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return Images(pixels, pixels.flatten(1).argmax(1), scale=100.0, num_classes=3, name="bright")


def evaluated(model, images, out, stages=None, **options):
    """The results of PGD and all probes but Square, and the checks by name."""
    stages = stages or [Stage("pgd", "pgd", "Linf", RADII, {"steps": 10})]
    protocol = Protocol("quick", "Linf", RADII[0], (*stages, *probes("Linf", RADII[0])[:5]))
    results = evaluate_to_folder(Model("model", "test", model), images, protocol, out, batch_size=40, **options)
    for attack in results["attacks"]:
        attack["seconds"] = 0
    return results, {check["name"]: check for check in results["checks"]}


def measured(results):
    """What must be alike."""
    return json.dumps([results[key] for key in ("clean", "attacks", "worst_case", "checks")])


FORMS = {
    "tuple": lambda logits: (logits, logits.sum(1)),
    "dict": lambda logits: {"logits": logits},
    "object": lambda logits: SimpleNamespace(logits=logits),
}


def scaled_in_place(x):
    return x.mul_(2).div_(2)


@pytest.mark.filterwarnings("ignore:the model returned a:afd.errors.ModelWarning")
def test_every_form_of_a_model_comes_to_the_same(bright, tmp_path):
    """Each is wrapped, too, and writes to what it is shown."""
    images = bright.take(torch.arange(60))
    models = {name: nn.DataParallel(Around(scaled_in_place, form)) for name, form in FORMS.items()}
    wanted = measured(evaluated(Around(), images, tmp_path / "plain")[0])
    found = {name: measured(evaluated(model, images, tmp_path / name)[0]) for name, model in models.items()}
    assert found == dict.fromkeys(models, wanted)


def test_no_mode_of_the_caller_changes_a_figure(bright, tmp_path):
    images = bright.take(torch.arange(60, device="cpu"))
    wanted = evaluated(Around(), images, tmp_path / "plain")[0]
    with ExitStack() as stack:
        for mode in MODES.values():
            stack.enter_context(mode())
        found = evaluated(Around(), images, tmp_path / "moded")[0]
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(0).is_meta
    assert measured(found) == measured(wanted)


EXTERNAL = {
    "ddn": ("L2", {"steps": 10}),
    "cw": ("L2", {"steps": 5, "binary_search_steps": 2}),
    "deepfool": ("Linf", {"steps": 5}),
    "fab-t": ("Linf", {"steps": 5}),
    "square": ("Linf", {"queries": 30}),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_other_libraries_see_plain_logits_in_ordinary_modes(name, bright):
    pytest.importorskip(ATTACKS[name].library)
    norm, settings = EXTERNAL[name]
    x, y = bright.images()[:20], bright.labels[:20]

    def attacked(model):
        return ATTACKS[name].build(Target(model.eval(), norm, 0.1, 0, 3), **settings)(x, y)

    wanted = attacked(Brightest())
    assert (wanted != x).any()
    for model in (Around(before=scaled_in_place), *(Around(after=form) for form in FORMS.values())):
        assert torch.equal(attacked(model), wanted)
    for mode in MODES.values():
        with mode():
            found = attacked(Around(after=FORMS["dict"]))
        assert torch.equal(found, wanted)


# --- Values that are not finite -------------------------------------------------------------------------------------


def test_nan_on_a_clean_image_is_wrong_whatever_argmax_takes_it_for(bright, tmp_path):
    """Only exactly on the grey levels of clean images, where no attack looks."""
    largest = bright.pixels.flatten(1).amax(1)
    dark = (largest < 40) & (largest > 5)
    assert dark[200:].any()
    assert (bright.labels[dark] == 0).any()  # which is where argmax would find the NaN

    def broken(x):
        flat, largest = x.flatten(1), x.flatten(1).amax(1)
        clean = ((100 * flat).round() / 100 - flat).abs().amax(1) < 1e-6
        return x.where(~((largest < 0.395) & (largest > 0.055) & clean).view(-1, 1, 1, 1), torch.nan)

    results, checks = evaluated(Around(before=broken), bright, tmp_path / "out")
    assert results["clean"] == pytest.approx(1 - int(dark.sum()) / COUNT)
    assert checks["outputs not finite"]["verdict"] == "fail"
    assert checks["outputs not finite"]["number"] == int(dark.sum())
    assert checks["outputs not finite"]["unit"] == f"of {COUNT} images"
    assert checks["attack raises accuracy"]["number"] == 0
    assert checks["random outputs"]["verdict"] == checks["batch dependence"]["verdict"] == "pass"


def test_a_model_without_any_finite_output_has_no_accuracy(bright, tmp_path):
    results, checks = evaluated(Around(after=lambda logits: logits * torch.nan), bright, tmp_path / "out")
    assert results["clean"] == 0
    assert set(results["worst_case"]["Linf"].values()) == {0}
    assert checks["outputs not finite"]["number"] == COUNT
    assert checks["random outputs"]["verdict"] == "skipped"


def test_nan_on_an_attacked_image_does_not_withstand_and_is_counted(bright, tmp_path, monkeypatch):
    """Between the grey levels of clean images the model answers NaN; half of the images are moved there."""

    def undefined(x):
        clean = ((100 * x).round() / 100 - x).abs().flatten(1).amax(1) < 1e-6
        return x.where(clean.view(-1, 1, 1, 1), torch.nan)

    def shifted(x, y, **_):
        return torch.where((y == 0).view(-1, 1, 1, 1), (x + 0.005 * (x < 0.5) - 0.005 * (x >= 0.5)), x)

    monkeypatch.setitem(ATTACKS, "shift", attacks.Kind(lambda _: shifted, lambda _: 1))

    class Silent:
        def start(self, work): ...
        def moved(self, work, text): ...

    stage = Stage("shift", "shift", "Linf", RADII[:1])
    runner = Runner(
        model=Around(before=undefined), surrogates=(), images=bright, classes=3,
        protocol=Protocol("quick", "Linf", RADII[0], (stage,)), store=Store(tmp_path, {}),
        group=Group(), seed=0, batch_size=60, meter=Silent(),
    )  # fmt: skip
    outcome = runner.run()
    moved = int((bright.labels == 0).sum())
    assert outcome.correct.all()
    assert outcome.counts["shift"]["not finite"] == moved > 0
    assert outcome.accuracies(stage) == [1 - moved / COUNT]


# --- Attacks that could not aim -------------------------------------------------------------------------------------


class Seeing:
    """Moves nothing; says that it was blind at images of class 0, and met infinities at those of class 1."""

    report = None

    def __call__(self, x, y, **_):
        none = torch.zeros(len(y), dtype=torch.int32)
        self.report = Report(none + 3, 3 * (y == 0).int(), none, none, none, (y == 1).int())
        return x


def test_images_that_stand_because_the_attack_was_blind_are_counted_and_told(bright, tmp_path, monkeypatch):
    monkeypatch.setitem(ATTACKS, "seeing", attacks.Kind(lambda _: Seeing(), lambda _: 1))
    stages = [
        Stage("pgd", "pgd", "Linf", RADII, {"steps": 10}),
        Stage("stares", "seeing", "Linf", RADII),
        Stage("looks", "seeing", "Linf", RADII, role="probe"),
        Stage("noise", "noise", "Linf", RADII, {"draws": 1}),
    ]
    results, checks = evaluated(Around(), bright, tmp_path / "out", stages)
    blind, infinite = (int((bright.labels == label).sum()) for label in (0, 1))
    by_name = {attack["name"]: attack for attack in results["attacks"]}
    assert [point["blind"] for point in by_name["stares"]["accuracies"]] == [blind, blind]
    assert [point["blind"] for point in by_name["pgd"]["accuracies"]] == [0, 0]
    assert [point["blind"] for point in by_name["noise"]["accuracies"]] == [None, None]
    assert by_name["stares"]["not_finite"] == 2 * infinite
    check = checks["robust to a blind attack"]
    assert check["verdict"] == "fail"
    assert check["number"] == pytest.approx(100 * blind / COUNT)
    assert check["meaning"].startswith("stares at ε = 0.0525: so many count as robust")
    attacked = sum(by_name[stage.name]["attacked"] for stage in stages if stage.role == "score")
    assert checks["not finite under attack"]["number"] == pytest.approx(100 * 2 * infinite / attacked)
    assert checks["not finite under attack"]["verdict"] == "fail"
    assert results["verdict"] == "fail"
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "robust to a blind attack" in report
    assert "stares at ε = 0.0525" in report


def test_attacks_that_aim_pass_and_those_that_say_nothing_are_skipped(bright, tmp_path):
    _, checks = evaluated(Around(), bright, tmp_path / "pgd")
    assert checks["robust to a blind attack"]["verdict"] == checks["not finite under attack"]["verdict"] == "pass"
    silent = [Stage("noise", "noise", "Linf", RADII, {"draws": 1})]
    _, checks = evaluated(Around(), bright, tmp_path / "noise", silent)
    assert checks["robust to a blind attack"]["verdict"] == "skipped"


# --- Refused before work starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "0.0525"), ("L2", "0.105"), ("L1", "0.105")])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_leave_out_an_attack_and_it_is_said_before_it_starts(classes, norm, eps, tmp_path):
    some, console = few(classes), Console(file=StringIO(), width=300)
    radii = ascending([eps])
    protocol = cheap(autoattack(norm, radii, radii[0]))
    results = evaluate_to_folder(Model("model", "test", Brightest()), some, protocol, tmp_path / "out", console=console)
    note = f"apgd-t is left out, for it needs at least 4 classes and the model has {classes}; apgd-margin runs in its "
    said = console.file.getvalue()
    assert said.index(note) < said.index("100%")
    assert [one.startswith(note) for one in results["protocol"]["notes"]] == [True]
    assert note in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    names = [one["name"] for one in results["attacks"] if one["role"] == "score"]
    assert names == ["apgd-ce", "apgd-margin", "fab-t", "square"]
    margins = some.images().flatten(1).topk(2).values.diff().abs().flatten()
    needed = margins / {"Linf": 2, "L2": 2**0.5, "L1": 1}[norm]
    assert results["worst_case"][norm][eps] == pytest.approx(float((needed > float(eps) + 1e-6).double().mean()))


def few(classes):
    """Images of so many pixels, the brightest of which is their class."""
    pixels = torch.randint(0, 101, (40, 1, 1, classes), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    return Images(pixels, pixels.flatten(1).argmax(1), scale=100.0, num_classes=classes, name="bright")


def cheap(protocol):
    """The same with few steps and queries."""
    fewer = {"steps": 20, "queries": 30, "draws": 2}
    settings = [{name: fewer.get(name, value) for name, value in stage.settings.items()} for stage in protocol.stages]
    stages = (dataclasses.replace(stage, settings=one) for stage, one in zip(protocol.stages, settings, strict=True))
    return dataclasses.replace(protocol, stages=tuple(stages))


def test_one_logit_an_image_is_refused_with_what_to_return_instead(tmp_path):
    model = Around(after=lambda logits: logits[:, :1])
    with pytest.raises(UnusableModelError, match=r"of one score s, make \[-s / 2, s / 2\]"):
        evaluated(model, few(3), tmp_path / "out")


def test_a_reference_whose_attacks_need_more_classes_is_refused(bright, tmp_path):
    pytest.importorskip("pyautoattack")
    protocol = autoattack_reference("Linf", RADII, RADII[0])
    words = "the model has 3 classes; the stage autoattack of the reference protocol .* at least 10"
    with pytest.raises(InputError, match=words):
        evaluate_to_folder(Model("model", "test", Brightest()), bright, protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("norm", "eps", "widest"), [("Linf", "8", "1"), ("L2", "1.8", "1.73205"), ("L1", "4", "3")])
def test_a_radius_that_no_two_images_are_apart_is_refused(norm, eps, widest, bright, tmp_path):
    protocol = quick(norm, ascending([eps]), Epsilon.of(eps))
    with pytest.raises(InputError, match=f"eps is {eps} in {norm}; no two images .* further apart than {widest}"):
        evaluate_to_folder(Model("model", "test", Brightest()), bright, protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"batch_size": 0}, InputError, "batch-size is 0"),
        ({"batch_size": 2.5}, InputTypeError, "batch-size is 2.5; it must be a whole number"),
        ({"seed": -1}, InputError, "seed is -1"),
        ({"seed": 2**70}, InputError, r"seed is \d+; it must be in \[0, 2\*\*62\)"),
        ({"seed": 0.5}, InputTypeError, "seed is 0.5; it must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_refused(options, kind, words, bright, tmp_path):
    with pytest.raises(kind, match=words):
        evaluate_to_folder(
            Model("model", "test", Brightest()), bright, quick("Linf", RADII, RADII[0]), tmp_path, **options
        )


@pytest.mark.parametrize("size", [1, 13, 40, 200])
def test_a_model_is_tried_with_every_size_of_batch_that_it_will_meet(size, bright, tmp_path):
    class Picky(Brightest):
        def forward(self, x):
            assert len(x) != size, "not so many"
            return super().forward(x)

    model = Picky()
    assert check_fit(Model("model", "test", model), bright, (2, 3)) == 3
    with pytest.raises(UnusableModelError, match=f"does not take bright's 1x1x3 images, {size} at a time: not so many"):
        evaluated(model, bright, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_logits_is_named(bright):
    for form, words in ((lambda logits: logits[:, 0], r"shape \[2\]"), (lambda logits: None, "NoneType")):  # noqa: ARG005
        with pytest.raises(UnusableModelError, match=f"model test is of no use for bright's 1x1x3 images.*{words}"):
            check_fit(Model("model", "test", Around(after=form)), bright)


def test_a_library_that_cannot_be_imported_is_named(monkeypatch, tmp_path):
    (tmp_path / "brittle.py").write_text("import no_such_module_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ExtraMissingError, match="needs brittle, which is installed but fails with ModuleNotFoundError"):
        installation.require("brittle", "the stage x")


@pytest.mark.parametrize("name", ["meta", "mps", "tpu9", ""])
def test_a_device_of_another_kind_is_refused(name):
    with pytest.raises(InputError, match="allowed are auto, cpu, cuda, cuda:N"):
        device_named(name)


# --- What else is asked of a model ----------------------------------------------------------------------------------


class Feature(Brightest):
    def __init__(self, features):
        super().__init__()
        self.features = features


@pytest.mark.parametrize(
    "features",
    [nn.Conv2d(1, 4, 1), nn.Identity(), lambda x: x.flatten(1) * torch.nan, lambda x: (x, x), None, 7],
    ids=["maps", "images", "nan", "tuple", "none", "number"],
)
def test_features_of_another_kind_are_no_features(features, bright):
    assert feature_summary(Feature(features), bright, 60) is None
    wrapped = nn.DataParallel(Feature(lambda x: x.flatten(1)))
    assert feature_summary(wrapped, bright, 60)["count"] == 3


def test_the_digest_covers_states_that_are_no_tensors(bright):
    class Extra(Brightest):
        def __init__(self, note):
            super().__init__()
            self.note = note

        def get_extra_state(self):
            return {"note": self.note}

    def digest(note):
        return Model("model", "test", Extra(note)).digest()

    assert digest("a") == digest("a") != digest("b")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_a_quantised_model_has_a_digest():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3)), {nn.Linear})
    assert len(Model("model", "test", quantised).digest()) == 64


def test_one_class_fewer_than_the_least_is_too_few(bright):
    assert ATTACKS["apgd-t"].classes == 4
    attack = ATTACKS["apgd-t"].build(Target(Brightest(), "Linf", 0.1, 0, 3), steps=1, n_target_classes=9)
    with pytest.raises(InputError, match="needs at least 4 classes"):
        attack(bright.images()[:2], bright.labels[:2])


# --- Later, or in another place -------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["probe-far", "probe-fgsm"])
def test_a_protocol_without_its_probes_is_refused(missing, bright, tmp_path):
    whole = quick("Linf", RADII, RADII[0])
    fewer = Protocol("quick", "Linf", RADII[0], tuple(stage for stage in whole.stages if stage.name != missing))
    with pytest.raises(InputError, match=f"protocol quick lacks the stages {missing}; add those of"):
        evaluate_to_folder(Model("model", "test", Brightest()), bright, fewer, tmp_path / "out")
    only = Protocol("quick", "Linf", RADII[0], probes("Linf", RADII[0]))
    with pytest.raises(InputError, match="protocol quick has no stage that counts"):
        evaluate_to_folder(Model("model", "test", Brightest()), bright, only, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_called_features_that_is_meant_for_something_else_costs_no_report(bright, tmp_path):
    def features(x, layer):
        return x.flatten(1)

    with pytest.warns(ModelWarning, match="nothing is said of features, .* raises TypeError: .*'layer'"):
        results, _ = evaluated(Feature(features), bright.take(torch.arange(20)), tmp_path / "out")
    assert results["features"] is None


def test_a_radius_that_is_no_float_is_refused():
    with pytest.raises(InputError, match="eps is 1e400; it must be at most"):
        Epsilon.of("1e400")


def test_a_folder_that_cannot_be_made_is_named(bright, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolderError, match="cannot be made: a part of the path is a file"):
        evaluated(Brightest(), bright, tmp_path / "file" / "out")


def test_metadata_that_no_json_can_hold_is_refused_at_once(bright, tmp_path):
    model = Model("model", "test", Brightest(), metadata={"weights": torch.zeros(2)})
    with pytest.raises(UnusableModelError, match=r"metadata of model test must be plain JSON: .*Tensor"):
        evaluate_to_folder(model, bright, quick("Linf", RADII, RADII[0]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_any_kind_are_written_into_the_report(bright, tmp_path):
    stage = Stage("pgd", "pgd", "Linf", RADII, {"steps": 2, "alpha": None})
    evaluated(Brightest(), bright.take(torch.arange(10)), tmp_path / "out", [stage])
    assert "steps 2, alpha None" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
