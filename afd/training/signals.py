"""SIGTERM and SIGINT ask training to stop after the round; a second one ends the process as it always would.

torchrun passes on what it is told, so with Ctrl-C in a terminal every process hears of it twice: there a second signal
counts from a while after the first one on.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from afd.errors import AfdError
from afd.processes import launched

STOPPING = (signal.SIGTERM, signal.SIGINT)
ONE_AND_THE_SAME = 3.0  # seconds in which torchrun's signal is the one that was heard before


class StoppedError(AfdError):
    """A signal ended training early, in good order; `status` is the exit status that shells expect of it."""

    def __init__(self, number: int, where: str, checkpoint: Path | None) -> None:
        kept = f"saved {checkpoint}; go on with resume='auto'" if checkpoint else "no folder, nothing saved"
        super().__init__(f"{signal.Signals(number).name}: {where}; {kept}")
        self.status = 128 + number


@contextmanager
def on_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls `stop(number)` at the first stopping signal, then puts the earlier handlers back.

    Only the main thread may handle signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.getsignal(number) for number in STOPPING}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    first: list[float] = []
    process = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a loader's worker, which has inherited this; it ends when it is told to
            return
        if first:
            if time.monotonic() - first[0] > ONE_AND_THE_SAME:
                restore()
                os.kill(process, number)
            return
        first.append(time.monotonic())
        if not launched():
            restore()
        stop(number)

    for number in STOPPING:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
