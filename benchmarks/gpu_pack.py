"""``make gpu-pack``: what a GPU day's machine lacks, in one folder: wheels, the module for it, and data if asked."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from gpu_day import DayError
from gpu_day.module import ROOT, compiled
from gpu_day.run import environment

PACKAGES = (
    "tyro", "tomli-w", "docstring_parser", "typeguard", "pooch", "platformdirs",
    "hypothesis", "sortedcontainers", "pytest-benchmark", "py-cpuinfo", "pytest-xdist", "execnet", "pytest-timeout",
    "foolbox", "eagerpy", "GitPython", "gitdb", "smmap", "requests", "urllib3", "certifi", "idna",
    "charset-normalizer", "tqdm", "six", "pyautoattack", "torchattacks", "setuptools", "pybind11",
)  # fmt: skip
LARGEST, BALLAST = 40 * 2**20, 2**18  # bytes: of a pack; of a packed file that, if no Python, is weights
DATA = ("cifar10-jpeg", "unpack_cifar10.py", "cifar-10-batches-bin")
HEADERS = "import sys, sysconfig, pathlib; include = pathlib.Path(sysconfig.get_path('include'), 'Python.h')\n"
HEADERS += "sys.exit(not (include.is_file() and sys.version_info[:2] == (3, 12)))"
COMMAND = "make gpu PYTHON=python3 STAGES=%s BUDGET=%d WHEELS=build/wheels COMMIT=%s OUT=%s"


def pack(folder: Path, python: str, data: Path | None, commit: str) -> None:
    """Fills a folder, which is emptied first.

    Args:
        folder: of the pack.
        python: a Python 3.12 with headers.
        data: where data sets lie that are to come along.
        commit: of this checkout.

    Raises:
        DayError: something is missing here, or the pack is too large to be carried.
    """
    if not shutil.which(python) or subprocess.run([python, "-c", HEADERS], check=False).returncode:
        needed = "a Python 3.12 with headers (default: python3.12, or pyenv's)"
        raise DayError(f"GPU_PYTHON is {python!r}; it must be {needed}")
    work = ROOT / "build" / "gpu-pack"
    given = environment(ROOT, work, os.environ)
    if not shutil.which("nvcc", path=given["PATH"]):
        raise DayError("nvcc is missing, which compiles the module")
    if data and not any((data / name).exists() for name in DATA):
        raise DayError(f"DATA is {data}, which holds none of {', '.join(DATA)}")
    if data and data.resolve().is_relative_to(folder):
        raise DayError(f"DATA is {data}, which lies in {folder}; that folder is emptied first")
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name in PACKAGES:
        fetch(name, folder)
    for wheel in folder.glob("*.whl"):
        lighten(wheel)
    for name in ("pybind11", "setuptools"):
        zipfile.ZipFile(next(folder.glob(f"{name}-*.whl"))).extractall(work / "site")
    compiled(folder / "module", python, "90", given)
    if data:
        carry(data, folder / "data")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        most = f"at most {LARGEST / 2**20:g} can be carried: leave data out"
        raise DayError(f"{folder} has {size / 2**20:.1f} MiB; {most}")
    print(f"{folder}: {size / 2**20:.1f} MiB. There, in 390 s and 360 s:")
    training = "6:cifar10" if data else "6"
    print(COMMAND % ("1,2,3", 350, commit, "a"), COMMAND % (f"4:128,5:resnet18,{training}", 330, commit, "b"), sep="\n")


def carry(data: Path, folder: Path) -> None:
    """Copies the data sets of a folder, and no permissions: what is read-only could not be removed again."""
    for path in [path for name in DATA for path in (data / name, *(data / name).rglob("*")) if path.is_file()]:
        copy = folder / path.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def fetch(name: str, folder: Path) -> None:
    """Downloads a wheel that fits every machine: of the version in constraints.txt, else the newest that does."""
    words = "-m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --python-version 3.11"
    words += " --implementation py --abi none --platform any"
    pip = [sys.executable, *words.split(), "--dest", str(folder), name]
    pinned = [*pip, "--constraint", str(ROOT / "constraints.txt")]
    if all(subprocess.run(command, check=False).returncode for command in (pinned, pip)):
        raise DayError(f"{name} cannot be fetched as a wheel that fits every machine")


def lighten(path: Path) -> None:
    """Leaves out of a wheel what is large and no Python."""
    light = path.with_suffix(".light")
    with zipfile.ZipFile(path) as full, zipfile.ZipFile(light, "w", zipfile.ZIP_DEFLATED) as kept:
        for file in full.infolist():
            if file.compress_size <= BALLAST or file.filename.endswith(".py"):
                kept.writestr(file, full.read(file))
    light.replace(path)


if __name__ == "__main__":
    folder, python, data, commit = sys.argv[1:]
    try:
        pack(Path(folder).resolve(), python, Path(data) if data else None, commit)
    except (DayError, OSError) as error:
        sys.exit(f"make gpu-pack: {error}")
