"""What a training step asks of the images and labels that it is given, and of a model that somebody else wrote."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from afd.attacks.external import BOUNDS, inside
from afd.attacks.inputs import check_classes, check_images, check_rows, copied, largest_label, outside_inference
from afd.errors import AfdError, InputError, InputTypeError, warn_caller
from afd.execution import Execution, TrainingPass, explained, isolated, lay_out_plainly, needs_plain_layout
from afd.nn import Encoder, FeatureClassifier, FeatureSplit, Split, split
from afd.nn.modes import evaluating, without_wrappers, wraps_compiled
from afd.ops import checks

SUM_TOLERANCE = 1e-3  # of the sum of soft labels: float32 that was computed in float16 passes


def check_form(
    x: Tensor,
    y: Tensor | None,
    num_classes: int | None = None,
    *,
    soft: bool = True,
    index: Tensor | None = None,
    x_adv: Tensor | None = None,
    copies: int = 1,
) -> None:
    """Checks what can be known of a batch without a look at its values.

    Args:
        x: images [N, ...].
        y: classes [N] int64, soft labels [N, num_classes], or None.
        num_classes: None if nobody knows.
        soft: whether labels may be soft.
        index: of the images, [N] int64.
        x_adv: attacked copies of x.
        copies: so many for each image.

    Raises:
        InputTypeError, InputError: it is something else.
    """
    beside = {"y": y, "index": index, "x_adv": x_adv}
    check_images(x, **{name: tensor for name, tensor in beside.items() if tensor is not None})
    if not len(x):
        raise InputError(f"x has shape {list(x.shape)}; a batch must hold at least one image")
    if y is not None and not (soft and _is_soft(y)):
        check_classes(x, y)
    elif y is not None:
        check_rows("y", y, x)
        if not y.shape[1]:
            raise InputError(f"y has shape {list(y.shape)}; soft labels are [{len(x)}, K], with a share for each class")
        if num_classes is not None and y.shape[1] != num_classes:
            raise InputError(f"y has shape {list(y.shape)}; soft labels of this model are [{len(x)}, {num_classes}]")
    if index is not None and (index.dtype != torch.int64 or index.shape != x.shape[:1]):
        raise InputTypeError(f"index is {index.dtype} {list(index.shape)}; it must be torch.int64 [{len(x)}]")
    if x_adv is not None:
        checks.iterate("x_adv", x_adv, x if copies == 1 else copied(x, copies))


def _is_soft(y: Tensor) -> bool:
    return y.dim() == 2 and y.is_floating_point()


def check_values(
    x: Tensor,
    y: Tensor | None,
    num_classes: int | None = None,
    *,
    x_adv: Tensor | None = None,
    bounds: tuple[float, float] = BOUNDS,
    sums: bool = True,
) -> None:
    """Checks the values of a batch, which waits for the device.

    Args:
        x: as of `check_form`, like y, num_classes and x_adv.
        y: see there.
        num_classes: see there.
        x_adv: see there.
        bounds: of images.
        sums: whether soft labels must sum to 1 in each row; not before their number of classes was looked at.

    Raises:
        InputError: images are not finite or out of bounds, labels are not of the model's classes, or soft labels are
            not shares of 1: negative, not finite, or of another sum (by more than 1e-3, or 4 roundings of their dtype).
    """
    check_labels(largest_label(x, y, bounds), num_classes)
    if sums and y is not None and y.is_floating_point():
        check_sums(y)
    if x_adv is not None and not inside(x_adv, bounds).all():
        raise InputError(f"x_adv has values that are not finite or not in {list(bounds)}; it must be images like x")


def check_sums(y: Tensor) -> None:
    """Raises InputError unless soft labels [N, K] sum to 1 in each row: within 1e-3 (float16 4e-3, bfloat16 0.03).

    Training weighs an image by its row's sum, which nobody means who gives it another; an attack takes any.
    """
    sums = y.double().sum(1)
    row = (sums - 1).abs().argmax()
    row, found = torch.stack([row.double(), sums[row]]).tolist()
    if abs(found - 1) > max(SUM_TOLERANCE, 4 * torch.finfo(y.dtype).eps):
        raise InputError(f"y sums to {found:.6g} in row {int(row)}; soft labels must sum to 1 in each row")


def check_labels(largest: int, num_classes: int | None) -> None:
    """Raises InputError where the largest of labels is of no class of the model."""
    if num_classes is not None and largest >= num_classes:
        raise InputError(f"y holds the label {largest}; the model has classes 0 ... {num_classes - 1}")


# --- Models ---------------------------------------------------------------------------------------------------------


TRIED = 8  # images that a model is tried on
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold)
KINKED_FUNCTIONS = (F.relu, torch.relu, F.relu6, F.leaky_relu, F.hardtanh, F.threshold)


def taken_in(model: nn.Module) -> nn.Module:
    """The module that is trained: the one inside of a wrapper that computes what it does.

    Raises:
        InputTypeError: it is no module.
        InputError: it was made in `torch.inference_mode`, so that no gradient can reach it.

    Warns:
        UserWarning: what a wrapper would do is done otherwise.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    inner = without_wrappers(model)
    if wraps_compiled(model):
        warn_caller(
            "model is compiled; the module inside of it is trained as it is (Execution(compile=True) compiles the "
            "passes of training)",
            UserWarning,
        )
    elif isinstance(model, DataParallel):
        warn_caller(
            "model is a DataParallel; the module inside of it is trained, on one device (several take part under "
            "torchrun)",
            UserWarning,
        )
    for name, tensor in inner.named_parameters():
        if not is_lazy(tensor) and tensor.is_inference():
            raise InputError(
                f"the model's {name} was made in torch.inference_mode, and no gradient reaches it; make or load the "
                "model outside of that mode"
            )
    return inner


def as_split(model: Any) -> Split:
    """A classifier as training passes want it, out of its wrappers: with features beside its logits.

    Raises:
        InputTypeError, InputError: `afd.nn.split` does not take it, or it is wrapped for several processes.

    Warns:
        UserWarning: as of `taken_in`.
    """
    if isinstance(model, DistributedDataParallel):
        raise InputError(
            "model is a DistributedDataParallel, which would not see all passes of a step; build the step with the "
            "module inside and wrap=partial(DistributedDataParallel, find_unused_parameters=True) (or Accelerate's "
            "prepare_model)"
        )
    inner: Any = taken_in(model)
    network: Split = inner if hasattr(inner, "features_and_logits") else split(inner)
    return network


def device_of(network: Any) -> torch.device:
    """The device of a model's parameters.

    Raises:
        InputError: it has none, or parameters on the device meta.
    """
    first: nn.Parameter | None = next(network.parameters(), None)
    if first is None:
        raise InputError(f"model is a {type(network).__name__} without parameters; there is nothing to train")
    own = network.model if isinstance(network, FeatureSplit) else network
    for name, tensor in chain(own.named_parameters(), own.named_buffers()):
        if tensor.is_meta and not is_lazy(tensor):
            raise InputError(
                f"the model's {name} is on the device meta, where tensors hold no values; load the weights first"
            )
    return first.device


def settle(network: Any, execution: Execution, x: Tensor) -> int:
    """The number of classes, after a look at what a model that is not afd's own does with images x.

    One that cannot go on from what lies channels-last, which convolutions are shown unless `execution` says otherwise,
    is laid out plainly from then on.

    Raises:
        InputError, InputTypeError: it does not take such images, or its logits are not those of its feature layer.
    """
    device = device_of(network)
    check_dtype(network, x)
    if isinstance(network, FeatureClassifier) and isinstance(network.encoder, Encoder):
        return int(network.num_classes)
    some = outside_inference(x[:TRIED]).to(device)
    try:
        with isolated(device), evaluating(network):
            _try(network, execution, some)
    except AfdError:
        raise
    except RuntimeError as error:  # of the model's own operations, on images of another shape or dtype
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"the model does not take images {list(some.shape)} of {x.dtype}: {reason}") from error
    return int(network.num_classes)


def check_dtype(network: Any, x: Tensor) -> None:
    """Raises InputError where one of images and weights is float64, the other is not, and nothing converts them."""
    if isinstance(network, FeatureSplit):
        return
    own = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
    if len(own) == 1 and torch.float64 in own ^ {x.dtype} and own != {x.dtype}:
        raise InputError(f"x is {x.dtype} and the model {own.pop()}; convert one to the dtype of the other")


def check_features(network: Any, x: Tensor) -> None:
    """Tries a model that is not afd's own on images: its features must be those that its logits are made of.

    Raises:
        InputError, InputTypeError: they are not, or may not be; the message names the layers in question.
    """
    if isinstance(network, FeatureSplit):
        classes = network.num_classes
        with isolated(x.device), explained(1), evaluating(network):
            network.settle(outside_inference(x[:TRIED]).clone())  # which it may normalise in place
        network.num_classes = classes  # where there are others, the passes say so


def check_twice_differentiable(method: str, network: nn.Module, execution: Execution) -> None:
    """Finds that a gradient with respect to images can itself be differentiated, as far as that can be known.

    Raises:
        InputError: the passes are to be compiled, which allows it once.

    Warns:
        UserWarning: the model's activations are piecewise linear, as far as its modules hold them.
    """
    if execution.compile:
        raise InputError(f"compile is True, but {method} differentiates twice, which torch.compile does not")
    found = next((told for module in network.modules() if (told := _kinked(module)) is not None), None)
    if found is not None:
        warn_caller(
            f"{method} differentiates the gradient of the loss, and the model has a {found}, piecewise linear: its "
            "second derivative is zero almost everywhere, so that the regulariser does not see the curvature that "
            "weights make by switching units; softplus and silu (--activation) show it",
            UserWarning,
        )


def _kinked(module: nn.Module) -> str | None:
    if isinstance(module, KINKED):
        return type(module).__name__
    held = (one for one in vars(module).values() if callable(one))
    return next((one.__name__ for one in held if any(one is known for known in KINKED_FUNCTIONS)), None)


def _try(network: Any, execution: Execution, x: Tensor) -> None:
    passes = TrainingPass(network, execution)
    look = network.settle if isinstance(network, FeatureSplit) else network
    try:
        with torch.no_grad():
            look(passes.shown(x))
    except RuntimeError as error:
        if not execution.channels_last or not needs_plain_layout(error):
            raise
        lay_out_plainly(network)
        with torch.no_grad():
            look(passes.shown(x))
