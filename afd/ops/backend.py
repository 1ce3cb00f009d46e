"""Which implementation serves an op: the compiled kernels or the plain PyTorch reference.

`AFD_BACKEND` (or `use`) chooses: ``auto`` takes the kernels wherever they serve the tensor and the reference elsewhere,
``native`` makes a tensor that the kernels cannot serve an error, ``reference`` never uses the kernels. `explain` says
what serves which device and why; `afd info` prints it.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from afd._version import __version__
from afd.errors import one_of
from afd.installation import namesake
from afd.ops import native

CHOICES = ("auto", "native", "reference")

_choice = os.environ.get("AFD_BACKEND", "auto")
one_of("the environment variable AFD_BACKEND", _choice, CHOICES)
if _choice == "auto" and (_missing := native.import_error()):
    warnings.warn(f"afd runs on its slow PyTorch reference: {_missing}", RuntimeWarning, stacklevel=2)


def choice() -> str:
    """The backend chosen now: auto, native or reference."""
    return _choice


@contextmanager
def use(name: str) -> Iterator[None]:
    """Chooses the backend for the duration of a with-block.

    Raises:
        ValueError: `name` is not auto, native or reference.
    """
    global _choice
    one_of("backend", name, CHOICES)
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def serves_natively(x: Tensor) -> bool:
    """Whether the kernels serve an op on `x` under the present choice.

    Raises:
        RuntimeError: the choice is ``native`` and they cannot; the message says why.
    """
    if _choice == "reference":
        return False
    reason = native.why_not(x)
    if reason and _choice == "native":
        raise RuntimeError(f"AFD_BACKEND=native, but {reason}")
    return reason is None


def explain(device: torch.device) -> str:
    """Which backend serves float32 tensors on `device`, and the reason if it is not the kernels."""
    if _choice == "reference":
        return "reference (AFD_BACKEND=reference)"
    reason = native.device_reason(device)
    if reason is None:
        return "native"
    return f"{'error' if _choice == 'native' else 'reference'}: {reason}"


def fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are much faster than in float32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and native.cpu_multiplies_bf16()


# --- This installation ------------------------------------------------------------------------------------------------


def facts() -> dict[str, str]:
    """The lines of `afd info`, in order."""
    build = native.build_info()
    found = {"afd": __version__, "Python": platform.python_version(), "PyTorch": torch.__version__}
    if "missing" in build:
        found["compiled module"] = f"none: {build['missing']}"
    else:
        found["compiled module"] = f"afd._C, compiled by {build['compiler']}"
        found["CPU kernels"] = f"{', '.join(build['cpu_isas'])}; this CPU runs {build['cpu_isa']}"
        found["CPU threads"] = f"{build['cpu_threads']} ({build['cpu_threads_from']})"
        cuda = build["cuda_runtime"]
        found["CUDA kernels"] = f"CUDA {cuda}: sm_{build['cuda_architectures']}" if cuda else "not compiled in"
    if (other := namesake()) is not None:
        found["name taken"] = other.told
    found["AFD_BACKEND"] = choice()
    found["CPU tensors"] = explain(torch.device("cpu"))
    found["CUDA tensors"] = explain(torch.device("cuda", 0))
    return found


def lines() -> list[str]:
    """`facts`, one aligned line each."""
    return [f"{name:<16} {value}" for name, value in facts().items()]
