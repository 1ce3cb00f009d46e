"""Timing that survives a busy machine: candidates side by side, percentiles, and numbers that carry their context."""

from __future__ import annotations

import json
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from afd._version import __version__

Candidates = Mapping[str, Callable[[], object]]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: percentiles over the rounds."""

    p20: float
    p50: float
    p80: float


def interleaved(
    candidates: Candidates, rounds: int, warmup: int = 5, device: torch.device = CPU, seed: int = 0
) -> dict[str, Timing]:
    """Times every candidate once a round, so that a slow spell of the machine meets them all alike.

    Each round has its own order: what a call finds in the caches is left there by the call before it, and no candidate
    should always follow the same one. On CUDA the times are those between events on the current stream.
    """
    for _ in range(warmup):
        for call in candidates.values():
            call()
    order, shuffler = list(candidates), random.Random(seed)
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            readings[name].append(clock(candidates[name]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: _percentiles([read() for read in taken]) for name, taken in readings.items()}


def _on_cpu(call: Callable[[], object]) -> Callable[[], float]:
    begin = time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    return lambda: seconds


def _on_gpu(call: Callable[[], object]) -> Callable[[], float]:
    """The reading is taken later, when the stream has passed both events: reading now would wait for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    return lambda: begin.elapsed_time(end) * 1e-3


def _percentiles(seconds: list[float]) -> Timing:
    ranks = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Timing(*torch.tensor(seconds, dtype=torch.float64).quantile(ranks).tolist())


# --- Context --------------------------------------------------------------------------------------------------------


def device_name(device: torch.device = CPU) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def commit() -> str | None:
    """The commit this package is checked out from ("-dirty" with local changes), or None for an installed one."""

    def git(*arguments: str) -> str | None:
        try:
            ran = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return None
        return ran.stdout.strip() if ran.returncode == 0 else None

    here = Path(__file__)
    tracked = git("ls-files", "--error-unmatch", here.name)  # a virtual environment may lie in some other repository
    return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty") if tracked else None


def record(
    path: Path, benchmark: str, results: Mapping[str, Any], device: torch.device = CPU, **context: object
) -> None:
    """Writes results (Timings at any depth) as JSON, with what is needed to read them later."""
    document = {
        "benchmark": benchmark,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "afd": __version__,
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **context,
        "seconds": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, default=asdict) + "\n")
