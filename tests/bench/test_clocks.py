"""Kernel-sized work: which calls make up a graph, what its replay says of one of them, and what happens without it."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from afd.bench import clocks, kernels
from afd.bench import gpu as device_clock
from afd.bench.clocks import Calls, CpuClock, GpuClock, share_of_copy
from afd.bench.gpu import Gpu, copied_bytes
from afd.bench.timing import in_turn


@pytest.mark.parametrize("footprint", [1, 3, 499, 500, 999, 1000, 1001, 5000])
def test_the_sets_together_are_larger_than_twice_the_cache(gpu, footprint):
    sets = GpuClock(gpu, print).sets([footprint + 7, footprint])
    assert sets >= 2
    assert sets * footprint > 2 * gpu.l2_bytes
    assert sets == 2 or (sets - 1) * footprint <= 2 * gpu.l2_bytes


@pytest.mark.parametrize(("sets", "passes"), [(2, 4), (16, 4), (17, 4), (22, 3), (63, 2), (64, 1), (500, 1)])
def test_a_graph_holds_enough_calls_to_be_timed_and_no_more(sets, passes):
    assert Calls([print] * sets).passes == passes


def test_device_and_host_are_told_apart(gpu):
    calls = Calls([lambda: gpu.kernel(2e-6), lambda: gpu.kernel(4e-6)])  # 3 us a call, of 30 us on the host
    said = []
    taken = GpuClock(gpu, said.append).take("pgd_step", {"native": calls}, rounds=5)["native"]
    assert taken.seconds.p20 == taken.seconds.p80 == pytest.approx(3e-6)
    assert taken.figures == {"device_us": pytest.approx(3), "host_us": pytest.approx(30), "timed": "graph"}
    assert not said


def test_a_graph_goes_over_all_sets_in_turn_and_only_it_is_timed(gpu):
    made = []

    def call(number):
        made.append(number)
        gpu.kernel(1e-6)

    calls = Calls([lambda: call(0), lambda: call(1), lambda: call(2)], before=lambda: made.append("before"))
    GpuClock(gpu, print).take("case", {"native": calls}, rounds=7)
    assert made[:4] == ["before", 0, 1, 2]  # the warm-up
    assert made[4:44] == ([0, 1, 2] * 14)[:40]  # the host's time
    assert made[44:] == ["before", 0, 1, 2] * 4  # the recording
    assert gpu.log[gpu.log.index("record") :] == ["record", *["replay"] * 8, "free"]


def test_the_host_never_waits_behind_a_full_queue(gpu):
    GpuClock(gpu, print).take("case", {"native": Calls([lambda: gpu.log.append("call")] * 2)}, rounds=1)
    calls = gpu.log[gpu.log.index("wait") : gpu.log.index("record")]
    assert calls == ["wait", *["call"] * clocks.BURST] * (clocks.HOST_CALLS // clocks.BURST) + ["wait"]


def test_what_cannot_be_captured_is_timed_by_events_and_told(gpu):
    def waits():
        gpu.kernel(6e-6)
        gpu.synchronise()

    said = []
    candidates = {"native": Calls([lambda: gpu.kernel(2e-6)] * 3), "eager": Calls([waits] * 3)}
    taken = GpuClock(gpu, said.append).take("pgd_step L2", candidates, rounds=3)
    assert [one.figures["timed"] for one in taken.values()] == ["graph", "events"]
    assert taken["eager"].seconds.p50 == pytest.approx(6e-6)
    assert taken["eager"].figures["host_us"] == pytest.approx(1030)
    assert taken["native"].seconds.p50 == pytest.approx(2e-6)
    assert said == [
        "pgd_step L2, eager: timed by events around eager calls, because a CUDA graph cannot record them: "
        "operation not permitted when stream is capturing"
    ]


def test_an_error_outside_of_the_capture_is_an_error(gpu):
    def broken():
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        GpuClock(gpu, print).take("case", {"native": Calls([broken])}, rounds=1)


def test_graphs_are_gone_before_their_memory_is_given_back(gpu, monkeypatch):
    held, alive = [], []
    record = gpu.record

    def noted(work):
        graph = record(work)
        held.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(gpu, "record", noted)
    monkeypatch.setattr(gpu, "free", lambda: (gc.collect(), alive.extend(one() for one in held)))
    GpuClock(gpu, print).take("case", {name: Calls([lambda: gpu.kernel(1e-6)] * 2) for name in "ab"}, rounds=2)
    assert alive == [None, None]


def test_results_of_a_pass_do_not_share_memory():
    places = [result.data_ptr() for result in Calls([lambda: torch.ones(100)] * 5).once()]
    assert len(set(places)) == 5


def test_the_cpu_takes_one_set_and_calls_it_as_it_is():
    made = []
    timer = CpuClock(warmup=2)
    assert timer.sets(made.append(size) or size for size in (1, 2)) == 1
    assert not made, "works are not built to be weighed"
    calls = {"a": Calls([lambda: made.append("a")]), "b": Calls([lambda: made.append("b")], lambda: made.append("0"))}
    taken = timer.take("case", calls, rounds=3)
    assert (made.count("a"), made.count("b"), made.count("0")) == (5, 5, 5)
    assert all(not found.figures and found.seconds.p50 > 0 for found in taken.values())
    assert timer.measured == {}


def test_every_round_has_each_candidate_once_in_an_order_of_its_own():
    order = []
    names = {"a": lambda: "a", "b": lambda: "b", "c": lambda: "c"}

    def clock(call):
        order.append(call())
        position = len(order)
        return lambda: position

    taken = in_turn(names, 20, clock)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1
    assert all(order[position - 1] == name for name, positions in taken.items() for position in positions)


def test_shares_of_the_copys_rate(gpu):
    measured = GpuClock(gpu, print).measured
    assert measured == {"copy_gigabytes_per_second": pytest.approx(2000)}
    assert share_of_copy(10**6, 1e-6, measured) == {"share_of_copy": pytest.approx(0.5)}
    assert share_of_copy(None, 1e-6, measured) == {"share_of_copy": None}
    assert share_of_copy(10**6, 1e-6, {}) == {}


@pytest.mark.parametrize(("l2", "size"), [(50 * 2**20, 256 * 2**20), (60 * 2**20, 256 * 2**20), (2**27, 2**29)])
def test_the_copy_is_larger_than_any_cache(l2, size):
    assert copied_bytes(l2) == size


def test_recordings_are_graphs_of_the_device(tape, monkeypatch):
    """On the CPU with a tape: what is returned runs the work again, and a wait for the device is a RuntimeError."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    monkeypatch.setattr(device_clock, "Graph", lambda _: tape.Tape())
    made, count = Gpu(torch.device("cpu")), torch.zeros(())
    assert GpuClock.sets(SimpleNamespace(gpu=made), [3 * 2**20]) == 34
    replay = made.record(Calls([lambda: count.add_(1)] * 2).all_passes)
    assert count == 0
    replay()
    assert count == 8
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        made.record(lambda: count.item())


# --- On a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timer(cuda):
    return GpuClock(Gpu(cuda), print)


@pytest.mark.gpu
def test_a_captured_graph_tells_the_devices_time_of_a_step(cuda, timer):
    sets = next(kernels.several(kernels.OPS["pgd_step"], "cifar", cuda, timer))
    found = kernels.case(sets, ("eager",), 20, timer, print)
    native, eager, floor = (found.candidates[name].figures for name in ("native", "eager", "floor"))
    assert {one["timed"] for one in (native, eager, floor)} == {"graph"}
    assert 0 < native["device_us"] < native["host_us"] / 2
    assert 0 < native["share_of_copy"] < 1.3
    assert 0 < floor["share_of_copy"] < 1.3
    assert len(sets) * sets[0].footprint > 2 * timer.gpu.l2_bytes


@pytest.mark.gpu
def test_on_the_device_what_waits_is_timed_by_events(cuda, timer, capsys):
    x = torch.rand(1000, device=cuda)
    taken = timer.take("sums", {"waits": Calls([lambda: x.sum().item()] * 2), "goes on": Calls([x.sum] * 2)}, rounds=3)
    assert {name: one.figures["timed"] for name, one in taken.items()} == {"waits": "events", "goes on": "graph"}
    assert capsys.readouterr().out.startswith("sums, waits: timed by events around eager calls, because a CUDA graph")
    torch.rand(1, device=cuda)  # the failed capture left nothing behind


@pytest.mark.gpu
def test_the_graphs_memory_is_given_back(cuda, timer):
    x = torch.rand(2**20, device=cuda)
    calls = {"doubled": Calls([lambda: x * 2] * 2)}
    timer.take("case", calls, rounds=2)
    before = torch.cuda.memory_reserved(cuda)
    for _ in range(3):
        timer.take("case", calls, rounds=2)
    assert torch.cuda.memory_reserved(cuda) <= before


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernels.OPS)
def test_every_kernel_can_be_captured(name, cuda, timer):
    for sets in kernels.several(kernels.OPS[name], "cifar", cuda, timer):
        found = kernels.case(sets, ("eager",), 3, timer, print)
        assert found.candidates["native"].figures["timed"] == "graph", sets[0].name


@pytest.mark.gpu
def test_the_copys_rate_is_one_that_a_gpu_has(timer):
    assert 50 < timer.measured[clocks.COPY_RATE] < 20_000
    assert device_clock.LEAST_COPIED >= 256 * 2**20
