"""How training passes are carried out, apart from what they compute: precision, memory layout, compilation, devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from afd.attacks import execution as attack_execution
from afd.errors import InputError, one_of
from afd.nn import Split

Wrap = Callable[[nn.Module], nn.Module]


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
        """`model` in the chosen layout, its BatchNorm layers exchanged if so chosen.

        Raises:
            InputError: sync_batchnorm on a device that cannot.
        """
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if not self.sync_batchnorm:
            return model
        device = next(model.parameters()).device
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

    def forward(self, x: Tensor, with_logits: bool = True) -> tuple[Tensor, ...]:
        """(features,) or (features, logits) of images x.

        What is left out is seen as unused by DistributedDataParallel, which then waits for no gradient of it.
        """
        if self.execution.channels_last:
            x = attack_execution.channels_last(x)
        with attack_execution.autocast(self.execution.precision, x.device):
            outputs = self.model.features_and_logits(x)
        wide = tuple(_wide(output) for output in outputs)
        return wide if with_logits else wide[:1]


def unsynchronised(module: nn.Module) -> AbstractContextManager[Any]:
    """A context in which gradients of `module` gather in this process alone, to be averaged by a later backward."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def alone(module: nn.Module) -> nn.Module:
    """`module` as this process has it, for passes from which none of its parameters gets a gradient."""
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def _wide(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()
