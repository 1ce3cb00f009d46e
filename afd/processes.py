"""The processes that torchrun started: how this one joins them, how it leaves, and what it says where another failed.

A process must not end while its group lives. Threads of the group (gloo's) may still let go of tensors that Python
knows, for which they need the interpreter's lock; one that waits for it while the interpreter is being taken down is
ended inside of a C++ destructor, and takes the whole process with it ("terminate called without an active exception",
exit status -6, after a run that went well). So the group is ended before that, when nothing waits for it any more.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from afd.errors import AfdError

PATIENCE = 10.0  # seconds that the end of a process waits for the end of its group
BROKEN = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "NCCL")  # what torch says of a lost connection
FAILED = "failed"  # where in torchrun's store the first process that fails says why
REDUCING = ("reducer", "logger", "process_group")  # what DistributedDataParallel holds of the group


class LostError(AfdError):
    """Another process of the run has failed or was killed, so this one cannot go on; shown as one line."""


class _Joined:
    """What `join` began.

    Attributes:
        process: that joined; a child that it forked has not.
        times: this process has.
        store: where all processes of the run can read and write, if it was torchrun's.
    """

    process = times = 0
    store: Any = None


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def join() -> tuple[int, int]:
    """This process's number and how many there are; joins torchrun's processes if need be.

    The group ends with the process, by itself.
    """
    if launched() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # torchrun's store outlives the workers; restarted ones must not find the addresses of those that died
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{_Joined.times}"
        store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]
        # a model on a CPU is trained there, whatever else the machine has
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        if not _Joined.times:
            sys.excepthook = _in_one_line
        _Joined.store, _Joined.times = store, _Joined.times + 1
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if _Joined.process != os.getpid():
        _Joined.process = os.getpid()
        _Ending.start()
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Ends what `join` began, and what DistributedDataParallel needs of it: what it wraps trains alone afterwards.

    Where something of the group is still under way, because another process has failed, this waits for seconds only.
    """
    if dist.is_available() and dist.is_initialized() and _Joined.process == os.getpid():
        _Ending.now()


@contextmanager
def all_or_none(*agreed: type[BaseException]) -> Iterator[None]:
    """What all processes do: where one fails, it tells the others, and they end with its reason in one line.

    Args:
        agreed: what all raise together without having failed.

    Raises:
        LostError: a connection to another process broke, for it has failed or was killed.
    """
    through: tuple[type[BaseException], ...] = (LostError, *agreed)
    try:
        yield
    except through:
        raise
    except BaseException as error:
        if _Joined.store is None or not dist.is_initialized():
            raise
        if _of_a_connection(error):
            raise LostError(_what_happened()) from None
        first = _tell(error)
        if first is None:
            raise
        raise LostError(first) from None  # all have found the same, and one of them shows it


class _Ending:
    """A thread that ends groups, begun early, as none can begin while the interpreter ends."""

    asked, done = threading.Semaphore(0), threading.Semaphore(0)

    @classmethod
    def start(cls) -> None:
        threading.Thread(target=cls._serve, name="afd ends its group", daemon=True).start()

    @classmethod
    def now(cls) -> None:
        cls.asked.release()
        cls.done.acquire(timeout=PATIENCE)

    @classmethod
    def _serve(cls) -> None:
        while True:
            cls.asked.acquire()
            try:
                _end_group()
            finally:
                cls.done.release()


def _end_group() -> None:
    """Reducers first: they hold the group, and would end it without letting go of the interpreter's lock."""
    reducing = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    for one in reducing:
        for name in REDUCING:
            vars(one).pop(name, None)
    _forget_defaults()
    dist.destroy_process_group()
    gc.collect()  # of what else holds it, if nobody holds that


def _forget_defaults() -> None:
    """Collectives of torch that were imported while the group lived hold it as a default; for none, they ask which."""
    module = sys.modules.get("torch.distributed.nn.functional")
    for one in () if module is None else vars(module).values():
        if isinstance(one, FunctionType) and one.__defaults__:
            one.__defaults__ = tuple(_but_groups(value) for value in one.__defaults__)


def _but_groups(value: Any) -> Any:
    return None if isinstance(value, dist.ProcessGroup) else value


def _of_a_connection(error: BaseException) -> bool:
    known = (dist.DistError,) if hasattr(dist, "DistError") else ()
    return isinstance(error, known) or (isinstance(error, RuntimeError) and any(one in str(error) for one in BROKEN))


def _tell(error: BaseException) -> str | None:
    """Leaves the reason where other processes look; returns what an earlier one has left there, if it is the same."""
    own = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".removesuffix(": ")
    try:
        told = _Joined.store.compare_set(FAILED, "", f"{dist.get_rank()} {own}").decode()
    except RuntimeError as unreachable:  # it was kept by a process that is no more; this one has its own error to show
        print(f"afd: warning: other processes are not told why this one failed: {unreachable}", file=sys.stderr)
        return None
    rank, _, reason = told.partition(" ")
    return _worded(told) if reason == own and int(rank) != dist.get_rank() else None


def _what_happened() -> str:
    try:
        told = _Joined.store.get(FAILED).decode() if _Joined.store.check([FAILED]) else ""
    except RuntimeError:  # the store went with the process that kept it
        told = ""
    happened = _worded(told) if told else "another process of this run was killed or has ended"
    return f"{happened}; this process cannot go on alone"


def _worded(told: str) -> str:
    rank, _, reason = told.partition(" ")
    return f"process {rank} failed: {reason}"


def _in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Without a traceback: that another process failed, which shows its own; or that this one was stopped."""
    if isinstance(error, LostError) or (isinstance(error, AfdError) and hasattr(error, "status")):
        print(f"afd: {'error: ' * isinstance(error, LostError)}{error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
