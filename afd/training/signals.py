"""SIGTERM and SIGINT ask training to stop after the step in progress; a second one ends the process as it always would.

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
from afd.runtime import Agreement, Group

STOPPING = (signal.SIGTERM, signal.SIGINT)
ONE_AND_THE_SAME = 3.0  # seconds in which torchrun's signal is the one that was heard before
BY_CALLBACK = 1  # what stopped a run, if not the signal of a larger number
STDERR = 2


class StoppedError(AfdError):
    """A signal ended training early, in good order.

    Attributes:
        number: of the signal.
        where: how far training had come.
        checkpoint: what was saved, if there is a folder for it.
        status: the exit status that shells expect.
    """

    def __init__(self, number: int, where: str, checkpoint: Path | None, advice: str | None = None) -> None:
        if checkpoint is None:
            kept, advice = "nothing saved", advice or "call fit again to go on"
        else:
            kept, advice = f"saved {checkpoint}", advice or "go on with resume='auto', or by calling fit again"
        super().__init__(f"{signal.Signals(number).name}: {where}; {kept}; {advice}")
        self.number, self.where, self.checkpoint, self.status = number, where, checkpoint, 128 + number

    def advised(self, advice: str) -> StoppedError:
        """The same, with other words on how to go on."""
        return StoppedError(self.number, self.where, self.checkpoint, advice)


class LeftError(Exception):
    """Something long was left in the middle, because somebody has asked to stop."""


class Stop:
    """Whether training is to stop: asked for by a signal, or by a callback.

    Args:
        group: of the processes.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.reason = group, 0
        self._agreement = Agreement(group)

    def begin(self) -> None:
        """Forgets what was asked before; all processes must begin."""
        self.reason = 0
        self._agreement.forget()

    def settle(self) -> None:
        """Waits for what is still under way between the processes, so that nothing of it is left when they end."""
        self._agreement.forget()

    def ask(self, number: int = BY_CALLBACK) -> None:
        """Asks to stop after the step in progress, because of that signal."""
        self.reason = number

    def by_signal(self, number: int) -> None:
        """Asks, and tells so in the terminal; to be called by a signal's handler."""
        self.ask(number)
        if self.group.leads:
            name = signal.Signals(number).name
            os.write(STDERR, f"afd: {name}: stopping after this step; once more ends at once\n".encode())

    def asked(self) -> bool:
        """Whether to stop now; all processes must ask."""
        self.reason = self.group.largest(self.reason)
        return self.reason > 0

    def after_step(self) -> bool:
        """Whether to stop after this step, without waiting: several processes agree one step later, in all the same."""
        return self._agreement.on(self.reason) > 0

    def leave(self) -> None:
        """Raises LeftError if somebody has asked. Several processes would wait for each other: they finish first."""
        if self.reason and self.group.size == 1:
            raise LeftError


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
