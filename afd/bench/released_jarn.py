"""The released training flow of JARN, as in `afd.bench.released`, with its adapter and discriminator."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from afd.bench.released import Released


def standardised(x: Tensor) -> Tensor:
    """What TensorFlow's l2_normalize makes of images that had their mean taken off: each has length 1."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x * x.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-12).rsqrt()


def padded_alike(x: Tensor, kernel: int, stride: int) -> Tensor:
    """x with the zeros around it that TensorFlow's padding "SAME" adds before a convolution."""
    found: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        missing = max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
        found += [missing // 2, missing - missing // 2]
    return F.pad(x, found)


class Discriminator(nn.Module):
    """Five (`layers`) 4x4 convolutions of stride 2, each with BatchNorm and a leaky ReLU, and two logits."""

    def __init__(self, channels: int, width: int, layers: int, pixels: int = 1) -> None:
        super().__init__()
        self.convolutions, self.norms, inputs = nn.ModuleList(), nn.ModuleList(), channels
        for layer in range(layers):
            outputs = width * 2**layer
            self.convolutions.append(nn.Conv2d(inputs, outputs, 4, stride=2))
            self.norms.append(nn.BatchNorm2d(outputs, eps=0.001, momentum=0.1))
            inputs = outputs
        self.linear = nn.Linear(inputs * pixels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, 2] of images [N, C, H, W]."""
        x = standardised(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = norm(convolution(padded_alike(x, 4, 2)))
            x = torch.where(x < 0, 0.1 * x, x)
        logits: Tensor = self.linear(x.flatten(1))
        return logits


class JARN(Released):
    """JARN of alvinchangw/JARN_ICLR2020 (train_jarn.py, model_jarn.py), as its script run_train_jarn.sh runs it.

    Images have uniform noise. In one run of the graph the classifier descends CE - beta CE_D and the adapter
    -gamma CE_D, by a gradient of the whole for each, so that the discriminator is passed backwards twice; in every so
    many steps another run, with a forward and a gradient of the input of its own, updates the discriminator. BatchNorm
    is in training mode throughout, of the discriminator too. Gradients are standardised before they are mixed with the
    image, of which the share is 0, and again by the adapter. All optimizers are alike; the weight decay is of weights,
    and none of biases and norms.

    What that program feeds as the discriminator's images takes, in its graph, the place of the classifier's
    standardised input: in training, but not in testing, the classifier sees pixels. How a model scales its input is
    its own here.

    Args:
        adapter: the adapter's 1x1 convolution; by default a fresh one.
        discriminator: by default a fresh one, for images of 32x32 pixels or less.
        beta: weight of CE_D for the classifier.
        gamma: weight of CE_D for the adapter.
        start_step: steps before the regulariser.
        update_interval: steps from one update of the discriminator to the next.
    """

    batchnorm = "train"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        adapter: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        beta: float = 1.0,
        gamma: float = 1.0,
        start_step: int = 0,
        update_interval: int = 20,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        channels, device = first.in_channels, first.weight.device
        self.adapter = adapter or nn.Conv2d(channels, channels, 1).to(device)
        self.discriminator = discriminator or Discriminator(channels, width=32, layers=5).to(device)
        self.beta, self.gamma, self.start_step, self.update_interval = beta, gamma, start_step, update_interval
        self.adapter_optimizer, self.discriminator_optimizer = map(self.like, (self.adapter, self.discriminator))
        self.step = 0

    def like(self, module: nn.Module) -> Optimizer:
        """An optimizer as the model's."""
        told = self.optimizer.defaults
        weights, others = ([one for one in module.parameters() if (one.dim() > 1) == wide] for wide in (True, False))
        groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
        return SGD(groups, told["lr"], told["momentum"], weight_decay=told["weight_decay"])

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """See `Released`; returns CE."""
        x = self.start(x)
        if self.step >= self.start_step:
            task = self.regularised(x, y)
            if self.step % self.update_interval == 0:
                self.judge(x, y)
        else:
            task = self.update(F.cross_entropy(self.model(x), y))
        self.step += 1
        return task

    def loss_of_discriminator(self, jacobian: Tensor, x: Tensor) -> Tensor:
        """CE_D of gradients, which are class 0, and images, which are class 1."""
        mixed = 1.0 * standardised(jacobian) + (1 - 1.0) * standardised(x)
        adapted = torch.tanh(self.adapter(standardised(mixed)))
        labels = torch.cat([torch.zeros(len(x)), torch.ones(len(x))]).long().to(x.device)
        return F.cross_entropy(self.discriminator(torch.cat([adapted, x])), labels)

    def regularised(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of classifier and adapter."""
        x = x.clone().requires_grad_()
        logits = self.model(x)
        task = F.cross_entropy(logits, y)
        probability = F.softmax(logits, 1)[torch.arange(len(x), device=x.device), y]
        (jacobian,) = torch.autograd.grad(probability.sum(), x, create_graph=True)
        judged = self.loss_of_discriminator(jacobian, x.detach())
        classifier, adapter = list(self.model.parameters()), list(self.adapter.parameters())
        found = torch.autograd.grad(task - self.beta * judged, classifier, retain_graph=True)
        found_of_adapter = torch.autograd.grad(-self.gamma * judged, adapter)
        for parameter, gradient in zip([*classifier, *adapter], [*found, *found_of_adapter], strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.adapter_optimizer.step()
        return task.detach()

    def judge(self, x: Tensor, y: Tensor) -> None:
        """One step of the discriminator."""
        x = x.clone().requires_grad_()
        probability = F.softmax(self.model(x), 1)[torch.arange(len(x), device=x.device), y]
        (jacobian,) = torch.autograd.grad(probability.sum(), x)
        judged = self.loss_of_discriminator(jacobian, x.detach())
        weights = list(self.discriminator.parameters())
        for parameter, gradient in zip(weights, torch.autograd.grad(judged, weights), strict=True):
            parameter.grad = gradient
        self.discriminator_optimizer.step()
