"""Every adapter: its points lie in the ball, and it leaves about the accuracy that ours leaves."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from afd.bench import peers
from afd.bench.models import Subject
from afd.bench.request import NotOfferedError, Request, ours, requests
from afd.errors import InputError

NORMS = {"Linf": 0.08, "L2": 0.5, "L1": 3.0}


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 10)).eval()
    x = torch.rand(100, 1, 8, 8)
    return Subject("small", model, x, model(x).argmax(1))


def left(target, x_adv):
    return float((target.model(x_adv).argmax(1) == target.y).float().mean())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["pgd", "apgd"])
@pytest.mark.parametrize("name", sorted(set(peers.PEERS) - {"compile"}))
def test_adapters_keep_to_the_ball_and_are_about_as_strong(target, name, attack, norm):
    if importlib.util.find_spec(peers.PEERS[name].module) is None:
        pytest.skip(f"{name} is not installed")
    eps = NORMS[norm]
    request = Request(attack, norm, eps, eps / 4, 20)
    try:
        run = peers.adapted(name, target.model, request)
    except NotOfferedError as error:
        assert norm in str(error) or str(error) == "eager-tf32 needs --device cuda"  # noqa: PT017
        return
    x_adv = run(target.x, target.y)
    order = {"Linf": float("inf"), "L2": 2, "L1": 1}[norm]
    assert torch.linalg.vector_norm((x_adv - target.x).flatten(1), order, dim=1).max() <= eps * (1 + 1e-4)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    own = left(target, ours(target.model, request)(target.x, target.y))
    assert 0 < own < 0.9
    weak = {("foolbox", "L1"), ("art", "L1"), ("art-defaults", "L1")}  # no steepest ascent there
    slack = 0.5 if (name, norm) in weak else 0.2 if name == "pyautoattack-defaults" else 0.1
    assert abs(left(target, x_adv) - own) <= slack


def test_unknown_and_missing_peers_are_named(target, monkeypatch):
    request = Request("pgd", "Linf", 0.1, 0.02, 3)
    with pytest.raises(InputError, match="against is 'cleverhans'; allowed are torchattacks, foolbox"):
        peers.adapted("cleverhans", target.model, request)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(peers.PeerMissingError, match="art is not installed; add it with: pip install adversarial-rob"):
        peers.adapted("art", target.model, request)


def test_requests():
    made = requests(["pgd", "apgd"], ["L2"], 10, {"L2": 0.5})
    assert [request.name for request in made] == ["PGD-10 L2", "APGD-10 L2"]
    assert made[0].alpha == pytest.approx(0.125)
    assert [request.passes for request in made] == [10, 11]


def test_art_by_default_takes_32_images_at_a_time(target):
    if not peers.PEERS["art"].installed:
        pytest.skip("art is not installed")
    sizes = []
    hook = target.model[0].register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    for name in ("art", "art-defaults"):
        peers.adapted(name, target.model, Request("pgd", "Linf", 0.08, 0.02, 2))(target.x, target.y)
        sizes.append(name)
    hook.remove()
    whole, parts = sizes[: sizes.index("art")], sizes[sizes.index("art") + 1 : -1]
    assert max(whole) == 100
    assert max(parts) == 32
