"""A child in its time box: a process group of its own, a log, and nothing of it left behind."""

import contextlib
import importlib.machinery
import os
import shlex
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE = 8.0  # seconds, at most, between interruption (pytest writes its report, afd its checkpoint) and kill
DROPPED = ("MAKE", "MFLAGS", "PIP_", "XDG_", "AFD_BACKEND", "PYTHONHOME", "PYTHONSTARTUP")  # make's would reach builds


def run(
    words: Sequence[str], log: Path, environment: Mapping[str, str], root: Path, until: float,
    beat: Callable[[], object], stopped: Sequence[int],
) -> int | None:  # fmt: skip
    """Runs a command, its output added to `log`; returns its exit status, or None where it was ended.

    It ends by `until` (of `time.monotonic`), or soon after `stopped` holds a signal; `beat` is called once a second.
    """
    with log.open("ab") as stream:
        stream.write(f"$ {shlex.join(words)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                       cwd=root, env=environment, process_group=0)  # fmt: skip
        except OSError as error:
            stream.write(f"cannot be started: {error}\n".encode())
            return 127
    soon, interrupted = until - min(GRACE, (until - time.monotonic()) / 5), False
    try:
        while (status := process.poll()) is None and (now := time.monotonic()) < until:
            if not interrupted and (stopped or now >= soon):
                os.killpg(process.pid, signal.SIGINT)
                interrupted, until = True, min(until, now + GRACE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(1.0, max(0.05, (until if interrupted else soon) - now)))
            beat()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for a while
            process.wait(2)
    return None if interrupted else status


def has(module: str, environment: Mapping[str, str]) -> bool:
    """Whether children can import a top-level module."""
    importlib.invalidate_caches()
    paths = [path for path in (*environment["PYTHONPATH"].split(os.pathsep), *sys.path) if path]
    return importlib.machinery.PathFinder.find_spec(module, paths) is not None


def environment(root: Path, work: Path, given: Mapping[str, str]) -> dict[str, str]:
    """What children get: this checkout first on the path, CUDA's tools, and a HOME for caches in the work folder."""
    found = {name: value for name, value in given.items() if not name.startswith(DROPPED)}
    packages = (str(root), str(root / "benchmarks"), str(work / "site"), found.get("PYTHONPATH", ""))
    kits = [Path(found.get("CUDA_HOME", "/usr/local/cuda")), *sorted(Path("/usr/local").glob("cuda-*"))]
    tools = [str(kit / folder) for kit in kits for folder in ("bin", "compute-sanitizer")]
    programs = (found.get("PATH", os.defpath), str(Path(sys.executable).parent), sysconfig.get_path("scripts"), *tools)
    (work / "home").mkdir(parents=True, exist_ok=True)
    found |= {"PYTHONPATH": os.pathsep.join(filter(None, packages)), "PATH": os.pathsep.join(programs)}
    found |= {"HOME": str(work / "home"), "PYTHONUSERBASE": site.getuserbase(), "MPLBACKEND": "Agg"}
    return {"USER": "afd", **found, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}  # torch's compiler asks for a user
