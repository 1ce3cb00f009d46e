"""What one call of an attack is given: checked before it starts, and cut into chunks that are attacked together."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afd.attacks.losses import Loss
from afd.errors import InputError, InputTypeError, at_least
from afd.ops import checks


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch that are attacked together.

    Attributes:
        x: images [n, ...] of these rows.
        y: labels [n], soft labels [n, K], or None.
        rows: which rows of the batch they are, a slice or indices [n].
        whole: whether these are all rows of the batch.
        seed: of random starts; a tensor [] on the device where a recorded graph is to follow it.
        first_sample: index of the first row in the whole data set, or of each, [n] int64.
        largest_label: max(y) or more, known to the host; -1 if nobody looked.
        counters: what `afd.attacks.diagnostics` counts of the whole batch; None if nobody looks.
        target: what the call was given for the loss, [n, ...], if anything.
        start: where to begin, like x, if the call said so.
        loss_target: what the loss is judged by, [n, ...]: y, for most.
        first_outputs: those of the first evaluation of the model, once there was one.
        which: of several balls the one that each image is attacked in, [n] int64, where each has one of its own.
    """

    x: Tensor
    y: Tensor | None
    rows: slice | Tensor
    whole: bool
    seed: int | Tensor
    first_sample: int | Tensor
    largest_label: int
    counters: Tensor | None
    target: Tensor | None = None
    start: Tensor | None = None
    loss_target: Tensor | None = None
    first_outputs: list[Tensor] = field(default_factory=list)
    which: Tensor | None = None

    def of(self, setting: float | Tensor, factor: float = 1.0) -> float | Tensor:
        """A setting of the batch for these rows, times a factor: one number, or one per row.

        A live number, a tensor [] on the images' device, is read there, and rounded once, as a number is.
        """
        if isinstance(setting, Tensor) and not setting.dim():
            if setting.device != self.x.device:
                return factor * float(setting)
            return (factor * setting.double()).to(self.x.dtype).repeat(len(self.x))
        return factor * (setting[self.rows] if isinstance(setting, Tensor) else setting)

    def take(self, kept: Tensor) -> Chunk:
        """Those of the rows that the indices `kept` name."""
        rows = self.rows
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=kept.device)
        y, loss_target, which = (None if one is None else one[kept] for one in (self.y, self.loss_target, self.which))
        return replace(
            self, x=take(self.x, kept), y=y, loss_target=loss_target, which=which, rows=rows[kept], whole=False
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """What a recorded graph reads of it."""
        given = self.x, self.y, self.loss_target, self.counters, self.which
        return tuple(one for one in given if one is not None)

    def cloned(self) -> Chunk:
        """The same on memory of its own, nothing evaluated yet."""
        y, loss_target, counters, which = (
            None if one is None else one.clone() for one in (self.y, self.loss_target, self.counters, self.which)
        )
        return replace(
            self, x=self.x.clone(), y=y, loss_target=loss_target, counters=counters, which=which, first_outputs=[]
        )

    def check_classes(self, logits: Tensor) -> None:
        """Raises InputError unless logits [n, K] have a class for each label; there is one for -1."""
        classes = logits.shape[1]
        if self.largest_label >= classes:
            raise InputError(f"y holds the label {self.largest_label}; the model has classes 0 ... {classes - 1}")
        if self.y is not None and self.y.dim() == 2 and self.y.shape[1] != classes:
            raise InputError(f"y is soft labels of {self.y.shape[1]} classes; the model has {classes}")


def take(x: Tensor, kept: Tensor) -> Tensor:
    """x[kept], its rows laid out as those of x are."""
    out = torch.empty_strided((len(kept), *x.shape[1:]), x.stride(), dtype=x.dtype, device=x.device)
    return torch.index_select(x, 0, kept, out=out)


def rows_of(values: Tensor, x: Tensor) -> Tensor:
    """One value per sample, [N], in a shape that broadcasts against x."""
    return values.view(-1, *([1] * (x.dim() - 1)))


def per_image(length: float | Tensor, x: Tensor) -> float | Tensor:
    """A length, or, of a live one, a tensor [] on the images' device, one for each of images x, [N]."""
    return length.to(x.dtype).repeat(len(x)) if isinstance(length, Tensor) else length


def copied(rows: Tensor, copies: int) -> Tensor:
    """Each row so many times, beside each other: [N, ...] -> [N * copies, ...]."""
    return rows if copies == 1 else rows[:, None].expand(-1, copies, *rows.shape[1:]).flatten(0, 1)


def check_form(x: Tensor, y: Tensor) -> None:
    """Checks what can be known of images and labels without a look at their values.

    Raises:
        InputTypeError: x is not floating point, or y not int64, or one of them no tensor with memory.
        InputError: shapes or devices disagree, or a transform is at work.
    """
    check_images(x, y=y)
    check_classes(x, y)


def check_images(x: Tensor, **beside: Tensor) -> None:
    """Checks images, and that what lies beside them is tensors with memory, on their device; as `check_form` does.

    Args:
        x: images.
        beside: other tensors by their names.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
        raise InputError("an attack cannot be traced or transformed; call it outside of torch.func and torch.jit.trace")
    given = {"x": x, **beside}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise InputTypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            raise InputTypeError(f"{name} is a tensor of layout {tensor.layout} or quantised; it must be a plain one")
    if x.dim() < 2:
        raise InputError(f"x has shape {list(x.shape)}; it must be images [N, ...], of at least one dimension each")
    if x.dtype not in (torch.float32, torch.float64):
        raise InputTypeError(f"x is {x.dtype}; an attack needs torch.float32 (or float64) images")
    for name, tensor in given.items():
        if tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device}; it must be on x's device, {x.device}")
    if any(tensor.is_meta or _is_fake(tensor) for tensor in given.values()):
        raise InputTypeError(f"{' and '.join(given)} are meta or fake tensors, without values; they must be plain ones")


def check_classes(x: Tensor, y: Tensor) -> None:
    """Raises InputTypeError or InputError unless y is one class for each image of x."""
    if y.dtype != torch.int64:
        raise InputTypeError(f"y is {y.dtype}; labels must be torch.int64")
    if y.shape != x.shape[:1]:
        raise InputError(f"y has shape {list(y.shape)}; it must be [{x.shape[0]}], one label for each image")


def check_rows(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises InputError unless a tensor has a row for each image of x."""
    if not tensor.dim() or tensor.shape[0] != x.shape[0]:
        raise InputError(
            f"{name} has shape {list(tensor.shape)}; it must have a row for each image, [{x.shape[0]}, ...]"
        )


def largest_label(x: Tensor, y: Tensor | None, bounds: tuple[float, float], start: Tensor | None = None) -> int:
    """The largest of labels y, once all values are found to be allowed: one wait for the device.

    Args:
        x: images [N, ...].
        y: labels [N], soft labels [N, K], or None; the largest is -1 of what is no classes.
        bounds: of images.
        start: where an attack begins, [N, ...]; may lie outside of them.

    Raises:
        InputError: values outside bounds or not finite, negative labels.
    """
    ends = [end for tensor in (x, y, start) if tensor is not None for end in torch.aminmax(tensor)]  # NaN if any is
    low, high, *others = torch.stack([end.double() for end in ends]).tolist()
    if not (bounds[0] <= low and high <= bounds[1]) and not _at_rounded_bounds(low, high, bounds, x.dtype):
        found = f"[{_told(low, bounds)}, {_told(high, bounds)}]"
        raise InputError(
            f"x has values in {found}; images must be finite and in {list(bounds)} (clamp what rounding has put "
            "outside; normalise inside the model)"
        )
    if start is not None and not all(map(math.isfinite, others[-2:])):
        raise InputError("start holds values that are not finite; it must be finite images like x")
    if y is None:
        return -1
    first, last = others[:2]
    if y.is_floating_point() and not (first >= 0 and math.isfinite(last)):
        raise InputError(f"y has values in [{first:g}, {last:g}]; soft labels must be finite and >= 0")
    if first < 0:
        raise InputError(f"y holds the label {int(first)}; labels must be >= 0")
    return -1 if y.is_floating_point() else int(last)


def _at_rounded_bounds(low: float, high: float, bounds: tuple[float, float], dtype: torch.dtype) -> bool:
    """Whether values lie in the bounds as numbers of a dtype, to which images are clamped."""
    least, most = map(float, torch.tensor(bounds, dtype=dtype, device="cpu"))
    return min(least, bounds[0]) <= low and high <= max(most, bounds[1])


def _is_fake(tensor: Tensor) -> bool:
    """Whether torch only follows the shape of a tensor; nothing is if the module has not been imported."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(tensor, vars(fake)["FakeTensor"])


def _told(value: float, bounds: tuple[float, float]) -> str:
    """A number in few digits, but in so many that one outside of the bounds is seen to be outside."""
    low, high = bounds
    short = f"{value:g}"
    return short if (low <= float(short) <= high) == (low <= value <= high) else f"{value:.9g}"


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or a copy that autograd can work with of one that was made in `torch.inference_mode`."""
    return tensor.clone() if tensor.is_inference() else tensor


# --- Settings, for the whole batch or one per sample ----------------------------------------------------------------


def size(name: str, value: Any) -> float | Tensor:
    """A radius or step size: a number, a live one (a floating-point tensor of shape []), or one per sample.

    Raises:
        InputTypeError: it is something else.
        InputError: it is negative or not finite, or a tensor of another shape.
    """
    if isinstance(value, Tensor) and value.is_meta:
        raise InputTypeError(f"{name} is a meta tensor, without values; it must be a number, or one per sample")
    if isinstance(value, Tensor) and (value.dim() or value.is_floating_point()):
        if not value.is_floating_point():
            raise InputTypeError(f"{name} is a tensor of {value.dtype}; it must be floating-point, like the images")
        if value.dim() > 1:
            raise InputError(f"{name} has shape {list(value.shape)}; it must be a number, or one per sample, [N]")
        if not value.numel():  # of an empty batch
            return value.detach()
        least, most = (float(extreme) for extreme in value.detach().aminmax())
        at_least(f"the least of {name}" if value.dim() else name, least, 0.0)
        at_least(f"the largest of {name}" if value.dim() else name, most, 0.0)
        return value.detach()
    if isinstance(value, Tensor | np.ndarray) and not value.ndim:
        value = value.item()
    number = checks.number(name, value, "a number, or a tensor of one per sample")
    at_least(name, number, 0.0)
    return number


def number(name: str, value: Any, least: float) -> float:
    """A number that is no less than another.

    Raises:
        InputTypeError, InputError: it is something else, smaller, or not finite.
    """
    found = checks.number(name, value)
    at_least(name, found, least)
    return found


def count(name: str, value: Any, least: int) -> int:
    """An integer that is no less than another.

    Raises:
        InputTypeError, InputError: it is something else, or smaller.
    """
    found = checks.integer(name, value)
    if found < least:
        raise InputError(f"{name} is {found}; it must be an integer >= {least}")
    return found


def counter(name: str, value: Any) -> int:
    """A seed, or the index of a sample.

    Raises:
        InputTypeError, InputError: it is no integer, or not in [0, 2**63).
    """
    found = checks.integer(name, value)
    checks.counter(name, found)
    return found


def truth(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        InputTypeError: it is something else.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputTypeError(f"{name} is {value!r}; it must be True or False")
    return bool(value)


def check_length(name: str, setting: float | Tensor | None, x: Tensor) -> None:
    """Raises InputError, or InputTypeError, unless a setting that is a tensor [N] has one value for each image of x."""
    if not isinstance(setting, Tensor) or not setting.dim():
        return
    if setting.shape != x.shape[:1]:
        raise InputError(
            f"{name} has shape {list(setting.shape)}, but x holds {x.shape[0]} images; it must have one value for each "
            "image of the batch that is attacked"
        )
    if setting.dtype != x.dtype or setting.device != x.device:
        raise InputTypeError(
            f"{name} is {setting.dtype} on {setting.device}; it must be {x.dtype} on {x.device}, like the images"
        )


# --- One call -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments of `afd.attacks.PGD.__call__`."""

    x: Tensor
    y: Tensor | None
    target: Tensor | None
    start: Tensor | None
    seed: int | Tensor
    first_sample: int | Tensor

    def check(self, loss: Loss, *, starts: bool) -> None:
        """Checks what can be known without a look at the values.

        Args:
            loss: of the attack.
            starts: whether the attack has a start of its own that is not x.

        Raises:
            InputTypeError, InputError: an argument is not as described there, or the loss lacks one, or takes none.
        """
        x, y, judged_by = self.x, self.y, loss.judged_by
        beside = {"y": y, "target": self.target, "start": self.start}
        check_images(x, **{name: tensor for name, tensor in beside.items() if tensor is not None})
        if y is not None:
            if y.is_floating_point() and y.dim() == 2 and y.shape[1] and judged_by != "classes":
                check_rows("y", y, x)
            else:
                check_classes(x, y)
        elif judged_by in ("classes", "labels"):
            raise InputError("y is None; the loss needs labels, [N] of torch.int64")
        elif judged_by == "target" and self.target is None:
            raise InputError("y and target are None; a loss of your own is called with target, or else with y")
        if self.target is not None:
            self._check_target(self.target, judged_by)
        if self.start is not None:
            checks.iterate("start", self.start, x)
        elif judged_by == "prediction" and not starts:
            raise InputError(
                "loss is 'kl', whose gradient at the image itself is 0; it needs a random start, or start="
            )

    def _check_target(self, target: Tensor, judged_by: str) -> None:
        check_rows("target", target, self.x)
        if judged_by in ("classes", "labels"):
            raise InputError("target is given; the loss is judged by y alone (only 'kl' and functions take a target)")
        if judged_by == "prediction" and (target.dim() != 2 or not target.is_floating_point()):
            raise InputError(
                f"target is {target.dtype} of shape {list(target.shape)}; with 'kl' it must be the clean logits [N, K]"
            )

    def outside_inference(self) -> Call:
        """The same, of tensors that autograd can work with, and has nothing to do with yet."""
        y, target, start = (
            None if one is None else outside_inference(one).detach() for one in (self.y, self.target, self.start)
        )
        return replace(self, x=outside_inference(self.x), y=y, target=target, start=start)

    def chunk(
        self, rows: slice, laid_out: Callable[[Tensor], Tensor], largest_label: int, counters: Tensor | None
    ) -> Chunk:
        """Some of its rows.

        Args:
            rows: which.
            laid_out: puts images into the layout in which the model is shown them.
            largest_label: as in `Chunk`.
            counters: likewise.
        """
        y, target = (None if one is None else one[rows] for one in (self.y, self.target))
        start = None if self.start is None else laid_out(self.start[rows]).clone()
        whole, first = rows.start == 0 and rows.stop == len(self.x), self.first_sample
        first = first[rows] if isinstance(first, Tensor) else first + rows.start
        return Chunk(
            laid_out(self.x[rows]), y, rows, whole, self.seed, first, largest_label, counters, target=target,
            start=start,
        )  # fmt: skip
