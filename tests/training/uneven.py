"""What the processes of `test_failing_processes.py` run under torchrun: one trainer, and one thing that goes wrong."""

import atexit
import importlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from afd import processes, runtime
from afd.attacks import PGDSettings
from afd.methods import AFD, Natural
from afd.training import Trainer

COUNT, BATCH = 48, 4
X = torch.rand(COUNT, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(COUNT) % 3
DATA = TensorDataset(X, Y)
MODELS = []
GAME = AFD(hidden=8, attack=PGDSettings(eps=0.1, alpha=2 / 255, steps=1), validation_attack=None)


class Served(list):
    """Batches of which one, or all from there on, are other than their number says."""

    def __init__(self, count, at=None, act=None):
        super().__init__([(X[:BATCH], Y[:BATCH])] * count)
        self.at, self.act = at, act

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == self.at:
                if self.act is None:
                    return
                self.act()
            yield batch


class Lazy:
    """As a loader whose batches are not looked at before they are needed."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Noisy(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return (0.9 * X[index] + 0.1 * torch.rand(())), Y[index]


def network():
    torch.manual_seed(0)
    MODELS.append(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)))
    return MODELS[-1]


def trainer(method=None, **settings):
    return Trainer(network(), method or GAME, **settings)


def fails():
    raise OSError("the disk is gone")


def dies():
    os.kill(os.getpid(), signal.SIGKILL)


@torch.no_grad()
def spoils():
    for weight in MODELS[-1].parameters():
        weight.fill_(torch.nan)


def sampled(**settings):
    return DataLoader(Noisy(), BATCH, sampler=DistributedSampler(DATA), **settings)


WRONG = {  # what process 1 has to train and validate on; process 0 has six batches of each
    "fewer to train": (lambda: Served(5), lambda: Served(6)),
    "fewer to validate": (lambda: Served(6), lambda: Served(5)),
    "none to train": (lambda: Served(0), lambda: Served(6)),
    "none to validate": (lambda: Served(6), lambda: Served(0)),
    "raises at once": (lambda: Lazy(Served(6, 0, fails)), lambda: Served(6)),
    "fewer than it says": (lambda: Lazy(Served(6, 4)), lambda: Served(6)),
    "raises in mid-epoch": (lambda: Lazy(Served(6, 4, fails)), lambda: Served(6)),
    "killed": (lambda: Lazy(Served(6, 4, dies)), lambda: Served(6)),
    "raises in validation": (lambda: Served(6), lambda: Lazy(Served(6, 4, fails))),
    "not a number": (lambda: Lazy(Served(6, 4, spoils)), lambda: Served(6)),
}


def goes_wrong(what):
    group = runtime.join()
    loaders = [make() for make in WRONG[what]] if group.rank == 1 else [Served(6), Served(6)]
    method = Natural() if what == "not a number" else GAME
    trainer(method, epochs=2, log_every=2).fit(*loaders)


def group_is_gone():
    """Threads of a group that outlive it may abort the process, now and then only (see `afd.processes`)."""
    left = [name for task in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := task.read_text().strip())]
    if left:
        print(f"outlive the group: {left}", file=sys.stderr, flush=True)
        os._exit(9)


def ends_well(how):
    """Ends as `how` says, after training that went well."""
    sys.setswitchinterval(1000.0)  # other threads get the interpreter only where this one waits for something
    if how == "joined by itself":  # before anybody asks afd; torch's collectives then know the group as their default
        torch.distributed.init_process_group("gloo")
        importlib.import_module("torch.distributed.nn.functional")
    atexit.register(group_is_gone)
    runtime.join()
    if how == "several trainers":
        for method in (GAME, Natural()):
            trainer(method).fit(sampled(), DataLoader(DATA, 8))
    elif how == "a model in DistributedDataParallel":
        other = DistributedDataParallel(network())
        other(X).sum().backward()
        Trainer(DistributedDataParallel(network()), Natural()).fit(sampled(), DataLoader(DATA, 8))
    else:
        lasting = {"num_workers": 1, "persistent_workers": True} if how == "lasting workers" else {}
        sys.kept = trainer()  # a module that lasts as long as the interpreter
        sys.kept.fit(sampled(**lasting), DataLoader(DATA, 8))
    torch.distributed.all_reduce(torch.ones(1))
    if how == "leave()":
        processes.leave()
        group_is_gone()
    if how == "an error":
        raise ValueError("the script's own")
    if how == "its own status":
        sys.exit(3)


def goes_on(folder, stop_after):
    """Trains on a DataLoader with everything that draws, or stops after that step."""
    group = runtime.join()
    torch.manual_seed(group.rank)
    run = trainer(epochs=3, folder=Path(folder), resume="auto", log_every=1)
    run.callbacks = [lambda report: run.stop() if report.global_step == stop_after else None]
    generator = torch.Generator().manual_seed(group.rank)
    run.fit(sampled(num_workers=1, persistent_workers=True, generator=generator), DataLoader(DATA, 8))


def is_signalled(folder):
    """Rank 1's torchrun is told to end while it trains; never ends by itself."""
    runtime.join()
    run = trainer(epochs=10_000, folder=Path(folder), resume="auto", log_every=1)
    begun = Path(folder) / "begun"
    run.callbacks = [lambda report: begun.touch() if report.global_step == 3 else None]
    run.fit(sampled(), DataLoader(DATA, 8))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    if what == "on":
        goes_on(arguments[0], int(arguments[1]))
    else:
        {"wrong": goes_wrong, "well": ends_well, "signalled": is_signalled}[what](*arguments)
