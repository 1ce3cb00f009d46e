"""How much memory this process has taken at most, and how much there is: of a GPU, or of the machine."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS, MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")  # of Linux


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: allocated by torch on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = _kibibytes(STATUS, "VmHWM")  # which, unlike getrusage, does not begin with what the parent process held
    if held is not None:
        return held
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def available_memory(device: torch.device) -> int | None:
    """Bytes that a process could still take, of a GPU or of the machine; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _kibibytes(MEMINFO, "MemAvailable")


def _kibibytes(file: Path, name: str) -> int | None:
    """Bytes of an entry that a file of Linux's gives in kB."""
    if not file.exists():
        return None
    found = next((line for line in file.read_text().splitlines() if line.startswith(f"{name}:")), None)
    return None if found is None else 1024 * int(found.split()[1])
