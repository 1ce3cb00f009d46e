"""What lies in TensorBoard's event files, as bytes: its own records, written by whoever asks for them."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from itertools import count

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

NUMBERS = count()  # of the files of this process


def file_name() -> str:
    """A name that TensorBoard finds, and that no other file has."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(NUMBERS)}"


def opening(first: int) -> bytes:
    """What a file begins with; it hides what an interrupted run wrote of step `first` and later ones."""
    return _records(
        Event(file_version="brain.Event:2"),
        Event(step=first, file_version="brain.Event:2"),
        Event(step=first, session_log=SessionLog(status=SessionLog.START)),
    )


def scalars(values: Mapping[str, float], step: int) -> bytes:
    """Numbers by name, at one step."""
    return _records(*(Event(step=step, summary=scalar(name, value)) for name, value in values.items()))


def _records(*events: Event) -> bytes:
    written = io.BytesIO()
    records = RecordWriter(written)
    for event in events:
        event.wall_time = time.time()
        records.write(event.SerializeToString())
    return written.getvalue()
