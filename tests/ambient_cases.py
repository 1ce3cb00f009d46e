"""One call of every op and every module of afd, to be made in any surroundings: forward, backward and back again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from afd import nn, ops

Case = Callable[[], list[Tensor]]


def _numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=dtype, device="cpu")


def _labels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


X, GRAD = _numbers(3, 2, 5, 4), _numbers(3, 2, 5, 4, seed=1) - 0.5
X_ADV = X + 0.3 * (_numbers(3, 2, 5, 4, seed=2) - 0.5)
PER_SAMPLE = _numbers(3, seed=3) + 0.05
PIXELS = (255 * _numbers(6, 3, 5, 4)).to(torch.uint8)


def steps(norm: str, op: str) -> list[Tensor]:
    x_adv, settings = X_ADV.clone(), {"eps": PER_SAMPLE, "norm": norm}
    if op in ("pgd_step", "pgd_step_"):
        return [getattr(ops, op)(x_adv, X, GRAD, alpha=0.1, sparsity=PER_SAMPLE, **settings)]
    if op in ("project", "project_"):
        return [getattr(ops, op)(x_adv, X, **settings)]
    tensors = (X,) if op == "random_start" else (x_adv, X)
    return [getattr(ops, op)(*tensors, seed=7, **settings)]


def project_plane() -> list[Tensor]:
    return list(ops.project_plane(torch.cat([X, X_ADV]), GRAD, PER_SAMPLE, at=X, norm="L2"))


def apgd_step() -> list[Tensor]:
    return [ops.apgd_step(X_ADV, X_ADV + 0.01, X, GRAD, step=PER_SAMPLE, eps=0.2)]


def apgd_step_() -> list[Tensor]:
    x_adv, old = X_ADV.clone(), X_ADV + 0.01
    return [ops.apgd_step_(x_adv, old, X, GRAD, step=PER_SAMPLE, eps=0.2), old]


def apgd_update_() -> list[Tensor]:
    rows = [tensor.clone() for tensor in (X_ADV, GRAD, X, GRAD, X)]
    values = [PER_SAMPLE + k for k in (0.0, 0.1, -0.1, 0.2, 0.3)]
    flags = [torch.arange(3, dtype=torch.int64, device="cpu") % 2 == k for k in (0, 1, 0)]
    counts = [torch.zeros(3, dtype=dtype, device="cpu") for dtype in (torch.int32, torch.uint8)]
    x_adv, grad, *best = rows
    loss, *bests, step = values
    fooled, reduced, broken = flags
    ops.apgd_update_(
        x_adv, grad, loss, fooled,
        x_best=best[0], grad_best=best[1], x_best_adv=best[2], loss_best=bests[0], loss_last=bests[1],
        loss_at_check=bests[2], step=step, increases=counts[0], reduced=reduced, broken=broken, moves=counts[1],
        interval=3,
    )  # fmt: skip
    return [*rows, *values, *flags, *counts]


def square_step_() -> list[Tensor]:
    x_tried, x_best, loss_best = X_ADV.clone(), X_ADV.clone(), torch.full_like(PER_SAMPLE, -1.0)
    state = torch.ones(3, dtype=torch.uint8, device="cpu")
    for norm, loss in (("Linf", "margin"), ("L2", "ce"), ("L1", "margin")):
        pattern = ops.square_pattern(3, norm).float()
        ops.square_step_(
            x_tried, x_best, X, _numbers(3, 4, seed=6), _labels(0, 1, 3), loss_best=loss_best, state=state,
            rows=_labels(2, 0, 1), query=2, side=3, last_side=3, pattern=pattern, eps=PER_SAMPLE, seed=7, norm=norm,
            loss=loss,
        )  # fmt: skip
    return [x_tried, x_best, loss_best, state]


def load_batch() -> list[Tensor]:
    draws = _labels(3, 10, 5, 70, 2, 9)
    return [ops.load_batch(PIXELS, _labels(4, 0, 4), draws=draws, padding=1, flip=True)]


# --- Differentiable -------------------------------------------------------------------------------------------------


def twice(formula: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Values; and if gradients are recorded here, those, and the gradients of a penalty on them."""
    out = formula(*leaves)
    if not torch.is_grad_enabled():
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    loss = (out * weights).sum()
    found = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    first, leaves = zip(*((g, x) for g, x in zip(found, leaves, strict=True) if g is not None), strict=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in again), leaves, allow_unused=True)
    return [out.detach(), *first, *(g.detach() for g in again), *(g for g in second if g is not None)]


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def spectra(*weights: Tensor) -> list[ops.Spectrum]:
    us, vs = ([_numbers(w.shape[side], seed=side) for w in weights] for side in (0, 1))
    return ops.spectral_norm([w.detach() for w in weights], us, vs, n_iter=3)


W, HEAD, TABLE, BIAS = _numbers(4, 5) - 0.4, _numbers(1, 5) - 0.4, _numbers(3, 5, seed=4) - 0.4, _numbers(4)
FEATURES, Y = _numbers(6, 5, seed=5) - 0.5, _labels(0, 2, 1, 1, 0, 2)
OF_W, OF_HEAD, OF_TABLE = spectra(W, HEAD, TABLE)
LEAVES = [leaf(x) for x in (FEATURES, W, BIAS)]
HEAD_LEAVES = [leaf(x) for x in (FEATURES, HEAD, BIAS[:1], TABLE)]


def spectral_norm() -> list[Tensor]:
    def sigma(weight: Tensor) -> Tensor:
        return ops.spectral_norm([weight], [u], [v], n_iter=2)[0].sigma.square()

    u, v = BIAS, FEATURES[0]
    found = twice(sigma, LEAVES[1])
    return [*found, *(t.detach() for t in ops.spectral_norm([W], [u], [v], n_iter=2)[0])]


def spectral_linear() -> list[Tensor]:
    return twice(lambda x, w, b: ops.spectral_linear(x, w, b, OF_W, negative_slope=0.2), *LEAVES)


def projection_logits() -> list[Tensor]:
    return twice(lambda h, w, b, e: ops.projection_logits(h, w, b, OF_HEAD, Y, e, OF_TABLE), *HEAD_LEAVES)


class InAGroup(torch.nn.Module):
    """Two layers that share a group."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([nn.SpectralLinear(5, 6, negative_slope=0.2), nn.SpectralLinear(6, 2)])
        self.spectra = nn.SpectralGroup([("first", self.layers[0]), ("second", self.layers[1])])

    def forward(self, x: Tensor) -> Tensor:
        for layer, spectrum in zip(self.layers, self.spectra(), strict=True):
            x = layer(x, spectrum)
        return x


def of_module(module: torch.nn.Module, *inputs: Tensor) -> Case:
    """A run of a module that was made outside, from the state it was made with, and what the run leaves behind."""
    start = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = list(module.parameters())

    def run() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(start[name])
        for training in (True, False):
            module.train(training)
            found += twice(lambda *_: module(*inputs), *parameters)
        return [*found, *(buffer.clone() for buffer in module.buffers())]

    return run


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    MODULES: dict[str, Case] = {
        "SpectralLinear": of_module(nn.SpectralLinear(5, 4, negative_slope=0.2), FEATURES),
        "SpectralEmbedding": of_module(nn.SpectralEmbedding(3, 5), Y),
        "SpectralGroup": of_module(InAGroup(), FEATURES),
        "ProjectionDiscriminator": of_module(nn.ProjectionDiscriminator(5, 3, hidden=7), FEATURES, Y),
        "ProjectionDiscriminator without labels": of_module(nn.ProjectionDiscriminator(5, 3, depth=1), FEATURES),
    }

OPS: dict[str, Case] = {
    f"{op}, {norm}": partial(steps, norm, op)
    for op in ("project", "project_", "pgd_step", "pgd_step_", "random_start", "random_start_")
    for norm in ("Linf", "L2", "L1")
}
ALONE = (
    project_plane,
    apgd_step,
    apgd_step_,
    apgd_update_,
    square_step_,
    load_batch,
    spectral_norm,
    spectral_linear,
    projection_logits,
)
OPS |= {case.__name__: case for case in ALONE}
CASES = OPS | MODULES
