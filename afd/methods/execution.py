"""How training passes are carried out, apart from what they compute: precision, memory layout, compilation, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afd.attacks import execution as attack_execution
from afd.errors import InputError, one_of
from afd.nn import Split

Wrap = Callable[[nn.Module], nn.Module]

NO_VIEW = "view size is not compatible"
MEANINGS = {  # of parts of torch's errors
    NO_VIEW: "the model takes a view of what does not lie in torch's usual layout (x.view behind a convolution); train "
    "it with Execution(channels_last=False), or write x.flatten(1) there",
    "use_reentrant=True": "the model calls torch.utils.checkpoint with use_reentrant=True, which allows no gradients "
    "of chosen parameters; use_reentrant=False does",
    "nference tensors cannot be saved": "the model holds a tensor that was made in torch.inference_mode, which no "
    "gradient goes through; make it outside of that mode",
}


@dataclass(frozen=True)
class Execution:
    """How training passes run. Parameters, losses and optimizers stay in float32 whatever is chosen.

    Attributes:
        precision: of the passes: "fp32", "bf16" or "auto" (bfloat16 where the device multiplies it in hardware).
        channels_last: lay out images and convolutions channels-last, which convolutions are fastest in.
        compile: run the model's passes through torch.compile.
        sync_batchnorm: BatchNorm's statistics over the batches of all processes (CUDA only).
        graph: on CUDA, have the trainer record the whole round, attack and optimizer steps included, in one graph and
            replay it. `afd.training.recording` says what makes another recording, and what of Python is not seen: what
            a model's code reads in closures, globals and Python's own generators stays as it was recorded.

    Raises:
        InputError: unknown precision.
    """

    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        one_of("precision", self.precision, attack_execution.PRECISIONS)

    def prepare(self, model: Any) -> Any:
        """`model` in the chosen layout (where that is safe), its BatchNorm layers exchanged if so chosen.

        Raises:
            InputError: sync_batchnorm on a device that cannot.
        """
        device = next(model.parameters()).device
        if self.channels_last and not attack_execution.unsafe_channels_last(model, device):
            model._apply(_channels_last)
        if not self.sync_batchnorm:
            return model
        if device.type != "cuda":
            raise InputError(f"sync_batchnorm is True, but the model is on {device}; torch offers it on CUDA only")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def passes(self, model: Split) -> nn.Module:
        """A module x -> (features, logits), both float32 or wider, that runs `model` as chosen."""
        passes = TrainingPass(model, self)
        return torch.compile(passes) if self.compile else passes  # type: ignore[return-value]


class TrainingPass(nn.Module):
    """One pass of the model over a batch: features and logits, in the chosen precision, handed out in float32."""

    def __init__(self, model: Split, execution: Execution) -> None:
        super().__init__()
        self.model, self.execution = model, execution
        device = next(self.parameters()).device
        # a walk through all modules, so not at every pass
        self.safe = not attack_execution.unsafe_channels_last(self, device)

    def forward(self, x: Tensor, with_logits: bool = True) -> tuple[Tensor, ...]:
        """(features,) or (features, logits) of images x.

        What is left out is seen as unused by DistributedDataParallel, which then waits for no gradient of it.
        """
        x = self.shown(x)
        with attack_execution.autocast(self.execution.precision, x.device):
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
        return attack_execution.channels_last(x).clone()


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
    return NO_VIEW in str(error)


@contextmanager
def explained(micro_batches: int) -> Iterator[None]:
    """Says what torch's errors mean that a model raises in training passes, where that is known."""
    try:
        yield
    except RuntimeError as error:
        meaning = next((told for part, told in MEANINGS.items() if part in str(error)), None)
        if meaning is None:
            raise
        raise InputError(meaning) from error
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


def feature_dtype(model: Split) -> torch.dtype:
    """What `TrainingPass` hands features out in: float64 where the layer that they enter is, else float32."""
    layer = getattr(model, "classifier", None)
    weights = layer.parameters() if isinstance(layer, nn.Module) else model.parameters()  # type: ignore[attr-defined]
    wide = any(weight.dtype == torch.float64 for weight in weights)
    return torch.float64 if wide else torch.float32


def unsynchronised(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which gradients of `module` gather in this process alone, to be averaged by a later backward."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def alone(module: nn.Module) -> nn.Module:
    """`module` as this process has it, for passes from which none of its parameters gets a gradient."""
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def _channels_last(tensor: Tensor) -> Tensor:
    """The layout is one of four dimensions: a Conv3d's five have another, and a matrix has none."""
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _wide(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()
