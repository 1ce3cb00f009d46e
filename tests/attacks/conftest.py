"""The stand-in for CUDA graphs under attacks."""

from __future__ import annotations

import warnings

import pytest

from afd.attacks import base, replay


@pytest.fixture
def tapes(graphs_are_tapes, tape, monkeypatch):
    """Graphs of attacks are tapes, on any device; returns those that were recorded."""
    for module in (base, replay):
        monkeypatch.setattr(module, "capturable", lambda _: not tape.Tape.recording)
    return graphs_are_tapes(replay)


@pytest.fixture
def quiet():
    """No warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
