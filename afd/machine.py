"""The machine: its devices by name, the memory that this process has taken at most, and how much there is."""

from __future__ import annotations

import platform
import re
import resource
import sys
from pathlib import Path

import torch

# of Linux
STATUS, MEMINFO, CPUINFO = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/cpuinfo")


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.+)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def device_with_threads(device: torch.device) -> str:
    """The device, with what its speed hangs on: a GPU by its name, a CPU with the number of torch's threads."""
    threads = f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() != 1)}"
    return device_name(device) + threads * (device.type != "cuda")


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
