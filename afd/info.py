"""What this installation is: versions, compiled kernels, and what serves which tensor."""

from __future__ import annotations

import platform

import torch

from afd._version import __version__
from afd.namesake import namesake
from afd.ops import backend, native


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
    found["AFD_BACKEND"] = backend.choice()
    found["CPU tensors"] = backend.explain(torch.device("cpu"))
    found["CUDA tensors"] = backend.explain(torch.device("cuda", 0))
    return found


def lines() -> list[str]:
    """`facts`, one aligned line each."""
    return [f"{name:<16} {value}" for name, value in facts().items()]
