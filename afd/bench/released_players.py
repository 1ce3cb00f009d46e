"""Released training flows, as in `afd.bench.released`, with networks beside the model: AWP's proxy, AFD's players.

The released training flow of JARN, as in `afd.bench.released`, with its adapter and discriminator.
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.optim import SGD, Optimizer

from afd.attacks.engine import evaluating
from afd.bench.baselines import TorchDiscriminator
from afd.bench.released import TRADES, Released, RiceAT, logged
from afd.nn import FeatureClassifier

SMALLEST = 1e-20  # added to the norm of a proxy's move


# --- Adversarial weight perturbation ----------------------------------------------------------------------------------


class AWP(Released):
    """Base of the two methods in csdongxian/AWP (utils_awp.py, train_cifar10.py, train_trades_cifar.py).

    A second network, the proxy, is loaded with the model's weights and buffers, and its own SGD (no momentum) descends
    the negative loss once. The move of each of its weight tensors of two or more dimensions, scaled to gamma times the
    weight's length, is added to the model's; there, gradient and step are taken, weight decay included; then the move
    is subtracted again. The proxy's pass does not touch the model's running statistics.

    Args:
        gamma: length of a move, in lengths of the weight.
        start_epoch: the first in which weights are moved, counted from 1.
        proxy_lr: rate of the proxy's SGD, which cancels out.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        gamma: float,
        start_epoch: int = 1,
        proxy_lr: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(model, optimizer, **settings)
        self.gamma, self.start_epoch = gamma, start_epoch
        self.proxy = copy.deepcopy(model)
        self.proxy_optimizer = SGD(self.proxy.parameters(), proxy_lr)

    @abstractmethod
    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that is descended, and logits of attacked images."""

    @abstractmethod
    def proxy_loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The loss that the proxy ascends."""

    def trained(self, x: Tensor, x_adv: Tensor, y: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Moves the weights up and takes the step there; returns the loss, and logits of attacked images."""
        self.model.train()
        moves = self.moves(x, x_adv, y) if epoch >= self.start_epoch else {}
        self.add(moves, self.gamma)
        loss, logits = self.loss(self.model, x, x_adv, y)
        self.step(loss, moves)
        return loss, logits

    def step(self, loss: Tensor, moves: dict[str, Tensor]) -> None:
        """The optimizer's step at the moved weights, which are then moved back."""
        self.update(loss)
        self.add(moves, -self.gamma)

    def moves(self, x: Tensor, x_adv: Tensor, y: Tensor) -> dict[str, Tensor]:
        """By the proxy's names of weights: its move, as long as the weight."""
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        self.proxy_optimizer.zero_grad()
        torch.autograd.backward(-self.proxy_loss(x, x_adv, y))
        self.proxy_optimizer.step()
        found, moved = {}, self.proxy.state_dict()
        for name, weight in self.model.state_dict().items():
            if weight.dim() > 1 and "weight" in name:
                move = moved[name] - weight
                found[name] = weight.norm() / (move.norm() + SMALLEST) * move
        return found

    @torch.no_grad()
    def add(self, moves: dict[str, Tensor], share: float) -> None:
        """Adds a share of the moves to the weights."""
        for name, weight in self.model.named_parameters():
            if name in moves:
                weight.add_(share * moves[name])


class ATAWP(AWP, RiceAT):
    """AT-AWP of csdongxian/AWP (AT_AWP): `RiceAT` with its attack and its log, at moved weights; gamma is 0.01.

    There, the attack on the first batch of an epoch runs in evaluation mode, in which testing has left the model; here
    all run in training mode.
    """

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:
        """See `Released`."""
        x_adv = self.attacked(x, y)
        loss, logits = self.trained(x, x_adv, y, epoch)
        self.log(x, y, loss, logits)
        return loss.detach()

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `AWP`."""
        logits = model(x_adv)
        return F.cross_entropy(logits, y), logits

    def proxy_loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """See `AWP`."""
        return self.loss(self.proxy, x, x_adv, y)[0]


class TRADESAWP(AWP, TRADES):
    """TRADES-AWP of csdongxian/AWP (trades_AWP): gamma is 0.005, from epoch 10 on.

    The attack is that of `TRADES`. The proxy passes clean, attacked and clean images; the model attacked, clean and
    clean ones, which moves its running statistics in another order than TRADES alone does.
    """

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:
        """See `Released`."""
        loss, logits = self.trained(x, self.attacked(x), y, epoch)
        logged(loss, logits, y)
        return loss.detach()

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `AWP`."""
        attacked = model(x_adv)
        robust = F.kl_div(F.log_softmax(attacked, 1), F.softmax(model(x), 1), reduction="batchmean")
        return F.cross_entropy(model(x), y) + self.beta * robust, attacked

    def proxy_loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """See `AWP`."""
        natural = F.cross_entropy(self.proxy(x), y)
        robust = F.kl_div(F.log_softmax(self.proxy(x_adv), 1), F.softmax(self.proxy(x), 1), reduction="batchmean")
        return natural + self.beta * robust


# --- Adversarial feature desensitization ------------------------------------------------------------------------------


class AFD:
    """A training step of the AFD paper's released code, transcribed: AFD-WGAN's three updates with SGD.

    The released program needs a library that no longer imports, so its flow is written down here, with its five
    forwards and four backwards of F, the gradients it computes and throws away, PyTorch's eager spectral norm, and a
    score read by the host in each update. (Its wrapper around pyautoattack's Auto-PGD, which passes the model a few
    times more, is left out; so are its histograms.) BatchNorm is in evaluation mode during the attack.

    Args:
        model: F and C.
        lr: of all three optimizers.
        attack: (x, y) -> x', called with the model in evaluation mode and its parameters frozen.
    """

    batchnorm = "eval"

    def __init__(
        self, model: FeatureClassifier, lr: float, attack: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.model, self.attack = model, attack
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older spectral norm is what was released
            self.judge = TorchDiscriminator(model.num_features, model.num_classes, spectral_norm)
        self.judge.to(next(model.parameters()).device)
        self.task = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        self.discriminator = SGD(self.judge.parameters(), lr, momentum=0.9)
        self.features = SGD(model.encoder.parameters(), lr, momentum=0.9)

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 1) -> Tensor:  # noqa: ARG002
        """Attacks and trains; returns L_C, detached."""
        assert self.attack is not None
        with evaluating(self.model):
            x_adv = self.attack(x, y).detach()
        return self.trained(x, y, x_adv)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Of images, through F: [N]."""
        score: Tensor = self.judge(F.normalize(self.model.encoder(x)), y)
        return score

    def trained(self, x: Tensor, y: Tensor, x_adv: Tensor) -> Tensor:
        """What comes after the attack."""
        self.model.train()
        self.judge.train()
        self.task.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        torch.autograd.backward(loss)
        self.task.step()

        self.discriminator.zero_grad()
        natural, adversarial = self.scores(x, y), self.scores(x_adv, y)
        natural.mean().item()
        adversarial.mean().item()
        # goes back through F as well, where nobody uses what it brings
        torch.autograd.backward(adversarial.mean() - natural.mean())
        self.discriminator.step()

        self.features.zero_grad()
        adversarial = self.scores(x_adv, y)
        with torch.no_grad():
            guessed = self.model(x_adv).argmax(1)
        (guessed == y).sum().item()
        torch.autograd.backward(-adversarial.mean())
        self.features.step()
        return loss.detach()


# --- JARN -----------------------------------------------------------------------------------------------------------


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
