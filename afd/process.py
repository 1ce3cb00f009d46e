"""A process that is a command of ours: its Ctrl-C, errors in one line, output that nobody reads, exit status."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import warnings

TYPE_CHECKING = False  # as typing's: what is imported here is imported before Ctrl-C is ours
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType
    from typing import Any, NoReturn

    Work = Callable[[], object]

INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE  # as shells count a program that wrote to a closed pipe
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)
UNFIT = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.EINVAL)  # of a path
STANDARD_FORMAT = warnings.formatwarning


def run(ask: Callable[[], Work], name: str) -> NoReturn:
    """Runs a command as this process's own, and ends the process with its status.

    Until its work begins, while modules are imported, Ctrl-C ends the process at once, with a line and status 130: in
    an import an exception may be turned into any other. During the work it is a KeyboardInterrupt, and a second one
    ends the process at once. A SIGINT that the process was started to ignore stays ignored.

    Args:
        ask: imports what the command needs, reads its words, and returns its work.
        name: of the command, before its errors.
    """
    ours = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    status: int | str | None = None
    try:
        if ours:
            signal.signal(signal.SIGINT, _end)
            sys.unraisablehook, sys.excepthook = _unraisable, _unhandled
        try:
            status = carry_out(ask, name, _start if ours else _nothing)
        except SystemExit as ended:  # of a parser that has shown its help
            status = ended.code
        sys.stdout.flush()
        sys.stderr.flush()
    except KeyboardInterrupt:
        _end()
    except BrokenPipeError:
        status = UNREAD
        _read_by_nobody()
    if ours:
        signal.signal(signal.SIGINT, _end)
    sys.exit(status)


def _nothing() -> None: ...


def carry_out(ask: Callable[[], Work], name: str, starting: Callable[[], None] = _nothing) -> int:
    """Does what is asked; an error that a user can mend is a line. Returns the exit status.

    Args:
        ask: as of `run`.
        name: as of `run`.
        starting: called before the work.
    """
    from afd.errors import AfdError

    before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        work = ask()
        starting()
        work()
    except AfdError as error:
        kind = "" if hasattr(error, "status") else "error: "  # one that was stopped has done nothing wrong
        print(f"{name}: {kind}{_line(error)}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) or "what was finished is kept"
        print(f"{name}: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        reason = _refused(error)
        if reason is None:
            raise
        print(f"{name}: error: {reason}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning = before
    return 0


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as text: afd's own in words alone, for here no line of the user's code is behind it."""
    if category.__module__.partition(".")[0] == "afd":
        return f"afd: warning: {message}\n"
    return STANDARD_FORMAT(message, category, filename, lineno, line)


def _refused(error: Exception) -> str | None:
    """What the machine has refused, in a line; None for any other error, whose traceback may be wanted."""
    from afd.errors import out_of_memory

    first = (str(error).splitlines() or [""])[0]
    if out_of_memory(error):
        return f"out of memory; a smaller batch, width or model takes less ({first or type(error).__name__})"
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"{error.filename or 'a file'}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in UNFIT and error.filename:
        shown = str(error.filename)
        return f"{shown[:80]}{'…' if len(shown) > 80 else ''}: {error.strerror}"
    if isinstance(error, RuntimeError) and first.startswith("Symlink loop"):  # pathlib's
        return first
    if isinstance(error, ValueError) and first == "embedded null byte":
        return "a path has a null byte"
    return None


def _line(error: Exception) -> str:
    """What an error says, in one line, whoever's words are in it."""
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def _start() -> None:
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """The first one: what is at work may put things in order, and the next one ends it."""
    signal.signal(signal.SIGINT, _end)
    raise KeyboardInterrupt


def _end(_number: int = signal.SIGINT, _frame: FrameType | None = None) -> NoReturn:
    """Ends the process from wherever it is, without another line of Python."""
    try:
        os.write(2, b"afd: interrupted\n")
    finally:  # also where nobody can be told
        os._exit(INTERRUPTED)


def _unraisable(told: Any) -> None:
    """An interrupt in a destructor or a callback, which Python would show and forget."""
    if told.exc_type is not None and issubclass(told.exc_type, KeyboardInterrupt):
        _end()
    sys.__unraisablehook__(told)


def _unhandled(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    """An interrupt between two lines of this file."""
    if issubclass(kind, KeyboardInterrupt):
        _end()
    sys.__excepthook__(kind, error, at)


def _read_by_nobody() -> None:
    """What is still to be written goes nowhere, so that Python's own end does not stumble over it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


# --- How OpenMP's threads wait --------------------------------------------------------------------------------------


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
