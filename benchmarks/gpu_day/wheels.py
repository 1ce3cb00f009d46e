"""Packages that a machine without a network may lack: pure-Python wheels, fetched elsewhere and carried there.

``make wheels`` runs this on a connected machine. Only wheels that fit every machine are taken, without what they ask
for: torch, NumPy and the like must be there already.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a CUDA image with PyTorch often lacks, with what each of them imports. Versions are those of constraints.txt, or
# where those are compiled, the newest that fits every machine.
PACKAGES = (
    "tyro", "docstring_parser", "typeguard", "pooch", "platformdirs", "hypothesis", "sortedcontainers",
    "pytest-benchmark", "py-cpuinfo",
    "foolbox", "eagerpy", "GitPython", "gitdb", "smmap", "requests", "pyautoattack", "torchattacks", "tqdm",
    "adversarial-robustness-toolbox", "six",
)  # fmt: skip
LARGEST = 16 * 2**20  # bytes, all together
BALLAST = 256 * 2**10  # a packed file of this size that is no Python is an example's picture or weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads the wheels; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gpu_day.wheels", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to; it is emptied first")
    parser.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    options = parser.parse_args(arguments)
    shutil.rmtree(options.folder, ignore_errors=True)
    failed = [name for name in PACKAGES if not download(name, options.folder, options.constraints)]
    for wheel in options.folder.glob("*.whl"):
        lighten(wheel)
    size = sum(path.stat().st_size for path in options.folder.glob("*.whl"))
    print(f"{len(PACKAGES) - len(failed)} wheels, {size / 2**20:.1f} MiB, in {options.folder}")
    if failed:
        print(f"not found as pure-Python wheels: {', '.join(failed)}", file=sys.stderr)
    if size > LARGEST:
        print(f"more than {LARGEST / 2**20:g} MiB: something that is not small has come along", file=sys.stderr)
    return 1 if failed or size > LARGEST else 0


def download(name: str, folder: Path, constraints: Path) -> bool:
    """Fetches one wheel that fits any machine with Python 3.11 or newer."""
    fitting = (
        "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "--python-version", "3.11",
        "--implementation", "py", "--abi", "none", "--platform", "any", name,
    )  # fmt: skip
    if _pip([*fitting, "--constraint", str(constraints)], os.environ) == 0:
        return True
    print(f"{name}: its version in {constraints} does not fit every machine; taking the newest that does")
    return _pip(fitting, os.environ) == 0


def lighten(wheel: Path) -> None:
    """Leaves out what is large and no Python: some wheels carry the weights of their examples."""
    with zipfile.ZipFile(wheel) as full:
        ballast = {
            file.filename for file in full.infolist() if file.compress_size > BALLAST and not _code(file.filename)
        }
        if not ballast:
            return
        light = wheel.with_suffix(".light")
        with zipfile.ZipFile(light, "w", zipfile.ZIP_DEFLATED) as kept:
            for file in full.infolist():
                content = full.read(file)
                if file.filename.endswith(".dist-info/RECORD"):
                    rows = content.decode().splitlines(keepends=True)
                    content = "".join(row for row in rows if row.rsplit(",", 2)[0] not in ballast).encode()
                if file.filename not in ballast:
                    kept.writestr(file, content)
    light.replace(wheel)
    print(f"{wheel.name}: left out {', '.join(sorted(ballast))}")


def _code(name: str) -> bool:
    return name.endswith(".py") or ".dist-info/" in name


def install(folder: Path, site: Path, environment: Mapping[str, str]) -> list[str]:
    """Unpacks those wheels of a folder whose packages are absent; returns their names.

    They go to a folder of their own: the machine's Python may be read-only or externally managed.

    Raises:
        FileNotFoundError: there is no wheel in the folder.
        subprocess.CalledProcessError: pip refused one.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"WHEELS is {folder}, where there is no wheel; `make wheels` fills it elsewhere")
    paths = [str(site), *sys.path]
    absent = {wheel: name for wheel in wheels if not _present(name := wheel.name.partition("-")[0], paths)}
    if absent:
        words = (
            "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade",
            "--no-warn-conflicts", "--target", str(site), *map(str, absent),
        )  # fmt: skip
        plain = {name: value for name, value in environment.items() if not name.startswith("PIP_")}
        if status := _pip(
            words, {**plain, "PIP_CONFIG_FILE": os.devnull}
        ):  # a `user = true` there would get in the way
            raise subprocess.CalledProcessError(status, "pip install")
    return list(absent.values())


def _pip(words: Sequence[str], environment: Mapping[str, str]) -> int:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, env=dict(environment), check=False).returncode


def _present(name: str, paths: Sequence[str]) -> bool:
    wanted = re.sub(r"[-_.]+", "-", name).lower()
    found = importlib.metadata.distributions(path=list(paths))
    return any(re.sub(r"[-_.]+", "-", one.metadata["Name"] or "").lower() == wanted for one in found)


if __name__ == "__main__":
    raise SystemExit(main())
