"""The compiled module that a day runs on, and the packages that its machine lacks: from the pack, or made here.

A module lies in folder/afd, beside a stamp of which sources, Python and GPU it is.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from gpu_day import DayError
from gpu_day.results import read_json, write
from gpu_day.run import has

ROOT = Path(__file__).resolve().parents[2]
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def digest(*paths: Path) -> str:
    """Of files, with their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]


def misfit(folder: Path, architecture: str) -> str:
    """Why the module in a folder does not serve, on a GPU of that architecture ("90") or on none; "" if it does."""
    held = read_json(folder / "stamp.json")
    wanted = stamp(folder / "afd" / MODULE, architecture or held.get("architecture", ""))
    others = [(name, held.get(name), value) for name, value in wanted.items() if held.get(name) != value]
    told = "; ".join(f"its {name} is {found}, not {value}" for name, found, value in others)
    return told if held else "there is no stamp.json"


def stamp(module: Path, architecture: str) -> dict[str, str]:
    """What tells a module from others."""
    sources = digest(*(ROOT / "csrc").rglob("*"), ROOT / "CMakeLists.txt")
    return {"file": module.name, "architecture": architecture, "digest": digest(module), "digest of sources": sources}


def compiled(into: Path, python: str, architecture: str, given: Mapping[str, str]) -> None:
    """Compiles for a Python and a GPU ("" for the CPU alone) into a folder."""
    shutil.rmtree(into, ignore_errors=True)
    cuda = {"AFD_CUDA": "on" if architecture else "off", "AFD_CUDA_ARCHITECTURES": f"{architecture}-real"}
    words = [python, "setup.py", "build_ext", f"--build-lib={into}", f"--build-temp={into}/objects"]
    ran = subprocess.run(words, cwd=ROOT, env={**given, **cuda}, text=True, check=False,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if ran.returncode:
        print(ran.stdout, flush=True)
        raise DayError(f"the module cannot be compiled here: {ran.stdout.strip().splitlines()[-1]} (more in build.log)")
    shutil.rmtree(into / "objects")
    write(into / "stamp.json", stamp(next((into / "afd").glob("_C*")), architecture))


def install(work: str, pack: str, architecture: str, out: str) -> None:
    """Sees to the module in the checkout, and writes down what it is; a DayError unless it serves what there is."""
    known = [folder for folder in (Path(pack, "module"), Path(work, "module")) if not misfit(folder, architecture)]
    folder = known[0] if known else Path(work, "module")
    if not known:
        compiled(folder, sys.executable, architecture, os.environ)
    beside = shutil.copy(folder / "afd" / MODULE, ROOT / "afd" / f".{MODULE}")  # some process may have the old one open
    Path(beside).replace(ROOT / "afd" / MODULE)
    from afd.ops.backend import facts

    served = {f"{kind} tensors": facts()[f"{kind} tensors"] for kind in (["CPU", "CUDA"] if architecture else ["CPU"])}
    write(Path(out), {"figures": {"module": folder, **served}})
    if set(served.values()) != {"native"}:
        raise DayError(f"the module does not serve this machine: {served}")


def unpack(pack: Path, site: Path, given: Mapping[str, str]) -> None:
    """Adds those wheels whose modules cannot be imported here, to a folder that is emptied first."""
    shutil.rmtree(site, ignore_errors=True)  # what an earlier call left may be half of it, or another pack's
    for path in sorted(pack.glob("*.whl")):
        try:
            with zipfile.ZipFile(path) as wheel:
                tops = {name.split("/")[0].removesuffix(".py") for name in wheel.namelist() if name.endswith(".py")}
                if not all(has(top, given) for top in tops if top.isidentifier()):
                    wheel.extractall(site)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise DayError(f"{path} is no whole wheel: make gpu-pack makes it anew") from error
