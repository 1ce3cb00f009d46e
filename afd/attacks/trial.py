"""A forward that may have to be undone: what it draws, and what it changes in its model."""

from __future__ import annotations

import torch
from torch import nn

from afd.attacks.python_state import snapshot
from afd.errors import ModelError
from afd.nn.modes import Buffers, version_of


class Trial:
    """What a forward may change, put aside: draws, the modules' attributes, and buffers.

    Args:
        model: that is about to run.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        self.cuda = [] if devices and torch.cuda.is_current_stream_capturing() else sorted(devices, key=str)
        self.draws = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in self.cuda]
        self.attributes = snapshot(model)
        self.buffers = Buffers(list(model.modules()))
        self.parameters = [(name, one, version_of(one)) for name, one in model.named_parameters()]

    def undo(self) -> None:
        """Puts all of it back.

        Raises:
            ModelError: a parameter was written to.
        """
        for name, parameter, version in self.parameters:
            if version_of(parameter) != version:
                raise ModelError(
                    f"the model's forward writes to its parameter {name}, in a way that joined layers cannot follow; "
                    "attack it with fold=False"
                )
        self.attributes()
        self.buffers.put_back()
        torch.set_rng_state(self.draws[0])
        for device, state in zip(self.cuda, self.draws[1], strict=True):
            torch.cuda.set_rng_state(state, device)
