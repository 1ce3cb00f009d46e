"""How attacks of other libraries are called: on plain logits, in ordinary modes, with model and random state kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from afd.attacks.engine import evaluating
from afd.nn.modes import local
from afd.nn.outputs import logits_of


class PlainLogits(nn.Module):
    """A classifier that returns its logits and nothing else, and leaves what it is shown as it was.

    Args:
        model: a classifier in evaluation mode, whose output holds logits [N, K] in any form of `afd.nn.outputs`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of images [N, ...], float32 or wider."""
        logits = logits_of(self.model(x.clone()), x.shape[0])
        # libraries compute with them as with float32, and fail late where they are narrower
        return logits.float() if logits.element_size() < 4 else logits


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """PyTorch as it starts: float32 by default, on the CPU, with gradients, without autocast; then as it was.

    The default dtype is one for the whole process.
    """
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # which allows gradients, too
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if before != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, before)
        yield


@contextmanager
def lent(model: nn.Module, x: Tensor) -> Iterator[PlainLogits]:
    """The model, for a library to attack on the device of x; draws from the global generators are taken back."""
    cuda = [x.device] if x.is_cuda else []
    with ordinary_modes(), evaluating(model), torch.random.fork_rng(cuda):
        yield PlainLogits(local(model))
