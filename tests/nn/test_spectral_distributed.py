"""The discriminator under DistributedDataParallel: two processes over gloo against one."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from afd.nn import ProjectionDiscriminator

RANKS, STEPS, BATCH = 2, 50, 8


def discriminator():
    torch.manual_seed(0)
    return ProjectionDiscriminator(6, 4, hidden=5).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        z = torch.randn(2, BATCH, 6, generator=generator, dtype=torch.float64)
        yield z, torch.randint(4, (BATCH,), generator=generator)


def step(net, optimizer, z, y):
    """One update from two forwards in training mode, whose backwards come after both; returns the gradients."""
    scores = [net(part, y) for part in z]
    loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    return gradients


def on_rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    plain = discriminator()
    net = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    share = slice(rank * BATCH // RANKS, (rank + 1) * BATCH // RANKS)
    gradients = [step(net, optimizer, z[:, share], y[share]) for z, y in batches()]
    torch.save((gradients, dict(plain.state_dict())), f"{folder}/rank{rank}")
    distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """The processes run this file, so that they need no import of the test package."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment) for rank in range(RANKS)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0] * RANKS
    net = discriminator()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    want = [step(net, optimizer, z, y) for z, y in batches()]
    results = [torch.load(tmp_path / f"rank{rank}") for rank in range(RANKS)]
    for gradients, state in results:
        for round_, (got, expected) in enumerate(zip(gradients, want, strict=True)):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=f"round {round_}")
        for key, value in net.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9, msg=key)
    for key, value in results[0][1].items():
        if key.endswith((".u", ".v")):
            assert torch.equal(value, results[1][1][key]), key


if __name__ == "__main__":
    on_rank(int(sys.argv[1]), sys.argv[2])
