"""Attacks that come from other libraries, behind our one shape; and what happens where those are missing."""

import importlib.util
import sys

import pytest
import torch
from torch import nn

from afd import installation
from afd.attacks import PGD
from afd.attacks.ball import NORMS
from afd.bench.baselines import Request, adapted
from afd.evaluation.attacks import ATTACKS, Epsilon, Target, ascending
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.protocol import autoattack, autoattack_reference, paper
from afd.installation import ExtraMissingError

EXTERNAL = {
    "ddn": ("L2", {"steps": 100}),
    "cw": ("L2", {"steps": 100, "stepsize": 0.05, "initial_const": 1.0}),
    "deepfool": ("Linf", {"steps": 50}),
    "fab-t": ("Linf", {"steps": 20}),
    "square": ("Linf", {"queries": 300}),
}
MINIMAL = ("ddn", "cw", "deepfool")


class Linear(nn.Module):
    """Three classes, three pixels: the nearest adversarial image is known in every norm."""

    def forward(self, x):
        return 10 * x.flatten(1)


X = torch.tensor([[0.8, 0.4, 0.1], [0.3, 0.65, 0.5], [0.2, 0.3, 0.45]]).view(3, 1, 1, 3)
Y = torch.tensor([0, 1, 2])
MARGINS = torch.tensor([0.4, 0.15, 0.15], dtype=torch.float64)


def skip_without(name):
    library = ATTACKS[name].library
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def build(name, model, eps, seed=0):
    skip_without(name)
    norm, settings = EXTERNAL[name]
    return ATTACKS[name].build(Target(model, norm, eps, seed, 3), **settings), norm


@pytest.mark.parametrize("name", EXTERNAL)
def test_inference_mode_gives_the_same_points(name):
    attack, _ = build(name, Linear(), 0.1)
    with torch.inference_mode():
        inside = attack(X.clone(), Y.clone(), seed=1)
    assert torch.equal(inside, attack(X, Y, seed=1))


@pytest.mark.parametrize("name", MINIMAL)
def test_a_minimal_attack_finds_the_nearest_adversarial_image(name):
    attack, norm = build(name, Linear(), 1.0)
    x_adv = attack(X, Y)
    assert (Linear()(x_adv).argmax(1) != Y).all()
    nearest = MARGINS / 2 if norm == "Linf" else MARGINS / 2**0.5
    assert NORMS[norm].distance(x_adv, X).numpy() == pytest.approx(nearest.numpy(), rel=0.06)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("name", [name for name in EXTERNAL if name not in MINIMAL])
def test_a_ball_attack_breaks_what_can_be_broken_in_the_ball(name, images, natural):
    x, y = images.images(torch.arange(40)), images.labels[:40]
    correct = natural(x).argmax(1) == y
    attack = ATTACKS[name].build(Target(natural, "Linf", 0.3, 0, 10), **EXTERNAL[name][1])
    x_adv = attack(x[correct], y[correct])
    assert (natural(x_adv).argmax(1) != y[correct]).double().mean() > 0.8
    assert NORMS["Linf"].distance(x_adv, x[correct]).max() <= 0.3 + 1e-6


@pytest.mark.parametrize("name", EXTERNAL)
def test_a_foreign_attack_leaves_random_state_and_model_alone(name, images, natural):
    skip_without(name)
    x, y = images.images(torch.arange(8)), images.labels[:8]
    attack = ATTACKS[name].build(Target(natural, EXTERNAL[name][0], 0.1, 3, 10), **EXTERNAL[name][1])
    before = torch.get_rng_state()
    first = attack(x, y, first_sample=16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(attack(x, y, first_sample=16), first)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in natural.parameters())


@pytest.mark.parametrize("missing", ["foolbox", "pyautoattack"])
def test_a_missing_extra_is_named_before_anything_runs(missing, images, natural, tmp_path, monkeypatch):
    monkeypatch.setattr(installation, "installed", lambda library: library != missing)
    reference = Epsilon.of("0.1")
    protocols = {"foolbox": [paper("mnist", transfer=False)], "pyautoattack": [
        autoattack_reference("Linf", ascending(["0.1"]), reference),
    ]}  # fmt: skip
    for protocol in protocols[missing]:
        with pytest.raises(ExtraMissingError, match=rf"needs {missing}, .* pip install 'afd-torch\[evaluate\]'"):
            evaluate_to_folder(Model("natural", "test", natural), images, protocol, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_autoattack_needs_no_other_library(images, natural, monkeypatch):
    monkeypatch.setattr(installation, "installed", lambda _: False)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    autoattack("Linf", ascending(["0.1"]), Epsilon.of("0.1")).check_extras()
    x, y = images.images(torch.arange(8)), images.labels[:8]
    for name in ("fab-t", "square"):
        assert ATTACKS[name].library == "afd"
        assert ATTACKS[name].build(Target(natural, "Linf", 0.1, 0, 10), **EXTERNAL[name][1])(x, y).shape == x.shape


def autoattack_accuracies(model, images, eps, folder):
    """Worst case of our AutoAttack and of pyautoattack's, on the same images."""
    radii, reference = ascending([eps]), Epsilon.of(eps)
    found = []
    for make in (autoattack, autoattack_reference):
        protocol = make("Linf", radii, reference)
        stages = tuple(stage for stage in protocol.stages if stage.role == "score")
        protocol = type(protocol)(protocol.name, "Linf", reference, (*stages, *protocol.stages[len(stages) :][:5]))
        out = folder / f"{protocol.name}-{eps}".replace("/", "-")
        results = evaluate_to_folder(Model("model", "test", model), images, protocol, out)
        found.append(results["worst_case"]["Linf"][eps])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_autoattack_agrees_with_the_reference(kind, images, request, tmp_path):
    """On 40 digits, where one image is 2.5 points: the same, or one image apart."""
    pytest.importorskip("pyautoattack")
    some = images.take(torch.arange(40))
    ours, theirs = autoattack_accuracies(request.getfixturevalue(kind), some, "0.1", tmp_path)
    print(kind, ours, theirs)
    assert abs(ours - theirs) <= 1 / 40 + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_autoattack_is_within_half_a_point_of_the_reference_on_mnist(kind, mnist_models, tmp_path):
    """On 500 MNIST test images, with a natural and an adversarially trained model, at radii that leave some of both."""
    pytest.importorskip("pyautoattack")
    images, models = mnist_models
    eps = {"natural": "0.05", "robust": "0.2"}[kind]
    ours, theirs = autoattack_accuracies(models[kind], images, eps, tmp_path)
    print(kind, ours, theirs)
    assert 0.05 < theirs < 0.98
    assert abs(ours - theirs) <= 0.005 + 1e-9


SEEDS = range(6)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["foolbox", "torchattacks"])
@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_pgd_leaves_as_many_as_the_libraries_leave_on_mnist(kind, library, mnist_models):
    """PGD-40 at equal settings: image by image from the clean images, within 0.3 points over random starts."""
    pytest.importorskip(library)
    images, models = mnist_models
    model, labels = models[kind], images.labels
    x = images.images(torch.arange(len(labels)))
    request = Request("pgd", "Linf", {"natural": 0.1, "robust": 0.25}[kind], 0.01, 40)

    def robust(run):
        return torch.cat(
            [model(run(*part)).argmax(1) == part[1] for part in zip(x.split(250), labels.split(250), strict=True)]
        )

    def accuracy(run):
        return float(robust(run).double().mean())

    still = {name: robust(run) for name, run in unmoved(library, model, request).items()}
    assert (still["afd"] != still[library]).sum() <= 1
    means = {"afd": [], library: []}
    for seed in SEEDS:
        torch.manual_seed(seed)
        attack = PGD(model, eps=request.eps, alpha=request.alpha, steps=request.steps)
        means["afd"].append(accuracy(lambda x, y, attack=attack, seed=seed: attack(x, y, seed=seed)))
        means[library].append(accuracy(adapted(library, model, request)))
    ours, theirs = (sum(found) / len(SEEDS) for found in means.values())
    print(kind, library, float(still["afd"].double().mean()), ours, theirs)
    assert 0.02 < ours < 0.98
    assert abs(ours - theirs) <= 0.003 + 1e-9


def unmoved(library, model, request):
    """afd's PGD and the library's, both from the clean images."""
    settings = {"eps": request.eps, "alpha": request.alpha, "steps": request.steps, "random_start": False}
    runs = {"afd": PGD(model, **settings)}
    if library == "torchattacks":
        import torchattacks

        runs[library] = torchattacks.PGD(model, **settings)
    else:
        import foolbox

        attack = foolbox.attacks.LinfPGD(abs_stepsize=request.alpha, steps=request.steps, random_start=False)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        runs[library] = lambda x, y: attack(wrapped, x, y, epsilons=request.eps)[1]
    return runs
