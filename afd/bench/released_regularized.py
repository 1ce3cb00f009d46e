"""Released training flows of methods that regularise how the model answers near an image: see `afd.bench.released`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from afd.bench.released import Released

BETA1, BETA2, TINY = 0.9, 0.999, 1e-9  # of the unrolled Adam


class LLR(Released):
    """LLR of deepmind/local_linearity_regularizer (graph.py, regularizers.py, batchnorm.py), from TensorFlow 1.

    Its search is `pgd_attack` of deepmind/interval-bound-propagation (attacks.py), by its unrolled Adam. Clean images
    are passed twice: for the cross-entropy, which moves running statistics, and for the regulariser, which keeps the
    batch's; all other passes normalise by those, and gradients of the loss go back through them. In the search, the
    linear part counts as a constant. Weight decay is the optimizer's here.

    Args:
        task_weight: of the cross-entropy.
        loss_weight: of the regulariser.
        smoothing_factor: of the slope within it.
    """

    batchnorm = "clean"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        task_weight: float = 2.0,
        loss_weight: float = 4.0,
        smoothing_factor: float = 0.3,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.task_weight, self.loss_weight, self.smoothing_factor = task_weight, loss_weight, smoothing_factor

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`."""
        cross_entropy = F.cross_entropy(self.model(x), y, reduction="none")
        regularizer = self.local_linearity(x, y)
        return self.update((self.task_weight * cross_entropy).mean() + self.loss_weight * regularizer)

    def local_linearity(self, x: Tensor, y: Tensor) -> Tensor:
        """The regulariser, []."""
        inputs = x.detach().requires_grad_()
        statistics: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        with self.normalising(statistics.__setitem__, None):
            logits = self.model(inputs)
        probabilities = F.one_hot(y, logits.shape[1]).to(x.dtype)
        loss = F.cross_entropy(logits, probabilities, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), inputs, create_graph=True)

        def measured(new: Tensor, gradient: Tensor, loss: Tensor, extra: bool) -> Tensor:
            with self.normalising(None, statistics):
                new_loss = F.cross_entropy(self.model(new), probabilities, reduction="none")
            along = ((new - x).detach() * gradient).flatten(1).sum(1)
            difference = new_loss - (loss + along)
            found = difference.sign().detach() * difference
            if extra:
                found = found + self.smoothing_factor * along.sign().detach() * along
            return found.mean()

        x_adv = self.searched(x, lambda new: -measured(new, gradient.detach(), loss.detach(), extra=False))
        return measured(x_adv, gradient, loss, extra=True)

    def searched(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Images of the ball at which a loss is small."""
        moved = self.start(x) - x
        m, u = torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, self.steps + 1):
            moved = moved.detach().requires_grad_()
            (grad,) = torch.autograd.grad(loss(x + moved), moved)
            m, u = BETA1 * m + (1 - BETA1) * grad, BETA2 * u + (1 - BETA2) * grad * grad
            corrected = m / (1 - BETA1**t), u / (1 - BETA2**t)
            moved = moved.detach() - self.alpha * corrected[0] / (corrected[1].sqrt() + TINY)
            moved = (x + moved.clamp(-self.eps, self.eps)).clamp(0, 1) - x
        return x + moved

    @contextmanager
    def normalising(
        self,
        get: Callable[[_BatchNorm, tuple[Tensor, Tensor]], None] | None,
        given: dict[_BatchNorm, tuple[Tensor, Tensor]] | None,
    ) -> Iterator[None]:
        """Inside, BatchNorm normalises by the batch's statistics, which `get` is shown, or by those that are given."""

        def normalised(layer: _BatchNorm) -> Callable[[Tensor], Tensor]:
            def forward(x: Tensor) -> Tensor:
                channels = [1, -1] + [1] * (x.dim() - 2)
                if given is not None:
                    mean, variance = given[layer]
                else:
                    others = [dim for dim in range(x.dim()) if dim != 1]
                    mean = x.mean(others)
                    variance = (x**2).mean(others) - mean**2
                if get is not None:
                    get(layer, (mean, variance))
                scale = (variance + layer.eps).rsqrt() * layer.weight
                return x * scale.view(channels) + (layer.bias - mean * scale).view(channels)

            return forward

        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        for layer in layers:
            vars(layer)["forward"] = normalised(layer)
        try:
            yield
        finally:
            for layer in layers:
                del vars(layer)["forward"]


class GAT(Released):
    """GAT of val-iisc/GAMA-GAT (CIFAR10/GAT_cifar10.py).

    Clean images are passed in training mode, for what guides the attack; attacked ones in evaluation mode, of which the
    backward computes gradients of all weights, also through the clean pass, and also where the guidance counts
    nothing: in every second batch of an epoch, the first included. The loss passes attacked, then clean images in
    training mode.

    Args:
        weight: of the squared distance of probabilities.
        growth: what it is multiplied by in the end.
        growth_epoch: the first epoch in which it is, counted from 1.
    """

    batchnorm = "eval"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        weight: float = 10.0,
        growth: float = 4.0,
        growth_epoch: int = 87,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.weight, self.growth, self.growth_epoch = weight, growth, growth_epoch
        self.epoch, self.counter = 0, 0

    def drawn(self, x: Tensor) -> Tensor:
        """Each element moved by half of eps up or down."""
        return (x + self.eps / 2 * (0.5 - torch.rand_like(x)).sign()).clamp(0, 1)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:
        """See `Released`."""
        if epoch != self.epoch:
            self.epoch, self.counter = epoch, 0
        p_out = F.softmax(self.model(x), 1)
        start = self.start(x)
        self.model.eval()
        image = start.detach().requires_grad_()
        out = self.model(image)
        distance = ((p_out - F.softmax(out, 1)) ** 2.0).sum(1).mean(0)
        torch.autograd.backward(F.cross_entropy(out, y) + (self.counter % 2) * self.weight_now * distance)
        x_adv = self.clipped(x, image)
        self.model.train()
        q_out = F.softmax(self.model(x_adv), 1)
        clean = self.model(x)
        distance = ((F.softmax(clean, 1) - q_out) ** 2.0).sum(1).mean(0)
        self.counter += 1
        return self.update(F.cross_entropy(clean, y) + self.weight_now * distance)

    @property
    def weight_now(self) -> float:
        """The weight in this epoch."""
        return self.weight * self.growth if self.epoch >= self.growth_epoch else self.weight

    def clipped(self, x: Tensor, image: Tensor) -> Tensor:
        """One step from an image that has its gradient, in the ball."""
        assert image.grad is not None
        moved = (image.detach() + self.alpha * image.grad.sign()).clamp(0, 1)
        return (x + (moved - x).clamp(-self.eps, self.eps)).clamp(0, 1)


class NuAT(GAT):
    """NuAT of val-iisc/NuAT (CIFAR10/NuAT_cifar10.py): the flow of `GAT`, with the nuclear norm of logits.

    Where the nuclear norm does not guide the attack, it is not computed. It is divided by the batch size that is set,
    here by that of the batch. The weight grows from 0 by an equal share after each epoch; here it is what it is.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, weight: float = 4.5, **settings: Any) -> None:
        super().__init__(model, optimizer, weight=weight, growth=1.0, **settings)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:
        """See `Released`."""
        if epoch != self.epoch:
            self.epoch, self.counter = epoch, 0
        out = self.model(x)
        start = self.start(x)
        self.model.eval()
        image = start.detach().requires_grad_()
        new = self.model(image)
        cost = F.cross_entropy(new, y)
        if self.counter % 2:
            cost = cost + self.weight * torch.linalg.matrix_norm(out - new, "nuc") / len(x)
        torch.autograd.backward(cost)
        x_adv = self.clipped(x, image)
        self.model.train()
        attacked = self.model(x_adv)
        clean = self.model(x)
        distance = torch.linalg.matrix_norm(clean - attacked, "nuc") / len(x)
        self.counter += 1
        return self.update(F.cross_entropy(clean, y) + self.weight * distance)
