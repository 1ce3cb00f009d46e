"""What all tests of training run in."""

import pytest
from one_thread import one_thread  # noqa: F401  (a fixture)

from afd.ops.spectral import schema
from afd.training import recording


@pytest.fixture
def tapes(graphs_are_tapes, monkeypatch):
    """Graphs of steps are tapes, and nothing stands against them; returns those that were recorded."""
    monkeypatch.setattr(recording, "obstacle", lambda *_: None)
    monkeypatch.setattr(schema, "labels", lambda *_: None)  # it looks at labels where they cost no waiting: on the CPU
    return graphs_are_tapes(recording)
