"""How OpenMP's threads wait on a busy machine; settled before torch is imported, for its OpenMP reads that only once.

A thread that waits for the others of its team spins, by default, for some milliseconds. Where another process holds a
core, one thread of the team is late in every operation, the others spin meanwhile on the cores that it would need, and
the whole falls to a half and, beside several threads of others, to a tenth of its speed and less. Threads that sleep
while they wait are as fast there as the machine allows; on a machine of their own they take a tenth longer.
"""

from __future__ import annotations

import os
import sys
import time

SETTLED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by the user
RUNNING = "/proc/loadavg"  # its fourth word: threads that run or want to, of how many
LOOKS, BETWEEN = 10, 0.005  # how often to look, and how many seconds apart


def sleep_if_busy() -> None:
    """Lets OpenMP's threads sleep while they wait where other processes want their cores, and says so."""
    if any(name in os.environ for name in SETTLED) or os.environ.get("OMP_NUM_THREADS", "") == "1":
        return
    others = wanted_by_others()
    if others is None or others + len(os.sched_getaffinity(0)) <= (os.cpu_count() or 1):
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    print(
        f"afd: this machine is busy ({others} threads of other processes, {os.cpu_count()} cores), so threads sleep "
        "while they wait (OMP_WAIT_POLICY=ACTIVE lets them spin)",
        file=sys.stderr,
    )


def wanted_by_others() -> int | None:
    """Cores that other processes keep busy just now, to the nearest one; None where the system does not say."""
    total = 0
    for _ in range(LOOKS):
        try:
            with open(RUNNING) as file:  # noqa: PTH123  (pathlib is not imported yet)
                total += int(file.read().split()[3].partition("/")[0]) - 1
        except (OSError, ValueError, IndexError):
            return None
        time.sleep(BETWEEN)
    return round(total / LOOKS)
