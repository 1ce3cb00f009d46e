"""What a meter says: device time by graph and host time apart, memory, host reads, FLOPs by hand."""

import gc
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from afd import passes
from afd.attacks import PGD
from afd.bench import kernels, metering
from afd.bench.metering import Calls, CpuClock, GpuClock, HostReads, Product, in_turn, peak_bytes
from afd.bench.op_cases import OPS, timed
from afd.errors import out_of_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("footprint", [1, 3, 499, 500, 999, 1000, 1001, 5000])
def test_the_sets_together_are_larger_than_twice_the_cache(gpu, footprint):
    sets = gpu.sets(footprint)
    assert sets >= 2
    assert sets * footprint > 2 * gpu.l2_bytes
    assert sets == 2 or (sets - 1) * footprint <= 2 * gpu.l2_bytes


@pytest.mark.parametrize(("sets", "passes"), [(2, 4), (16, 4), (17, 4), (22, 3), (63, 2), (64, 1), (500, 1)])
def test_a_graph_holds_enough_calls_to_be_timed_and_no_more(sets, passes):
    assert Calls([print] * sets).passes == passes


def test_device_and_host_are_told_apart_of_all_sets_in_turn_and_only_replays_are_timed(gpu):
    made = []

    def call(number):
        made.append(number)
        gpu.kernel(number * 1e-6)

    calls = Calls([lambda: call(2), lambda: call(3), lambda: call(4)], before=lambda: made.append("before"))
    taken = gpu.take("case", {"native": calls}, 7)["native"]
    assert taken.seconds.p20 == taken.seconds.p80 == pytest.approx(3e-6)
    assert taken.figures == {"device_us": pytest.approx(3), "host_us": pytest.approx(30), "timed": "graph"}
    assert made[:4] == ["before", 2, 3, 4]  # the warm-up
    assert made[4:44] == ([2, 3, 4] * 14)[:40]  # the host's time
    assert made[44:] == ["before", 2, 3, 4] * 4  # the recording
    assert gpu.log[gpu.log.index("record") :] == ["record", *["replay"] * 8, "free"]
    assert not gpu.said


def test_the_host_never_waits_behind_a_full_queue(gpu):
    gpu.take("case", {"native": Calls([lambda: gpu.log.append("call")] * 2)}, 1)
    calls = gpu.log[gpu.log.index("wait") : gpu.log.index("record")]
    assert calls == ["wait", *["call"] * metering.BURST] * (metering.HOST_CALLS // metering.BURST) + ["wait"]


def test_what_cannot_be_captured_is_timed_by_events_and_told(gpu):
    def waits():
        gpu.kernel(6e-6)
        gpu.synchronise()

    taken = gpu.take("pgd_step L2", {"native": Calls([lambda: gpu.kernel(2e-6)] * 3), "eager": Calls([waits] * 3)}, 3)
    assert [one.figures["timed"] for one in taken.values()] == ["graph", "events"]
    assert [one.median for one in taken.values()] == pytest.approx([2e-6, 6e-6])
    assert taken["eager"].figures["host_us"] == pytest.approx(1030)
    why = "because a CUDA graph cannot record them: operation not permitted when stream is capturing"
    assert gpu.said == [f"pgd_step L2, eager: timed by events around eager calls, {why}"]
    with pytest.raises(ZeroDivisionError):  # outside of the capture
        gpu.take("case", {"native": Calls([lambda: 1 / 0])}, 1)


def test_graphs_are_gone_before_their_memory_is_given_back(gpu, monkeypatch):
    held, alive = [], []
    record = gpu.record

    def noted(work):
        graph = record(work)
        held.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(gpu, "record", noted)
    monkeypatch.setattr(gpu, "free", lambda: (gc.collect(), alive.extend(one() for one in held)))
    gpu.take("case", {name: Calls([lambda: gpu.kernel(1e-6)] * 2) for name in "ab"}, 2)
    assert alive == [None, None]


def test_results_of_a_pass_do_not_share_memory():
    assert len({result.data_ptr() for result in Calls([lambda: torch.ones(100)] * 5).once()}) == 5


def test_the_cpu_takes_one_set_and_calls_it_as_it_is():
    made = []
    timer = CpuClock(warmup=2)
    calls = {"a": Calls([lambda: made.append("a")]), "b": Calls([lambda: made.append("b")], lambda: made.append("0"))}
    taken = timer.take("case", calls, 3)
    assert (made.count("a"), made.count("b"), made.count("0")) == (5, 5, 5)
    assert all(not found.figures and found.seconds.p50 > 0 for found in taken.values())
    assert (timer.sets(1), timer.measured) == (1, {})


def test_every_repeat_has_each_candidate_once_in_an_order_of_its_own():
    order = []

    def clock(call):
        order.append(call())
        position = len(order)
        return lambda: position

    taken = in_turn({"a": lambda: "a", "b": lambda: "b", "c": lambda: "c"}, 20, clock)
    repeats = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in repeats)
    assert len(set(repeats)) > 1
    assert all(order[position - 1] == name for name, positions in taken.items() for position in positions)


def test_recordings_are_graphs_of_the_device_and_the_copy_is_larger_than_any_cache(tape, monkeypatch):
    """On the CPU, taken for a GPU whose graphs are tapes, and whose copies take a millisecond."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    monkeypatch.setattr(metering, "Graph", lambda _: tape.Tape())
    monkeypatch.setattr(GpuClock, "warm", lambda _self, _work: None)
    monkeypatch.setattr(GpuClock, "seconds", lambda _self, _work: lambda: 1e-3)
    h100, count = GpuClock(CPU, print), torch.zeros(())
    assert h100.measured == {metering.COPY_RATE: pytest.approx(2 * 256 * 2**20 / 1e-3 * 1e-9)}
    assert 4 * h100.l2_bytes < metering.LEAST_COPIED
    assert h100.sets(3 * 2**20) == 34
    replay = h100.record(Calls([lambda: count.add_(1)] * 2).all_passes)
    assert count == 0
    replay()
    assert count == 8
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        h100.record(lambda: count.item())
    h100.l2_bytes = 2**27
    assert h100.copy_rate() == pytest.approx(2 * 4 * 2**27 / 1e-3)


# --- Host reads ------------------------------------------------------------------------------------------------------

X, MASK, TWO = torch.arange(6.0), torch.arange(6) > 2, torch.tensor([1, 2])
READING = (
    lambda: X[0].item(), lambda: bool(MASK.any()), lambda: float(X.sum()), lambda: X[MASK],
    lambda: torch.masked_select(X, MASK), lambda: torch.nonzero(X), lambda: torch.where(MASK),
    lambda: X.clone().index_put_((MASK,), torch.tensor(1.0)), lambda: X.unique(), lambda: torch.equal(X, X),
    lambda: X.repeat_interleave(torch.tensor([1, 0, 1, 2, 1, 1])),
)  # fmt: skip
NOT_READING = (
    lambda: X + 1, lambda: torch.where(MASK, X, 0.0), lambda: X[TWO], lambda: X.to(torch.float64),
    lambda: X.clone().index_put_((TWO,), torch.tensor(1.0)), lambda: X.clone().copy_(X),
    lambda: X.repeat_interleave(torch.tensor([2] * 6), output_size=12),
)  # fmt: skip


@pytest.mark.parametrize(("reads", "work"), [*((2, work) for work in READING), *((0, work) for work in NOT_READING)])
def test_reads_of_two_calls(reads, work):
    with HostReads() as found:
        work()
        work()
    assert found.count == reads


@pytest.mark.parametrize("copy", [lambda x: x.to("cpu"), lambda x: torch.empty(3).copy_(x)])
def test_copies_to_the_host(copy):
    elsewhere = torch.empty(3, device="meta")  # stands for a GPU: a device that is not the host
    with HostReads() as reads, pytest.raises(NotImplementedError, match="no data"):
        copy(elsewhere)
    assert reads.count == 1


def test_a_backward_pass_is_seen():
    x = torch.ones(2, requires_grad=True)
    out = x * 2
    out.register_hook(lambda grad: grad * grad.sum().item())
    with HostReads() as reads:
        out.sum().backward()
    assert reads.count == 1


def test_the_reads_of_an_attack_do_not_grow_with_its_steps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    x, y = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])
    counts = []
    for steps in (2, 9):
        with HostReads() as reads:
            PGD(model, eps=0.1, alpha=0.02, steps=steps)(x, y)
        counts.append(reads.count)
    assert counts[0] == counts[1]


# --- Memory and arithmetic -------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_the_worst_moment(capfd):
    def call():
        first = torch.empty(1000)
        del first
        return torch.empty(2000), torch.empty(500)

    assert peak_bytes(call, CPU) == 4 * 2500
    assert capfd.readouterr().err == ""


def test_running_out_of_memory_is_recognised():
    said = "DefaultCPUAllocator: {} memory: you tried to allocate"
    errors = [RuntimeError(said.format(words)) for words in ("can't allocate", "not enough")]
    with pytest.raises(RuntimeError) as raised:  # the allocator says it as expected
        torch.empty(1 << 60)
    errors += [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), raised.value]
    assert all(map(out_of_memory, errors))
    others = RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("not enough memory of the past")
    assert not any(map(out_of_memory, others))


def test_flops_of_a_pass_are_those_of_forward_and_input_gradient():
    """The convolution has 10 products along a side of 4 pixels, 3 for each but the outermost, which have 2."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x, y = torch.rand(7, 3, 4, 4), torch.zeros(7, dtype=torch.long)
    forward = 2 * (8 * 3 * 10**2 + 8 * 16 * 5)  # a multiplication and an addition each
    assert passes.pass_flops(model, x, y) == 7 * 2 * forward
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert passes.pass_flops(model, x[:1], y[:1]) == 2 * forward


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, (5, 3), padding=(3, 0), stride=(2, 1), dilation=(1, 2), bias=False),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2, bias=False),
        nn.Conv2d(4, 6, 1, stride=2, bias=False),
        nn.ConvTranspose2d(4, 6, 3, padding=1, stride=2, output_padding=1, groups=2, bias=False),
    ],
)
def test_products_with_padding_are_not_counted(layer):
    """Of ones, a convolution sums up as many as it has products."""
    x = torch.ones(2, 4, 7, 9)
    nn.init.ones_(layer.weight)
    products = layer(x).sum().item()
    assert passes.pass_flops(nn.Sequential(layer, nn.Flatten()), x, torch.zeros(2, dtype=torch.long)) == 4 * products


@pytest.mark.parametrize(("rate", "sizes"), [(1e12, (1024, 2048)), (1e10, (512, 1024)), (1e6, (256,))])
def test_the_products_are_as_large_as_can_be_waited_for(rate, sizes, monkeypatch):
    """A product takes eight times as long as one half as large."""
    for form in ("square", "convolution"):
        monkeypatch.setattr(metering, form, made := lambda size, *_: Product(size.__int__, 2 * size**3))
        made.__name__ = form
    monkeypatch.setattr(metering, "_seconds", lambda call, _device: call() ** 3 / rate)
    found = metering.products("bf16", CPU)
    assert list(found) == [f"{form} bf16 {size}" for form in ("square", "convolution") for size in sizes]


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("form", [metering.square, metering.convolution])
def test_a_product_does_as_many_operations_as_it_says(form, kind):
    product = form(256, kind, CPU)
    with FlopCounterMode(display=False) as counter:
        made = product.call()
    assert counter.get_total_flops() == product.flops
    assert made.dtype == (torch.bfloat16 if kind == "bf16" else torch.float32)


@pytest.mark.parametrize(("channels", "side"), [(64, 32), (512, 4)])
def test_no_convolution_of_a_network_is_faster_than_the_products(channels, side, monkeypatch):
    """By the CPU's time, in one thread: 3x3, padded, as ResNet-18 has them, of few padded pixels and of many."""
    monkeypatch.setattr(metering.time, "perf_counter", time.process_time)
    monkeypatch.setitem(metering.SIZES, "cpu", 1024)
    model = nn.Conv2d(channels, channels, 3, padding=1, bias=False).requires_grad_(False)
    x = torch.rand(32, channels, side, side).contiguous(memory_format=torch.channels_last)
    forward = passes.pass_flops(nn.Sequential(model, nn.Flatten()), x, torch.zeros(32, dtype=torch.long)) / 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = metering.products("fp32", CPU)
        calls = {name: product.call for name, product in products.items()} | {"model": lambda: model(x)}
        times = metering.interleaved(calls, 9, 1, CPU)
    finally:
        torch.set_num_threads(threads)
    rate = max(product.flops / times[name].p50 for name, product in products.items())
    assert forward / times["model"].p50 <= 1.15 * rate


def test_tf32_is_as_it_was_afterwards():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    for allowed, precision in ((False, "highest"), (True, "high")):
        with metering.tf32(allowed):
            assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (allowed, precision)
        assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


# --- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timer(cuda):
    return GpuClock(cuda, print)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_every_kernel_is_captured_and_its_device_time_told(name, cuda, timer):
    for one in (one for one in timed("cifar") if one.op == name):
        found = kernels.case(one, cuda, ("eager",), 20 if name == "pgd_step" else 3, timer, print)
        native, eager, floor = (found.candidates[way].figures for way in ("native", "eager", "floor"))
        assert native["timed"] == "graph", one.name
        if name == "pgd_step":
            assert {figures["timed"] for figures in (native, eager, floor)} == {"graph"}
            assert 0 < native["device_us"] < native["host_us"] / 2
            assert 0 < native["share_of_copy"] < 1.3
            assert 0 < floor["share_of_copy"] < 1.3


@pytest.mark.gpu
def test_on_the_device_what_waits_is_timed_by_events(cuda, timer, capsys):
    x = torch.rand(1000, device=cuda)
    taken = timer.take("sums", {"waits": Calls([lambda: x.sum().item()] * 2), "goes on": Calls([x.sum] * 2)}, 3)
    assert {name: one.figures["timed"] for name, one in taken.items()} == {"waits": "events", "goes on": "graph"}
    assert capsys.readouterr().out.startswith("sums, waits: timed by events around eager calls, because a CUDA graph")
    torch.rand(1, device=cuda)  # the failed capture left nothing behind


@pytest.mark.gpu
def test_the_graphs_memory_is_given_back(cuda, timer):
    x = torch.rand(2**20, device=cuda)
    calls = {"doubled": Calls([lambda: x * 2] * 2)}
    timer.take("case", calls, 2)
    before = torch.cuda.memory_reserved(cuda)
    for _ in range(3):
        timer.take("case", calls, 2)
    assert torch.cuda.memory_reserved(cuda) <= before


@pytest.mark.gpu
def test_the_copys_rate_is_one_that_a_gpu_has(timer):
    assert 50 < timer.measured[metering.COPY_RATE] < 20_000
