"""What makes a host wait is counted; what does not is not."""

import pytest
import torch

from afd.attacks import PGD
from afd.bench.host import HostReads

X, MASK = torch.arange(6.0), torch.arange(6) > 2


@pytest.mark.parametrize(
    "read",
    [
        lambda: X[0].item(),
        lambda: bool(MASK.any()),
        lambda: float(X.sum()),
        lambda: X[MASK],
        lambda: torch.masked_select(X, MASK),
        lambda: torch.nonzero(X),
        lambda: torch.where(MASK),
        lambda: X.clone().index_put_((MASK,), torch.tensor(1.0)),
        lambda: X.unique(),
        lambda: torch.equal(X, X),
        lambda: X.repeat_interleave(torch.tensor([1, 0, 1, 2, 1, 1])),
    ],
)
def test_reads(read):
    with HostReads() as reads:
        read()
        read()
    assert reads.count == 2


@pytest.mark.parametrize(
    "work",
    [
        lambda: X + 1,
        lambda: torch.where(MASK, X, 0.0),
        lambda: X[torch.tensor([1, 2])],
        lambda: X.clone().index_put_((torch.tensor([1]),), torch.tensor(1.0)),
        lambda: X.to(torch.float64),
        lambda: X.clone().copy_(X),
        lambda: X.repeat_interleave(torch.tensor([2] * 6), output_size=12),
    ],
)
def test_what_is_no_read(work):
    with HostReads() as reads:
        work()
    assert reads.count == 0


@pytest.mark.parametrize("copy", [lambda x: x.to("cpu"), lambda x: torch.empty(3).copy_(x)])
def test_copies_to_the_host(copy):
    elsewhere = torch.empty(3, device="meta")  # stands for a GPU: a device that is not the host
    with HostReads() as reads, pytest.raises(NotImplementedError, match="no data"):
        copy(elsewhere)
    assert reads.count == 1


def test_a_backward_pass_is_seen():
    class Peeking(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 2

        @staticmethod
        def backward(_ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(2, requires_grad=True)
    with HostReads() as reads:
        Peeking.apply(x).sum().backward()
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
