"""Execution settings of a model's passes, in attacks and in training: precision, memory layout, chunks, compilation.

None of them changes what is computed beyond rounding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from afd.errors import InputError, one_of
from afd.nn import Split
from afd.nn.classifier import unwrapped
from afd.nn.freezing import synchronised
from afd.nn.modes import Buffers, eager, extended_norms
from afd.nn.recomputing import Recomputing
from afd.ops import backend, checks
from afd.python_state import snapshot

PRECISIONS = ("fp32", "bf16", "auto")
ACTIVATION_BYTES = 24 << 20  # of one chunk: a few MiB a core stay in its own cache, the rest in the shared one
LEAST_CHUNK, FULL_CHUNK = 64, 256  # rows; with fewer, the cost of calling each layer shows: much, or still a little
MOST_BYTES = 128 << 20  # of a chunk of more than LEAST_CHUNK rows: beyond, C's allocator hands memory back at each call
Wrap = Callable[[nn.Module], nn.Module]  # of trained modules, as DistributedDataParallel wants it

_bytes_per_sample = WeakIdKeyDictionary()  # by model, whatever it equals: by precision and shape of a sample


@dataclass(frozen=True)
class Passes:
    """How passes of a model run, in attacks and in training. Images, losses and parameters stay in float32.

    Attributes:
        precision: "fp32", "bf16" or "auto" (bfloat16 where the device multiplies it in hardware).
        channels_last: lay images out channels-last, which convolutions are fastest in.

    Raises:
        InputError: unknown precision.
    """

    precision: str = "fp32"
    channels_last: bool = True

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context in which the model runs: bfloat16 arithmetic if asked for."""
        low = self.precision == "bf16" or (self.precision == "auto" and backend.fast_bf16(device))
        return torch.autocast(device.type, torch.bfloat16, enabled=low)


@dataclass(frozen=True)
class Execution(Passes):
    """How training passes run: `Passes`, with convolutions laid out as images are, and more.

    Attributes:
        checkpoint_activations: keep the activations of a training pass between the network's blocks only, and compute
            the others anew in its backward (`afd.nn.recomputing`); attacks keep theirs.
        compile: run the model's passes through torch.compile.
        sync_batchnorm: BatchNorm's statistics over the batches of all processes (CUDA only).
        graph: on CUDA, have the trainer capture the whole step, attack and optimizers included, in one graph and
            replay it. `afd.training.recording` says what makes another capture, and what of Python is not seen: what a
            model's code reads in closures, globals and Python's own generators stays as it was captured.
    """

    compile: bool = False
    sync_batchnorm: bool = False
    graph: bool = False
    checkpoint_activations: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_activations and (self.compile or self.graph):
            told = f"checkpoint_activations and {'compile' if self.compile else 'graph'} are both set; choose one"
            raise InputError(f"{told}, as what is computed anew in a backward is neither compiled nor captured")

    def prepare(self, model: Any) -> Any:
        """`model` in the chosen layout (where that is safe), its BatchNorm layers exchanged if so chosen.

        Raises:
            InputError: sync_batchnorm on a device that cannot.
        """
        device = next(model.parameters()).device
        if self.channels_last and not unsafe_channels_last(model, device):
            model._apply(_channels_last)
        if not self.sync_batchnorm:
            return model
        if more := extended_norms(model):
            raise InputError(f"sync_batchnorm is True, but the model has a {more[0]}, which torch does not synchronise")
        if device.type != "cuda":
            raise InputError(f"sync_batchnorm is True, but the model is on {device}; torch offers it on CUDA only")
        return synchronised(model)

    def passes(self, model: Split) -> nn.Module:
        """A module x -> (features, logits), both float32 or wider, that runs `model` as chosen."""
        passes = TrainingPass(model, self)
        return torch.compile(passes) if self.compile else passes  # type: ignore[return-value]


@dataclass(frozen=True)
class AttackExecution(Passes):
    """How an attack runs: `Passes`, and how many images it works on at a time.

    Samples are independent, so on a CPU all steps of one chunk of the batch run before the next. It is small enough for
    the network's activations to stay in the caches between layers, or, where that would leave too few rows, in memory
    that the allocator keeps. Layout and chunks follow rules rather than a trial's clock, which would choose otherwise
    on another day: layouts differ in the last bits of a gradient, and so do chunks of fewer than 8 rows.

    Attributes:
        chunk_size: rows at most; None lets the size of the model's activations decide.

    Raises:
        InputError: unknown precision, or a chunk of no rows.
        InputTypeError: chunk_size is no integer.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size is None:
            return
        rows = checks.integer("chunk_size", self.chunk_size)
        if rows < 1:
            raise InputError(f"chunk_size is {rows}; it must be an integer >= 1")
        object.__setattr__(self, "chunk_size", rows)  # as Python's, where it was NumPy's

    def laid_out(self, x: Tensor, model: nn.Module) -> Tensor:
        """Images x in the chosen layout, as the model is shown them."""
        return channels_last(x, model) if self.channels_last else x.contiguous()

    def chunks(self, model: nn.Module, x: Tensor) -> Iterator[slice]:
        """Rows of x to attack together, in order.

        On CUDA, and where activations cannot be seen, as in a compiled model, or somebody's hooks would see the
        looking, the whole batch is one chunk, unless `chunk_size` says otherwise.

        Args:
            model: in evaluation mode.
            x: images [N, ...], N >= 1.
        """
        samples, most = x.shape[0], self.chunk_size
        if most is None and (x.is_cuda or samples <= LEAST_CHUNK or not eager(model) or _listened_to(model)):
            most = samples
        elif most is None:
            each = self._activation_bytes(model, x)
            most = max(LEAST_CHUNK, min(FULL_CHUNK, MOST_BYTES // each), ACTIVATION_BYTES // each)
        size = math.ceil(samples / math.ceil(samples / most))  # chunks of equal size
        for start in range(0, samples, size):
            yield slice(start, min(start + size, samples))

    def _activation_bytes(self, model: nn.Module, x: Tensor) -> int:
        """Bytes that the model's layers put out for one sample, found by one forward that leaves no trace, and kept."""
        known: dict[tuple[str | int, ...], int] = _bytes_per_sample.setdefault(model, {})
        kind = (self.precision, *x.shape[1:])
        if kind not in known:
            sizes: list[int] = []

            def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    sizes.append(output.numel() * output.element_size())

            layers = [module for module in model.modules() if next(module.children(), None) is None]
            hooks = [layer.register_forward_hook(note) for layer in layers]
            try:
                with torch.no_grad(), self.autocast(x.device), untouched(model):
                    model(x[:1].clone())
            except Exception:  # it may take no single image; what else is wrong, the attack's own forward will say
                sizes = [ACTIVATION_BYTES]
            finally:
                for hook in hooks:
                    hook.remove()
            known[kind] = max(1, sum(sizes))
        return known[kind]


# --- Memory layout --------------------------------------------------------------------------------------------------

NO_VIEW = ("view size is not compatible", "Cannot view a tensor")  # how torch, and torch.compile, say it


def channels_last(x: Tensor, model: nn.Module | None = None) -> Tensor:
    """x in the layout that convolutions are fastest in, where it is a batch of images [N, C, H, W].

    Args:
        x: any batch.
        model: that is shown it; in the usual layout, if `unsafe_channels_last` says so on x's device.
    """
    if x.dim() != 4:
        return x
    if model is not None and unsafe_channels_last(model, x.device):
        return x.contiguous()
    _, channels, height, width = x.shape
    if channels > 1:
        return x.contiguous(memory_format=torch.channels_last)
    # one channel: both layouts lie in memory alike, and only the strides can say which is meant
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))


def unsafe_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether the model has a convolution whose backward may crash the process where images lie channels-last.

    On CPUs, oneDNN's backward of a 1x1 convolution with a stride writes beyond its memory if the input has from 2
    channels to fewer than a register has floats, and pixels beyond the last one that the stride meets (torch 2.13;
    float32, several images, one group, no padding). Image sizes are not known here, so they are taken for such ones.
    """
    if device.type != "cpu":
        return False
    register = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return any(
        isinstance(layer, nn.Conv2d)
        and layer.kernel_size == (1, 1)
        and max(layer.stride) > 1
        and 1 < layer.in_channels < register
        and layer.groups == 1
        for layer in model.modules()
    )


def lay_out_plainly(model: nn.Module) -> None:
    """Takes a split model's parameters and buffers, and the images of its passes, back to torch's usual layout.

    A model whose own code takes that layout for granted asks for it, ``x.view(len(x), -1)`` behind convolutions, say:
    what convolutions put out lies channels-last where their weights or images do, and has no such view.
    """
    for tensor in chain(model.parameters(), model.buffers()):  # which stay the objects that others know
        if tensor.dim() == 4:
            # contiguous() would keep the strides of a single channel, which both layouts lie in memory alike for
            tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    model.plain_layout = True  # type: ignore[assignment]


def needs_plain_layout(error: RuntimeError) -> bool:
    """Whether an error of a model's is torch's on a view of what does not lie in the usual layout."""
    return any(told in str(error) for told in NO_VIEW)


def _channels_last(tensor: Tensor) -> Tensor:
    """The layout is one of four dimensions: a Conv3d's five have another, and a matrix has none."""
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _listened_to(model: nn.Module) -> bool:
    """Whether somebody's hooks are told of each forward; those of torch and of this library only compute."""
    kinds = [hooks for layer in model.modules() for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]
    kinds += [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
    hooks = [hook for kind in kinds for hook in kind.values()]
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] not in ("torch", "afd") for hook in hooks)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The body leaves a model's attributes and buffers, and what draws at random on the CPU, as they were."""
    drawn, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    buffers, restore = Buffers(list(model.modules())), snapshot(model)
    try:
        yield
    finally:
        restore()
        buffers.put_back()
        torch.set_rng_state(drawn)
        random.setstate(python)
        np.random.set_state(numpy)


# --- Training passes ------------------------------------------------------------------------------------------------

MEANINGS = {  # of parts of torch's errors
    **dict.fromkeys(
        NO_VIEW,
        "the model takes a view of what does not lie in torch's usual layout (x.view behind a convolution); train it "
        "with Execution(channels_last=False), or write x.flatten(1) there",
    ),
    "use_reentrant=True": "the model calls torch.utils.checkpoint with use_reentrant=True, which allows no gradients "
    "of chosen parameters; use_reentrant=False does",
    **dict.fromkeys(
        ("derivative for ", "does not currently support double backward", "once_differentiable"),
        "the method differentiates gradients, and the model has a layer whose gradient torch cannot differentiate "
        "({reason}); attention can be, inside of torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    ),
    "tensors was saved during": "a pass goes another way when its activations are computed anew than at first, as "
    "those of LLR do, by the clean batch's statistics; go without checkpoint_activations",
    "nference tensors cannot be saved": "the model holds a tensor that was made in torch.inference_mode, which no "
    "gradient goes through; make it outside of that mode",
}


class TrainingPass(nn.Module):
    """One pass of the model over a batch: features and logits, in the chosen precision, handed out in float32."""

    def __init__(self, model: Split, execution: Execution) -> None:
        super().__init__()
        self.model, self.execution = model, execution
        device = next(self.parameters()).device
        # a walk through all modules, so not at every pass
        self.safe = not unsafe_channels_last(self, device)
        self.blocks = Recomputing(unwrapped(cast(nn.Module, model))) if execution.checkpoint_activations else None

    def forward(self, x: Tensor, with_logits: bool = True) -> tuple[Tensor, ...]:
        """(features,) or (features, logits) of images x.

        What is left out is seen as unused by DistributedDataParallel, which then waits for no gradient of it.
        """
        x = self.shown(x)
        with self.execution.autocast(x.device), nullcontext() if self.blocks is None else self.blocks.sparing():
            outputs = self.model.features_and_logits(x)
        wide = tuple(_wide(output) for output in outputs)
        return wide if with_logits else wide[:1]

    def shown(self, x: Tensor) -> Tensor:
        """A copy of images x, laid out as chosen: the model may write to it."""
        if not self.execution.channels_last:
            return x.clone()
        if not self.safe or getattr(self.model, "plain_layout", False):
            return x.clone(memory_format=torch.contiguous_format)
        if x.dim() == 4 and x.shape[1] > 1:
            return x.clone(memory_format=torch.channels_last)
        return channels_last(x).clone()


def feature_dtype(model: Split) -> torch.dtype:
    """What `TrainingPass` hands features out in: float64 where the layer that they enter is, else float32."""
    layer = getattr(model, "classifier", None)
    weights = layer.parameters() if isinstance(layer, nn.Module) else model.parameters()  # type: ignore[attr-defined]
    wide = any(weight.dtype == torch.float64 for weight in weights)
    return torch.float64 if wide else torch.float32


def _wide(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()


@contextmanager
def explained(micro_batches: int) -> Iterator[None]:
    """Says what torch's errors mean that a model raises in training passes, where that is known."""
    try:
        yield
    except RuntimeError as error:
        meaning = next((told for part, told in MEANINGS.items() if part in str(error)), None)
        if meaning is None:
            raise
        raise InputError(meaning.replace("{reason}", str(error).splitlines()[0])) from error
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        fewer = f", or fewer than micro_batches={micro_batches}" if micro_batches > 1 else ""
        raise InputError(
            "BatchNorm was shown a single image, which has no variance; leave out a last batch of one image "
            f"(drop_last=True of the loader{fewer})"
        ) from error


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Gradients on, inference mode and autocast off: what a step computes does not hang on the mode of its caller.

    Autocast keeps what it has cast of the weights until its outermost context is left, be it one that switches it off:
    passes inside, which switch it on, would go on with weights from before an optimizer's step. So nothing is kept.
    """
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.enable_grad()):
            stack.enter_context(context)
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        yield


@contextmanager
def as_torch_starts() -> Iterator[None]:
    """New tensors are float32 on the CPU, as they are in a torch whose defaults nobody has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def unsynchronised(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which gradients of `module` gather in this process alone, to be averaged by a later backward."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def alone(module: nn.Module) -> nn.Module:
    """`module` as this process has it, for passes from which none of its parameters gets a gradient."""
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner
