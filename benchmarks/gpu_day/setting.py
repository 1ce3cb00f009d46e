"""Where a day runs: the checkout, its folders, the machine, and the environment that every child gets."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROBE = """
import json, torch
there = torch.cuda.is_available()
properties = torch.cuda.get_device_properties(0) if there else None
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "gpu": properties and properties.name,
    "capability": properties and f"{properties.major}.{properties.minor}",
    "memory_gib": properties and round(properties.total_memory / 2**30, 1),
}))
"""
PROBE_SECONDS = 180  # the first import of torch on a fresh machine reads gigabytes


class MachineError(Exception):
    """The machine cannot run a day at all."""


@dataclass(frozen=True)
class Machine:
    """What the children will find.

    Attributes:
        torch: version.
        cuda: version that torch was built with, or None.
        gpu: name of the first GPU that torch sees, or None.
        capability: its compute capability, as in "9.0".
        memory_gib: its memory.
        cores: processor cores that this process may use.
        driver: what nvidia-smi says, or "".
    """

    torch: str
    cuda: str | None = None
    gpu: str | None = None
    capability: str | None = None
    memory_gib: float | None = None
    cores: int = 1
    driver: str = ""

    @property
    def architecture(self) -> str:
        """The GPU's own machine code, in CMake's notation, or ""."""
        return f"{self.capability.replace('.', '')}-real" if self.capability else ""


@dataclass(frozen=True)
class Setting:
    """Everything that stages need to know; the same for all of them.

    Attributes:
        root: the checkout.
        work: folder for all that a day makes.
        out: folder for the few files that tell all.
        machine: see there.
        environment: of every child.
        data: folder with mnist/ and CIFAR-10, or None.
        commit: of the checkout, or "" where nobody knows.
    """

    root: Path
    work: Path
    out: Path
    machine: Machine
    environment: Mapping[str, str]
    data: Path | None = None
    commit: str = ""

    @property
    def results(self) -> Path:
        """Logs and results, a folder a stage."""
        return self.work / "results"

    @property
    def device(self) -> str:
        """What children are told to use."""
        return "cuda" if self.machine.gpu else "cpu"

    def has(self, module: str) -> bool:
        """Whether children can import a top-level module."""
        importlib.invalidate_caches()
        paths = [*self.environment["PYTHONPATH"].split(os.pathsep), *sys.path]
        return importlib.machinery.PathFinder.find_spec(module, [path for path in paths if path]) is not None

    def tool(self, name: str) -> str | None:
        """Path of a program: on PATH, or in a CUDA toolkit."""
        if found := shutil.which(name, path=self.environment["PATH"]):
            return found
        folders = (folder / sub for folder in self._toolkits() for sub in ("bin", "compute-sanitizer"))
        return next((str(folder / name) for folder in folders if os.access(folder / name, os.X_OK)), None)

    def _toolkits(self) -> Iterator[Path]:
        if nvcc := shutil.which("nvcc", path=self.environment["PATH"]):
            yield Path(nvcc).resolve().parents[1]
        yield from (Path(self.environment[name]) for name in ("CUDA_HOME", "CUDA_PATH") if self.environment.get(name))
        yield from sorted(Path("/usr/local").glob("cuda*"))
        yield from sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*"))


def environment(root: Path, work: Path, data: Path | None, given: Mapping[str, str]) -> dict[str, str]:
    """What children get: this checkout first on the path, and every cache in the work folder.

    A machine may lack HOME, or have one that cannot be written; make's own variables would reach the build.
    """
    dropped = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "GNUMAKEFLAGS", "AFD_BACKEND", "PYTHONHOME", "PYTHONSTARTUP"}
    found = {name: value for name, value in given.items() if name not in dropped}
    programs = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    known = found.get("PATH", os.defpath).split(os.pathsep)
    found["PATH"] = os.pathsep.join([*known, *(path for path in programs if path not in known)])
    packages = [str(root), str(work / "site"), *found.get("PYTHONPATH", "").split(os.pathsep)]
    found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in packages if path))
    if not _writable(found.get("HOME", "")):
        found["HOME"] = str(work / "home")
    temporary = tempfile.gettempdir()  # the first that can be written; the current directory at last
    found["TMPDIR"] = str(work / "tmp") if Path(temporary) == Path.cwd() else temporary
    caches = {
        "XDG_CACHE_HOME": "", "MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda", "TORCH_HOME": "torch",
    }  # fmt: skip
    found |= {name: str(work / "cache" / folder) for name, folder in caches.items()}
    found |= {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "COLUMNS": "160"}
    found |= {} if data is None else {"AFD_DATA_ROOT": str(data)}
    found.setdefault("USER", "afd")  # asked for by torch's compiler, of whom the password file may know nothing
    for name in ("HOME", "TMPDIR", *caches):
        Path(found[name]).mkdir(parents=True, exist_ok=True)
    return found


def _writable(folder: str) -> bool:
    """By trying: a superuser is told that everything may be written, a read-only disk included."""
    if not folder:
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def machine(environment: Mapping[str, str], root: Path) -> Machine:
    """Asks torch, in a child, what there is.

    Raises:
        MachineError: torch cannot be imported.
    """
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PROBE], env=dict(environment), cwd=root, capture_output=True, text=True,
            timeout=PROBE_SECONDS, check=True,
        )  # fmt: skip
        told = json.loads(asked.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, IndexError, ValueError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise MachineError(f"{sys.executable} cannot import torch: {reason}; name another with PYTHON=") from error
    return Machine(**told, cores=_cores(), driver=_driver(environment))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _driver(environment: Mapping[str, str]) -> str:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(query, env=dict(environment), capture_output=True, text=True, timeout=60, check=True)
        return asked.stdout.strip()
    return ""


def description(machine: Machine) -> str:
    """One line: the GPU or its absence, processor, versions."""
    gpu = f"{machine.gpu} (sm_{machine.architecture.removesuffix('-real')})" if machine.gpu else "no GPU"
    return f"{gpu}, {machine.cores} cores, Python {platform.python_version()}, torch {machine.torch}"
