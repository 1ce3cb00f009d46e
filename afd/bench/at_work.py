"""What a benchmark is at: on a terminal a line that changes, in a log a line now and then.

It is written between timed calls, by the thread that makes them: a spinner of its own would take time from them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from afd.extras import needed_by

with needed_by("a benchmark"):
    from rich.console import Console

ON_TERMINAL, IN_LOG = 0.1, 10.0  # seconds from one line to the next
ERASE = "\r\x1b[2K"


class AtWork:
    """Tells what is being done.

    Args:
        console: where to.
        name: of the benchmark, before every line.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name, self.doing = console, name, ""
        self.every = ON_TERMINAL if console.is_terminal else IN_LOG
        self.next, self.shown = 0.0, False

    def tell(self, text: str, always: bool = False) -> None:
        """Shows a text, unless another has just been shown."""
        now = time.monotonic()
        if self.console.quiet or (now < self.next and not always):
            return
        self.next = now + self.every
        line = f"{self.name}: {text}"
        if self.console.is_terminal:
            self.console.file.write(ERASE + line[: self.console.width - 1])
            self.console.file.flush()
            self.shown = True
        else:
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def clear(self) -> None:
        """Takes the line away, for something that stays."""
        if self.shown:
            self.console.file.write(ERASE)
            self.shown = False


_present: ContextVar[AtWork | None] = ContextVar("at_work", default=None)


@contextmanager
def telling(console: Console, name: str) -> Iterator[AtWork]:
    """For as long as the context lasts, `begin` and `now` are shown there."""
    told = AtWork(console, name)
    token = _present.set(told)
    try:
        yield told
    finally:
        told.clear()
        _present.reset(token)


def begin(case: str) -> None:
    """A piece of work begins, of which `now` tells more; in a log, each is told."""
    told = _present.get()
    if told is not None:
        told.doing = case
        told.tell(case, always=True)


def now(detail: str) -> None:
    """What of it is being done."""
    told = _present.get()
    if told is not None:
        told.tell(f"{told.doing}: {detail}" if told.doing else detail)
