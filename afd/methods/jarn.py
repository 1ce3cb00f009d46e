"""Jacobian adversarially regularised networks: gradients of the model's input that a discriminator takes for images.

Players: the classifier with weights θ, an adapter ω and a discriminator ψ. With J = ∂p_y/∂x at noisy images x, one step
does

    θ ← θ - α ∇(CE - β CE_D)        ω ← ω + α γ ∇CE_D        and, in every so many steps, ψ ← ψ - α ∇CE_D

where CE_D is the cross-entropy of the discriminator, which tells adapted gradients from the images themselves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afd.attacks.ball import Ball, Norm, ball_of_norm
from afd.attacks.settings import AttackSettings
from afd.errors import InputError, number, whole
from afd.execution import Execution, Wrap, alone, as_torch_starts, feature_dtype, lay_out_plainly, unsynchronised
from afd.methods.base import Batch, Part, Step, parts, unwrapped
from afd.methods.inputs import as_split, device_of
from afd.methods.optimizers import take_step, trainable
from afd.methods.supervised import Optimized
from afd.nn import Split

LAYERS = 5  # of the authors' discriminator, which leave a pixel of 32x32 images
SLOPE, VARIANCE = 0.1, 1e-3  # of its leaky ReLUs below 0, and what its BatchNorm adds to variances
GRADIENT, IMAGE = 0, 1  # its classes


# --- The networks beside the model ----------------------------------------------------------------------------------


def standardised(images: Tensor) -> Tensor:
    """Each image less its mean, as a vector of length 1 (what is constant stays 0): [N, C, H, W]."""
    centred = images - images.mean((1, 2, 3), keepdim=True)
    return F.normalize(centred.flatten(1)).reshape(images.shape)


class Adapter(nn.Module):
    """Gradients of the input to what may look like images: standardised, a 1x1 convolution, tanh; [N, C, H, W].

    Args:
        channels: of the images.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 1)
        _draw(self.convolution)

    def forward(self, gradients: Tensor) -> Tensor:
        """Adapted gradients, like the gradients."""
        adapted: Tensor = self.convolution(standardised(gradients)).tanh()
        return adapted


class ConvDiscriminator(nn.Module):
    """Images to two logits: that they are gradients, and that they are images; each is standardised first.

    4x4 convolutions that halve the image, each with twice the filters of the one before, BatchNorm and a leaky ReLU
    behind it; then the mean over what is left of the image (a pixel, in the authors' network), and a linear layer.

    Args:
        channels: of the images, of any size.
        width: filters of the first convolution.
        layers: convolutions.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *(width * 2**layer for layer in range(layers))]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 4, stride=2, padding=1) for inputs, outputs in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs, eps=VARIANCE) for outputs in widths[1:])
        self.linear = nn.Linear(widths[-1], 2)
        for convolution in self.convolutions:
            _draw(convolution)
        nn.init.uniform_(self.linear.weight, -math.sqrt(3 / widths[-1]), math.sqrt(3 / widths[-1]))
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 2] of images [N, C, H, W]."""
        x = standardised(images)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            height, width = x.shape[2:]
            if height % 2 or width % 2:  # rounded up, as TensorFlow's padding "SAME" does
                x = F.pad(x, (0, width % 2, 0, height % 2))
            x = F.leaky_relu(norm(convolution(x)), SLOPE)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _draw(convolution: nn.Module) -> None:
    """A convolution's first weights, as the authors draw them."""
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (convolution.weight[0, 0].numel() * len(convolution.weight))))
    nn.init.zeros_(convolution.bias)


def channels_of(model: nn.Module) -> int:
    """The channels of a model's images, which its first convolution takes.

    Raises:
        InputError: it has none.
    """
    found = next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if found is None:
        raise InputError(
            "channels is missing, and the model has no convolution that says how many its images have; name it"
        )
    return found


def layers_for(model: Any) -> int:
    """As many convolutions as leave a pixel of a model's images, at most 5; 5 where it does not know their size."""
    shape = (getattr(model, "recipe", None) or {}).get("shape")
    return LAYERS if shape is None else min(LAYERS, max(1, math.ceil(math.log2(max(shape[1:])))))


# --- The method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class JARN(Optimized):
    """JARN (Chan et al. 2020): CE(f(x), y) - β CE_D, by which gradients of p_y come to look like images; no attack.

    x are images with uniform noise. What a discriminator is shown of the gradient of p_y at x is its direction, mapped
    by an adapter; the model and the adapter are trained to be mistaken for images by it, with a backward through the
    gradient. The defaults are those of the authors' script, but for its start: it regularises in the last 20,000 of
    160,000 steps of 64 images only (``start_step=140000``; their program's own default is 0), with learning rates that
    fall to a tenth at 80,000 and 120,000. What it gains is largely masked gradients (the authors' network is reported
    at 15.5% and has 0.26% under AutoAttack): measure it by many restarts and without gradients.

    Once it is regularised, passes of training are in float32 whatever precision is asked for: what bfloat16 makes of a
    gradient of a gradient has cosines of 0.79 to 0.99 with it on small trained networks, where a training pass has
    0.997 and more. BatchNorm of the discriminator sees gradients and images together, of one process and of one
    micro-batch.

    Attributes:
        weight_decay: on the weights of all three networks.
        decay_norms: weight decay also on the parameters of fewer than two dimensions; the authors' are left alone.
        optimizers: as in `Optimized`; the players are "task", "adapter" and "discriminator".
        label_smoothing: of CE.
        norm: of the ball that the noise is drawn in: "Linf" (the authors'), "L2" or "L1".
        eps: radius of that ball, in which robust accuracy is measured, too.
        beta: weight β of the discriminator's loss in the model's.
        gamma: weight γ of the discriminator's loss in the adapter's.
        start_step: steps before the model is regularised; until then, CE of noisy images alone is descended.
        update_interval: the discriminator is updated in every so many steps.
        discriminator_width: filters of the discriminator's first convolution; their program's own default is 16.
        discriminator_layers: convolutions of the discriminator. Default: as many as leave one pixel of the images, at
            most 5, the authors' for 32x32; 5 for a model that does not know their size.
        channels: of the images; by default what the model's first convolution takes.

    Raises:
        InputError: a number out of range, or as `Optimized`.
    """

    weight_decay: float = 2e-4
    decay_norms: bool = False
    norm: Norm = "Linf"
    eps: float = 8 / 255
    beta: float = 1.0
    gamma: float = 1.0
    start_step: int = 0
    update_interval: int = 20
    discriminator_width: int = 32
    discriminator_layers: int | None = None
    channels: int | None = None
    validation_attack: AttackSettings | str | None = "pgd-20"

    soft_labels: ClassVar[bool] = False  # J is the gradient of one class's probability
    players: ClassVar[tuple[str, ...]] = ("task", "adapter", "discriminator")

    def __post_init__(self) -> None:
        super().__post_init__()
        ball_of_norm(self.norm)
        for name in ("eps", "beta", "gamma"):
            number(name, getattr(self, name), 0.0)
        whole("start_step", self.start_step, 0)
        for name in ("update_interval", "discriminator_width", "discriminator_layers", "channels"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), 1)

    def build(self, model: nn.Module | Split, execution: Execution = Execution(), wrap: Wrap = unwrapped) -> JARNStep:
        """A step that trains `model` beside a fresh adapter and discriminator, which are on the model's device.

        Raises:
            InputError: no parameter of the model is trainable, nobody says how many channels images have, or passes are
                to be compiled.
        """
        if execution.compile:
            raise InputError("compile is True, but torch.compile allows no backward through a gradient, which JARN has")
        network: Any = as_split(model)
        if device_of(network).type == "cpu":
            lay_out_plainly(
                network
            )  # a tenth faster there: what oneDNN makes of such derivatives channels-last is slow
        passes = execution.passes(network)
        channels = channels_of(network) if self.channels is None else self.channels
        layers = layers_for(network) if self.discriminator_layers is None else self.discriminator_layers
        with as_torch_starts():  # drawn alike on whatever device, and in float32 whatever the default is
            adapter, discriminator = Adapter(channels), ConvDiscriminator(channels, self.discriminator_width, layers)
        place = next(passes.parameters()).device, feature_dtype(network)
        beside = wrap(adapter.to(*place)), wrap(discriminator.to(*place))
        return JARNStep(self, network, execution, wrap(passes), *beside, channels)


# --- The step -------------------------------------------------------------------------------------------------------


class JARNStep(Step):
    """One step of the model, the adapter and, where it is its turn, of the discriminator.

    Args:
        settings: of the method.
        network: the model.
        execution: of its passes.
        passes: x -> (features, logits).
        adapter: gradients -> what may look like images.
        discriminator: images -> two logits.
        channels: of images.
    """

    def __init__(
        self, settings: JARN, network: Split, execution: Execution, passes: nn.Module, adapter: nn.Module,
        discriminator: nn.Module, channels: int,
    ) -> None:  # fmt: skip
        super().__init__(settings, network, execution)
        self.passes, self.adapter, self.discriminator, self.channels = passes, adapter, discriminator, channels
        self.players = {"adapter": alone(adapter), "discriminator": alone(discriminator)}
        modules = {"task": passes, "adapter": adapter, "discriminator": discriminator}
        self.parameters = {player: trainable(module) for player, module in modules.items()}
        self.optimizers = {player: settings.optimizer_of(player, module) for player, module in modules.items()}

    def kind(self) -> Hashable:
        """Whether the next step regularises the model, and whether it updates the discriminator."""
        return self._goes(self.steps)

    def _goes(self, done: int) -> tuple[bool, bool]:
        """What the step after so many does; the discriminator's turn is counted from the run's first step."""
        regularised = done >= self.method.start_step
        return regularised, regularised and done % self.method.update_interval == 0

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Moves the players once.

        Returns:
            CE as "task" and CE_D, before the discriminator's update, as "discriminator" (0 until it starts), detached.

        Raises:
            InputError: images have other channels than the discriminator, labels are no classes, or the model cannot
                be differentiated twice.
        """
        self._check(batch)
        eps = self.method.eps
        if isinstance(eps, Tensor):
            eps = eps.to(batch.x.dtype).repeat(len(batch))
        noisy = Ball(self.method.norm, eps).start(batch.x, seed=batch.seed, first_sample=batch.first_sample)
        batch = replace(batch, x=noisy)
        regularised, turn = self._goes(self.steps - 1)
        for own in self.parameters.values():  # also of weights that somebody's own optimizer leaves alone
            for parameter in own:
                parameter.grad = None
        gather = self.gather if regularised else self.gather_task
        losses = torch.stack([gather(part) for part in self._parts(batch)]).sum(0)
        if all(parameter.grad is None for parameter in self.parameters["task"]):
            raise InputError(
                "no trainable parameter of the model has a part in the logits; the loss has nothing to train"
            )
        take_step(self.optimizers["task"], self.method.clip)
        if regularised:
            for parameter in self.parameters["adapter"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.method.gamma)
            take_step(self.optimizers["adapter"], self.method.clip)
        if turn:
            for part in self._parts(batch):
                self.gather_discriminator(part)
            take_step(self.optimizers["discriminator"], self.method.clip)
        return dict(zip(("task", "discriminator"), losses, strict=True))

    def _check(self, batch: Batch) -> None:
        shape, channels = list(batch.x.shape), self.channels
        if len(shape) != 4 or shape[1] != channels:
            raise InputError(
                f"x has shape {shape}; adapter and discriminator are made for images [N, {channels}, H, W]"
            )
        if batch.y is None or batch.y.dim() != 1:
            told = "None" if batch.y is None else f"soft labels {list(batch.y.shape)}"
            raise InputError(f"y is {told}; the gradient is that of the probability of classes [N]")

    def _parts(self, batch: Batch) -> Iterator[Part]:
        return parts(batch, self.method.micro_batches)

    def gather_task(self, part: Part) -> Tensor:
        """Adds the gradients of CE; returns a part's share of both losses, [2], detached."""
        with self._gathering(part, self.passes):
            task = self.method.cross_entropy(self.passes(part.x)[1], part.y)
            if task.requires_grad:
                torch.autograd.backward(task, torch.full_like(task, part.share), inputs=self.parameters["task"])
        return part.share * torch.stack([task.detach(), torch.zeros_like(task)])

    def gather(self, part: Part) -> Tensor:
        """Adds the gradients of CE - β CE_D to the model's and of -CE_D to the adapter's; returns as `gather_task`.

        The model is passed once: J is a gradient of the pass that CE is of, and one backward takes both.
        """
        x = part.x.detach().requires_grad_()
        with self._gathering(part, self.passes, self.adapter), self._in_float32():
            logits = self.passes(x)[1]
            task = self.method.cross_entropy(logits, part.y)
            (jacobian,) = torch.autograd.grad(_of_own_class(logits, part.classes), x, create_graph=True)
            shown = jacobian.detach().requires_grad_()
            judged = self.judged(alone(self.discriminator), self.adapter(shown), part.x)
            torch.autograd.backward(
                judged, torch.full_like(judged, -part.share), inputs=[shown, *self.parameters["adapter"]]
            )
            assert shown.grad is not None
            # to all that it hangs on: where only weights were asked for, torch would not tell of a layer whose gradient
            # cannot be differentiated, and leave out what lies behind it
            torch.autograd.backward(
                [task, jacobian], [torch.full_like(task, part.share), self.method.beta * shown.grad]
            )
        return part.share * torch.stack([task.detach(), judged.detach()])

    def gather_discriminator(self, part: Part) -> None:
        """Adds the gradients of CE_D to the discriminator's, at the model and the adapter as they have become."""
        x = part.x.detach().requires_grad_()
        with self._in_float32():
            (jacobian,) = torch.autograd.grad(_of_own_class(alone(self.passes)(x)[1], part.classes), x)
        with torch.no_grad():
            adapted = alone(self.adapter)(jacobian)
        with self._gathering(part, self.discriminator):
            judged = self.judged(self.discriminator, adapted, part.x)
            torch.autograd.backward(
                judged, torch.full_like(judged, part.share), inputs=self.parameters["discriminator"]
            )

    @contextmanager
    def _in_float32(self) -> Iterator[None]:
        """Passes of the model inside are, as gradients of their gradients in bfloat16 are others."""
        passes: Any = alone(self.passes)
        chosen = passes.execution
        passes.execution = replace(chosen, precision="fp32")
        try:
            yield
        finally:
            passes.execution = chosen

    @staticmethod
    def judged(discriminator: nn.Module, adapted: Tensor, images: Tensor) -> Tensor:
        """CE_D [], the mean over adapted gradients and images, which are one batch."""
        logits = discriminator(torch.cat([adapted, images]))
        labels = torch.cat(
            [torch.full((len(one),), kind, device=one.device) for one, kind in ((adapted, GRADIENT), (images, IMAGE))]
        )
        return F.cross_entropy(logits, labels)

    @staticmethod
    def _gathering(part: Part, *modules: nn.Module) -> AbstractContextManager[Any]:
        """The context of a part's passes and backwards: processes average the gradients of modules at the last one."""
        stack = ExitStack()
        for module in modules if not part.last else ():
            stack.enter_context(unsynchronised(module))
        return stack


def _of_own_class(logits: Tensor, classes: Tensor) -> Tensor:
    """The probabilities p_y of a batch, summed: the gradient of an image is that of its own."""
    return logits.softmax(1).gather(1, classes[:, None]).sum()
