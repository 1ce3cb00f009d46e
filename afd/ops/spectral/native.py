"""The spectral ops through the compiled kernels, around torch's own matrix products; float32."""

from __future__ import annotations

import torch
from torch import Tensor

from afd.ops.library import dense, room
from afd.ops.native import launch, workspace_size


def spectral_norm(
    weights: list[Tensor], us: list[Tensor], vs: list[Tensor], n_iter: int, eps: float, first: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `afd.ops.spectral_norm`."""
    us, vs = [u.contiguous() for u in us], [v.contiguous() for v in vs]
    new_us, new_vs = [torch.empty_like(u) for u in us], [torch.empty_like(v) for v in vs]
    shapes = [(u.numel(), v.numel()) for u, v in zip(us, vs, strict=True)]
    sigma = weights[0].new_empty(len(weights))
    workspace = sigma.new_empty(sum(workspace_size("spectral_norm", *shape) for shape in shapes))
    matrices = [
        (weight.data_ptr(), u.data_ptr(), v.data_ptr(), new_u.data_ptr(), new_v.data_ptr(), *shape)
        for weight, u, v, new_u, new_v, shape in zip(weights, us, vs, new_us, new_vs, shapes, strict=True)
    ]
    launch("spectral_norm", sigma, matrices, n_iter, eps, first == "u", sigma.data_ptr(), workspace.data_ptr())
    return sigma, new_us, new_vs


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, slope: float) -> Tensor:
    """See `afd.ops.spectral_linear`: torch's product, then one pass for scale, bias and activation."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    torch.mm(x, weight.t(), out=out)  # into memory of a known dtype: its address goes to the kernel
    bias = None if bias is None else dense(bias)
    launch("spectral_linear", out, out.data_ptr(), _address(bias), sigma.data_ptr(), *out.shape, slope)
    return out


def spectral_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    slope: float,
    wanted: list[bool],
    over: bool = False,
) -> list[Tensor]:
    """The wanted ones of dx, dW and db: one pass (in place if `over`), then torch's products around σ's term of dW."""
    grad, out, u = dense(grad), dense(out), dense(u)
    bias = None if bias is None else dense(bias)
    scaled, bias_grad, u_scaled = grad if over else room(grad, *grad.shape), room(u, *u.shape), room(u, *u.shape)
    workspace = room(u, workspace_size("spectral_linear", *grad.shape))
    launch(
        "spectral_linear_backward", scaled,
        grad.data_ptr(), out.data_ptr(), _address(bias), sigma.data_ptr(), u.data_ptr(),
        scaled.data_ptr(), bias_grad.data_ptr(), u_scaled.data_ptr(), workspace.data_ptr(), *grad.shape, slope,
    )  # fmt: skip
    found = []
    if wanted[0]:
        found.append(torch.mm(scaled, weight, out=room(x, *x.shape)))
    if wanted[1]:
        found.append(torch.outer(u_scaled, v).addmm_(scaled.t(), x))
    if wanted[2]:
        found.append(bias_grad)
    return found


def projection_logits(
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    sigma_w: Tensor,
    y: Tensor | None,
    e: Tensor | None,
    sigma_e: Tensor | None,
) -> Tensor:
    """See `afd.ops.projection_logits`."""
    h, y = dense(h), None if y is None else dense(y)
    score, classes = h.new_empty(h.shape[0]), 0 if y is None or e is None else e.shape[0]
    launch(
        "projection_logits", score,
        h.data_ptr(), w.data_ptr(), _address(bias), sigma_w.data_ptr(), _address(y), _address(e), _address(sigma_e),
        score.data_ptr(), *h.shape, classes,
    )  # fmt: skip
    return score


def projection_logits_backward(
    grad: Tensor,
    h: Tensor,
    w: Tensor,
    spectrum_w: tuple[Tensor, Tensor, Tensor],
    y: Tensor | None,
    e: Tensor | None,
    spectrum_e: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of h, w, bias and e; that of e is None without labels."""
    grad, h = dense(grad), dense(h)
    dh, dw, db = room(h, *h.shape), room(w, *w.shape), room(h, 1)
    labelled = y is not None and e is not None and spectrum_e is not None
    y, de = (dense(y), room(e, *e.shape)) if labelled else (None, None)  # type: ignore[union-attr, arg-type]
    classes = 0 if de is None else de.shape[0]
    of_w, of_e = [dense(t) for t in spectrum_w], [dense(t) for t in spectrum_e or ()]
    workspace = room(h, 2 * workspace_size("projection_logits", h.shape[1], classes)).view(torch.float64)
    launch(
        "projection_logits_backward", dh,
        grad.data_ptr(), h.data_ptr(), w.data_ptr(), *map(Tensor.data_ptr, of_w),
        _address(y), _address(e), *(map(Tensor.data_ptr, of_e) if of_e else (0, 0, 0)),
        dh.data_ptr(), dw.data_ptr(), db.data_ptr(), _address(de), workspace.data_ptr(), *h.shape, classes,
    )  # fmt: skip
    return dh, dw, db, de


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
