"""What this installation is: versions and kernels, and whether another package of our name is in the way."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from afd._version import __version__
from afd.errors import AfdError

OURS = "Adversarial Feature Desensitization"  # so the summary of this library begins, which once was called afd itself


class NamesakeError(AfdError):
    """Another package of our name has put its files among ours."""


class Namesake(NamedTuple):
    """A distribution called afd that is not this one.

    Attributes:
        version: of it.
        summary: what it says of itself.
        mixed: whether its files lie in the very folder of this package.
    """

    version: str
    summary: str
    mixed: bool

    @property
    def told(self) -> str:
        """What it is and what to do, in one line."""
        what = f"another package is installed as afd: afd {self.version} ({self.summary}), which is not this library"
        if self.mixed:
            return (
                f"{what} and lies in one folder with it, so that neither works; run `pip uninstall afd`, then "
                "`pip install --force-reinstall --no-deps afd-torch` (or the path that you installed this one from)"
            )
        return f"{what}; `import afd` and the command afd may be that one's until you run `pip uninstall afd`"


def namesake() -> Namesake | None:
    """The stranger that is installed under our name, if there is one."""
    here = Path(__file__).resolve().parent
    for found in metadata.distributions(name="afd"):
        told = found.metadata
        summary = " ".join((told["Summary"] or "no summary").split())
        if not summary.startswith(OURS):
            theirs = Path(str(found.locate_file("afd"))).resolve()
            return Namesake(str(told["Version"] or "of no version"), summary, theirs == here)
    return None


def apart() -> None:
    """Says that there is a namesake, which may be called instead of us.

    Raises:
        NamesakeError: its files lie among ours, so that nothing can be relied on.
    """
    found = namesake()
    if found is None:
        return
    if found.mixed:
        raise NamesakeError(found.told)
    print(f"afd: warning: {found.told}", file=sys.stderr)


def facts() -> dict[str, str]:
    """The lines of `afd info`, in order."""
    import torch

    from afd.ops import backend, native

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
