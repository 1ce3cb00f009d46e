"""PGD as people write it by hand in plain PyTorch: whole batch, nothing folded, nothing replayed."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks.execution import channels_last
from afd.bench import eager
from afd.bench.arithmetic import tf32
from afd.bench.request import NORMS, NotOfferedError, Request, Run

OFFERED = {"pgd": NORMS}


def fp32(model: nn.Module, request: Request) -> Run:
    """In float32."""
    request.only("a loop by hand", OFFERED)

    def run(x: Tensor, y: Tensor) -> Tensor:
        x_adv = x + request.eps * (2 * torch.rand_like(x) - 1) if request.norm == "Linf" else x.clone()
        x_adv = eager.project(x_adv, x, request.eps, 0.0, 1.0, request.norm)
        for _ in range(request.steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            x_adv = eager.pgd_step(
                x_adv.detach(), x, grad, request.alpha, request.eps, 0.0, 1.0, request.norm, sparsity=0.05
            )
        return x_adv

    return run


def in_tf32(model: nn.Module, request: Request) -> Run:
    """In float32 with CUDA's shorter products."""
    if next(model.parameters()).device.type != "cuda":
        raise NotOfferedError("eager-tf32 needs --device cuda")
    return tf32(True)(fp32(model, request))


def bf16(model: nn.Module, request: Request) -> Run:
    """With the model in bfloat16 by autocast, and in the memory layout that convolutions like."""
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = fp32(laid_out, request)

    def run(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return plain(channels_last(x), y)

    return run


def compiled(model: nn.Module, request: Request) -> Run:
    """In float32 with the model under torch.compile; where that has no compiler, the first call says so."""
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    plain = fp32(torch.compile(model), request)  # type: ignore[arg-type]

    def run(x: Tensor, y: Tensor) -> Tensor:
        try:
            return plain(x, y)
        except TorchDynamoException as error:
            raise NotOfferedError(f"torch.compile fails here: {str(error).splitlines()[0]}") from error

    return run
