"""CUDA graphs: capture on a stand-in for torch's CUDA side that fails as it fails, and on a GPU; and their cache."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch
from recorded_attacks import held
from torch import nn

from afd import graphs
from afd.attacks import PGD


class Driver:
    """What of torch.cuda a capture touches: a current device and stream, and a random generator for each device.

    A capture runs on the current device if its stream is that device's. In the mode "global" it fails if another thread
    allocates meanwhile. One that fails leaves its stream current, and the generator believing that it is captured.
    """

    def __init__(self, monkeypatch):
        self.device, self.stream, self.captured = 0, (0, "default"), []
        self.capturing = {0: False, 1: False}
        self.pinned_meanwhile = False
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "device", self.on)
        monkeypatch.setattr(cuda, "stream", self.using)
        monkeypatch.setattr(cuda, "graph", self.graph)
        monkeypatch.setattr(cuda, "Stream", lambda index: (index, "capture"))
        monkeypatch.setattr(cuda, "current_stream", lambda *_: Stream(self.device, self.stream))
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(cuda, "CUDAGraph", object)
        monkeypatch.setattr(cuda, "Event", object)
        monkeypatch.setattr(torch, "zeros", lambda *_, device: Number(device.index))
        monkeypatch.setattr(graphs, "_release", lambda *_: None)
        monkeypatch.setattr(graphs, "_streams", {})

    @contextmanager
    def on(self, device):
        before = self.device, self.stream
        self.device, self.stream = device.index, (device.index, "default")
        try:
            yield
        finally:
            self.device, self.stream = before

    @contextmanager
    def using(self, stream):
        before, self.stream = self.stream, getattr(stream, "which", stream)
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def graph(self, _graph, pool=None, stream=(0, "capture"), capture_error_mode="global"):
        self.stream, self.capturing[self.device] = stream, True
        yield
        if capture_error_mode == "global" and self.pinned_meanwhile:
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")
        self.captured.append((self.device, stream, pool))
        self.capturing[self.device] = False


class Stream:
    def __init__(self, index, which):
        self.device_index, self.which = index, which


class Number:
    def __init__(self, index):
        self.index = index

    def get_device(self):
        return self.index

    def add_(self, _):
        return self


@pytest.fixture(autouse=True)
def equal_bits(monkeypatch):
    """Convolutions give equal bits every time, for a step goes by the sign of the gradient."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


def test_a_thread_that_pins_memory_meanwhile_does_not_end_the_capture(driver):
    driver.pinned_meanwhile = True
    with graphs.Graph(torch.device("cuda", 0)).capture():
        pass
    assert driver.captured == [(0, (0, "capture"), "pool")]


def test_work_of_another_device_is_captured_there(driver):
    with graphs.Graph(torch.device("cuda", 1)).capture():
        assert driver.stream == (1, "capture")
    assert driver.captured == [(1, (1, "capture"), "pool")]
    assert (driver.device, driver.stream) == (0, (0, "default"))


@pytest.mark.parametrize("index", [0, 1])
def test_after_a_failed_capture_random_numbers_can_be_drawn_again(driver, index):
    with pytest.raises(RuntimeError, match="not permitted"), graphs.Graph(torch.device("cuda", index)).capture():
        raise RuntimeError("operation not permitted when stream is capturing")
    assert not any(driver.capturing.values())
    assert driver.stream == (0, "default")


def test_turns_wait_for_the_turn_before_whatever_their_stream(monkeypatch):
    told, events = [], []

    class Event:
        def record(self, stream):
            events.append(self)
            told.append(("done", stream.name))

    class Named:
        device_index = 0

        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            events.append(event)
            told.append(("wait", self.name))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(graphs, "_last_turn", {})
    for name in ("first", "second"):  # also of two graphs, which share what libraries keep for their stream
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_, name=name: Named(name))
        with graphs.Graph(torch.device("cuda", 0)).turn():
            told.append(("replay", name))
    assert len(set(events)) == 1
    assert told == [(what, name) for name in ("first", "second") for what in ("wait", "replay", "done")]


def test_a_truth_on_the_host_is_read_as_it_is():
    for truth in (True, False):
        later = graphs.Later(torch.tensor(truth))
        assert later.there
        assert later.read() is truth


# --- The cache ------------------------------------------------------------------------------------------------------


def called(cache, key, made, note=None):
    """What a user of the cache does: "eager", or the name of the graph that is replayed."""
    known = cache.get(key)
    if known is None:
        cache.met(key, note)
        return "eager"
    return cache.captured(known, lambda: made.append(key) or f"graph of {key}") or "eager"


def test_a_key_is_captured_when_it_is_met_for_the_second_time():
    cache, made = graphs.GraphCache("it runs"), []
    outcomes = [called(cache, key, made) for key in "aabaab"]
    assert outcomes == ["eager", "graph of a", "eager", "graph of a", "graph of a", "graph of b"]
    assert made == ["a", "b"]


def test_what_its_user_notes_of_eager_runs_is_kept_beside_the_graph():
    cache, made = graphs.GraphCache("it runs"), []
    called(cache, "a", made, note=3), called(cache, "a", made)
    cache.met("a", note=5)
    assert cache.get("a").note == 5
    assert cache.get("a").captured == "graph of a"


def test_the_graphs_used_last_are_kept_and_so_are_the_keys_met_last():
    cache, made = graphs.GraphCache("it runs"), []
    for key in range(graphs.KEPT):
        called(cache, key, made), called(cache, key, made)
    called(cache, 0, made)
    cache.begin()
    called(cache, "new", made), called(cache, "new", made)
    assert held(cache) == [f"graph of {key}" for key in (2, 3, 0, "new")]
    assert cache.get(1) is None, "it is met anew"
    for key in range(100, 100 + graphs.REMEMBERED):
        called(cache, key, made)
    assert cache.get(100) is not None
    assert held(cache) == []


def test_graphs_of_one_piece_of_work_do_not_drive_out_one_another():
    cache, made = graphs.GraphCache("it runs"), []
    for _ in range(3):
        cache.begin()
        for key in range(graphs.KEPT + 2):
            called(cache, key, made)
    assert made == list(range(graphs.KEPT))
    assert called(cache, graphs.KEPT, made) == "eager"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("not permitted"), "its capture failed: not permitted"),
        (graphs.NotCapturableError("it counts"), "it counts"),
    ],
)
def test_after_a_capture_that_failed_there_is_none(error, reason):
    def fails():
        raise error

    cache, made = graphs.GraphCache("the work runs"), []
    called(cache, "good", made), called(cache, "good", made), called(cache, "bad", made)
    with pytest.warns(graphs.CaptureWarning, match=f"^the work runs without a CUDA graph, because {reason}$"):
        assert cache.captured(cache.get("bad"), fails) is None
    assert cache.refused
    assert held(cache) == []


# --- On a GPU -------------------------------------------------------------------------------------------------------


def net(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).to(device)


def batch(device, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(8, 3, 8, 8, generator=generator).to(device), torch.arange(8, device=device) % 5


@pytest.mark.gpu
def test_an_attack_is_captured_beside_a_thread_that_pins_memory(cuda):
    attack, (x, y) = PGD(net(cuda), eps=0.1, steps=20), batch(cuda)
    ended, errors = threading.Event(), []

    def pin():
        size = 1 << 16
        try:
            while not ended.is_set():
                torch.empty(size, pin_memory=True)
                size += 1 << 16  # never a block that is there already
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        points = [attack(x, y) for _ in range(4)]
    finally:
        ended.set()
        thread.join()
    assert not errors
    assert not attack._graphs.cache.refused
    for point in points:
        torch.testing.assert_close(point, points[0], atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_after_a_failed_capture_random_numbers_and_earlier_graphs_work(cuda):
    attack, (x, y) = PGD(net(cuda), eps=0.1, steps=2), batch(cuda)
    first = [attack(x, y) for _ in range(3)][-1]
    total = x.sum()
    with pytest.raises(RuntimeError), graphs.Graph(cuda).capture():
        float(total)
    assert 0 <= float(torch.rand(1, device=cuda)) <= 1
    torch.testing.assert_close(attack(x, y), first, atol=1e-5, rtol=0)
    assert held(attack._graphs.cache)


@pytest.mark.gpu
def test_an_attack_on_the_second_gpu(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    second = torch.device("cuda", 1)
    model = net(second)
    captured, plain = PGD(model, eps=0.1, steps=3), PGD(model, eps=0.1, steps=3)
    plain._graphs.cache.refused = True
    with torch.cuda.device(0):
        for seed in range(4):
            x, y = batch(second, seed)
            torch.testing.assert_close(captured(x, y), plain(x, y), atol=1e-5, rtol=0)
    assert not captured._graphs.cache.refused
    assert held(captured._graphs.cache)


@pytest.mark.gpu
def test_calls_from_two_streams_do_not_meet(cuda):
    attack, plain = (PGD(net(cuda), eps=0.1, steps=40) for _ in range(2))
    plain._graphs.cache.refused = True
    batches = [batch(cuda, seed) for seed in range(2)]
    expected = [plain(x, y) for x, y in batches]
    for x, y in batches:
        attack(x, y)
    attack.validate = plain.validate = False  # or each call would wait for the device
    for x, y in batches * 2:
        attack(x, y)  # captured
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(cuda) for _ in range(2)]
    for _ in range(20):
        found = []
        for stream, (x, y) in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(attack(x, y))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
