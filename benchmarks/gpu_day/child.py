"""Children that end in time: a command in a process group of its own, and nothing of it left behind.

A child whose time is over is first interrupted (pytest then writes its report, `afd train` its checkpoint), then
killed. What it started itself is found by a mark in the environment, whatever group or session it has moved to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

MARK = "AFD_GPU_DAY_CHILD"
GRACE = 10.0  # seconds, at most, between the interruption and the end of the time box
POLL = 0.1


@dataclass(frozen=True)
class Command:
    """What is run.

    Attributes:
        name: of its log, unique in its step.
        words: program and arguments.
        extra: environment variables of its own.
        allowed: exit statuses that are no failure.
    """

    name: str
    words: tuple[str, ...]
    extra: Mapping[str, str] = field(default_factory=dict)
    allowed: frozenset[int] = frozenset({0})


@dataclass(frozen=True)
class Exit:
    """How it ended; status is None where it could not be started."""

    command: Command
    log: Path
    status: int | None
    seconds: float
    timed_out: bool = False

    @property
    def well(self) -> bool:
        """Whether it ended by itself and without a failure."""
        return not self.timed_out and self.status in self.command.allowed


def run_all(
    commands: Sequence[Command],
    until: float,
    logs: Path,
    environment: Mapping[str, str],
    root: Path,
    workers: int = 1,
    stopped: threading.Event | None = None,
) -> list[Exit]:
    """Runs commands, `workers` at a time, each until the same moment.

    Args:
        commands: what to run.
        until: when the time is over, by `time.monotonic`; commands that have not begun by then are timed out.
        logs: folder for <name>.log.
        environment: of every child.
        root: working directory.
        workers: children at a time.
        stopped: ends all children once it is set.
    """
    stop, now = stopped or threading.Event(), time.monotonic()
    times = (until - min(GRACE, (until - now) / 5), until)
    logs.mkdir(parents=True, exist_ok=True)

    def one(command: Command) -> Exit:
        log = logs / f"{command.name}.log"
        if stop.is_set() or time.monotonic() >= times[0]:
            return Exit(command, log, None, 0.0, timed_out=True)
        return run(command, times, log, {**environment, **command.extra}, root, stop)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, commands))


def run(
    command: Command,
    times: tuple[float, float],
    log: Path,
    environment: Mapping[str, str],
    root: Path,
    stopped: threading.Event,
) -> Exit:
    """Runs one command with its output in `log`; `times` are when it is interrupted and when killed. See `run_all`."""
    begin, mark = time.monotonic(), uuid.uuid4().hex
    with log.open("wb") as stream:
        stream.write(f"$ {' '.join(command.words)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(
                command.words, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, cwd=root,
                env={**environment, MARK: mark}, process_group=0,
            )  # fmt: skip
        except OSError as error:
            stream.write(f"cannot be started: {error}\n".encode())
            return Exit(command, log, None, time.monotonic() - begin)
        try:
            over = not _ends(process, times[0], stopped)
            if over:
                _signal(process.pid, signal.SIGINT)
                _ends(process, times[1], threading.Event())
        finally:
            _sweep(process, mark)
    return Exit(command, log, process.returncode, time.monotonic() - begin, timed_out=over)


def _ends(process: subprocess.Popen[bytes], until: float, stopped: threading.Event) -> bool:
    """Whether the process ends before `until` and before all are stopped."""
    while process.poll() is None:
        if time.monotonic() >= until or stopped.wait(POLL):
            return False
    return True


def _sweep(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kills the process, its group, and what it started outside of it."""
    _signal(process.pid, signal.SIGKILL)
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _marked(mark: str) -> Iterator[int]:
    """Processes with the mark in their environment, where the system tells."""
    line = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
