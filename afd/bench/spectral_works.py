"""The spectral ops' work, as `afd.bench.works` has that of the attacks' ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from afd import ops
from afd.bench.work import Work, copying, held

GROUP = ((512, 512), (512, 512), (1, 512), (100, 512))  # the discriminator's matrices
WIDTH, CLASSES, BATCHES = 512, 100, {"cifar": 128, "imagenet": 1024}
SLOPE = 0.2


def spectral_norm(size: str, device: torch.device) -> Iterator[Work]:
    """One power iteration of the discriminator's matrices, each read once; the same whatever the images' size."""
    if size != "cifar":
        return
    weights = [torch.randn(shape, device=device) for shape in GROUP]
    us, vs = ([_unit(shape[side], device) for shape in GROUP] for side in (0, 1))

    def by_hand() -> list[Tensor]:  # as torch.nn.utils.parametrizations.spectral_norm does it
        sigmas = []
        for weight, u, v in zip(weights, us, vs, strict=True):
            u = F.normalize(torch.mv(weight, v), dim=0)
            sigmas.append(torch.dot(u, torch.mv(weight, F.normalize(torch.mv(weight.T, u), dim=0))))
        return sigmas

    yield Work(
        "spectral_norm 512, 512, 1, 100 x 512",
        lambda: ops.spectral_norm(weights, us, vs),
        by_hand,
        copying(held(*weights), device),
        held(*weights),
        held(*weights),
    )


def spectral_linear(size: str, device: torch.device) -> Iterator[Work]:
    """A layer with bias and LeakyReLU, forward and backward."""
    batch = BATCHES[size]
    inputs = _wanted(device, (batch, WIDTH), (WIDTH, WIDTH), (WIDTH,))
    x, weight, bias = inputs
    spectrum = _spectrum(weight)
    grad = torch.randn(batch, WIDTH, device=device)

    def layer(weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.leaky_relu(F.linear(x, weight, bias), SLOPE), inputs, grad)

    yield Work(
        f"spectral_linear {batch} x {WIDTH}",
        lambda: torch.autograd.grad(ops.spectral_linear(x, weight, bias, spectrum, negative_slope=SLOPE), inputs, grad),
        lambda: layer(_normalised(weight, spectrum)),
        lambda: layer(weight),
        held(*inputs, grad),
    )


def projection_logits(size: str, device: torch.device) -> Iterator[Work]:
    """The projection head, forward and backward."""
    batch = BATCHES[size]
    inputs = _wanted(device, (batch, WIDTH), (1, WIDTH), (1,), (CLASSES, WIDTH))
    h, w, bias, e = inputs
    of_w, of_e = _spectrum(w), _spectrum(e)
    y, grad = torch.randint(CLASSES, (batch,), device=device), torch.randn(batch, device=device)

    def head(w: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        scores = F.linear(h, w, bias).squeeze(1) + (F.embedding(y, e) * h).sum(1)
        return torch.autograd.grad(scores, inputs, grad)

    yield Work(
        f"projection_logits {batch} x {WIDTH}",
        lambda: torch.autograd.grad(ops.projection_logits(h, w, bias, of_w, y, e, of_e), inputs, grad),
        lambda: head(_normalised(w, of_w), _normalised(e, of_e)),
        lambda: head(w, e),
        held(*inputs, grad),
    )


def _wanted(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def _unit(length: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(length, device=device), dim=0)


def _spectrum(weight: Tensor) -> ops.Spectrum:
    rows, columns = weight.shape
    sides = _unit(rows, weight.device), _unit(columns, weight.device)
    return ops.spectral_norm([weight.detach()], [sides[0]], [sides[1]])[0]


def _normalised(weight: Tensor, spectrum: ops.Spectrum) -> Tensor:
    """As torch's parametrisation: sigma is recomputed, so that the gradient goes through it."""
    return weight / torch.dot(spectrum.u, torch.mv(weight, spectrum.v))
