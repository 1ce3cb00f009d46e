"""An evaluation that is killed, stopped or out of room, at any moment, and the same command again: the same results."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import afd.nn
from afd import files as writing
from afd.checkpoint import save_checkpoint
from afd.errors import AfdError
from afd.evaluation import protocol as protocols
from afd.evaluation.attacks import Epsilon, Stage
from afd.evaluation.folder import evaluate_to_folder
from afd.evaluation.model import Model
from afd.evaluation.outcome import read_results
from afd.evaluation.protocol import Protocol

# starts evaluations as children of a process that has imported everything, so that a kill hits the work itself
SERVER = """
import dataclasses, os, signal, sys, traceback
import matplotlib.figure, afd.cli, afd.evaluation.command, afd.evaluation.protocol, afd.data
import torch
torch.set_num_threads(1)
afd.data.load("digits")
named = afd.evaluation.command.named
def quicker(*arguments, **options):
    found = named(*arguments, **options)
    fewer = lambda stage: {key: min(value, 20) for key, value in stage.settings.items()}
    stages = (dataclasses.replace(stage, settings=fewer(stage)) for stage in found.stages)
    return dataclasses.replace(found, stages=tuple(stages))
afd.evaluation.command.named = quicker
print("ready", flush=True)
for line in sys.stdin:
    log, *words = line.split()
    child = os.fork()
    if not child:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        try:
            status = afd.cli.main(words)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        os._exit(status)
    print(child, flush=True)
    sys.stdin.readline()  # a number that nobody waits for yet is no other process's
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Evaluations:
    """Runs `afd evaluate` in a folder, and may end it early."""

    def __init__(self, folder):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(afd.__file__).parents[1])}
        self.log = folder / "said.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, *words, kill=None, after=0.0):
        """Status and output of a run, to which a signal was sent after so many seconds."""
        self.process.stdin.write(" ".join((str(self.log), "evaluate", *map(str, words))) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill is not None:
            time.sleep(after)
            os.kill(child, kill)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.log.read_text(errors="replace")


@pytest.fixture
def evaluations(tmp_path, natural):
    network = {"recipe": afd.nn.networks.recipe_of(natural), "normalize": True}
    metadata = {"network": network, "config": {"data": {"name": "digits"}, "test": {"eps": 0.15}}}
    save_checkpoint(tmp_path / "net.pt", {"model": natural.state_dict()}, metadata)
    server = Evaluations(tmp_path)
    yield server
    server.process.stdin.close()
    server.process.wait()


WORDS = ("net.pt", "--images", "40", "--batch-size", "10", "--eps", "0.05", "0.1")


def told(folder):
    """Results, but for times."""
    found = read_results(folder)
    return json.dumps({**found, "attacks": [{**attack, "seconds": 0} for attack in found["attacks"]]})


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def check_kills(evaluations, folder, out, rounds, seed, wanted, duration):
    """Ends evaluations at random moments, each until one signal of every kind was sent, and then finishes it."""
    generator = random.Random(seed)
    for number in range(rounds):
        for kill in generator.sample([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 3):
            status, said = evaluations.run(*WORDS, *out(number), kill=kill, after=generator.uniform(0.0, duration))
            if status == 0:
                break
            assert status in (-kill, 128 + kill), (status, said)
            assert "Traceback" not in said
            if status == 128 + kill:
                line = said.strip().splitlines()[-1]
                assert line.startswith((f"afd: {kill.name}: ", "afd: interrupted"))  # the second before it has begun
                assert "the same command" in line or "report is written" in line or "interrupted" in line
        else:
            status, said = evaluations.run(*WORDS, *out(number))
        assert status == 0, said
        report = next(line for line in said.splitlines() if line.endswith("report.html written"))
        at = folder / report.removesuffix("/report.html written")
        assert told(at) == wanted
        assert left_in(at) == ["curves.png", "examples.png", "report.html", "results.json"]


@pytest.fixture
def whole(evaluations, tmp_path):
    """What the command finds that nothing disturbs, and how long it takes."""
    started = time.perf_counter()
    status, said = evaluations.run(*WORDS, "--out", "whole")
    assert status == 0, said
    return told(tmp_path / "whole"), time.perf_counter() - started


def test_a_killed_evaluation_goes_on_to_the_same_results(evaluations, whole, tmp_path):
    check_kills(evaluations, tmp_path, lambda number: ("--out", f"out{number}"), 1, 1, *whole)


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [True, False])
def test_an_evaluation_killed_at_many_moments_goes_on_to_the_same_results(evaluations, whole, tmp_path, numbered):
    out = (lambda _: ()) if numbered else (lambda number: ("--out", f"out{number}"))
    check_kills(evaluations, tmp_path, out, 8, 2, *whole)


WHOLE = {}  # what an evaluation finds that nothing disturbs
WRITES = ("run.json", "pgd-20.0.0.pt", "examples.png", "curves.png", "report.html", "results.json")


@pytest.mark.parametrize("at", WRITES)
@pytest.mark.parametrize("how", ["killed before", "killed after", "disk full"])
def test_whatever_file_is_written_last_the_same_command_ends_the_same(at, how, cheaply, tmp_path):
    if not WHOLE:
        cheaply("whole")
        WHOLE.update(told=told(tmp_path / "whole"), names=left_in(tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, at, how)
        with pytest.raises((Killed, AfdError)) as caught:
            cheaply("out")
    if how == "disk full":
        assert "No space left on device; what was computed before is kept, and the same command goes on" in str(
            caught.value
        )
        assert not list((tmp_path).rglob("*.part"))
    cheaply("out")
    assert told(tmp_path / "out") == WHOLE["told"]
    assert left_in(tmp_path / "out") == WHOLE["names"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what a context manager does, which a kill would not do either."""


def disturb(patch, name, how):
    """Has the write of the first file of that name fail."""
    real = os.replace, os.fsync

    def replace(self, target):
        if how == "killed before" and Path(target).name == name:
            raise Killed
        real[0](self, target)
        if how == "killed after" and Path(target).name == name:
            raise Killed

    def fsync(descriptor):
        if how == "disk full" and Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(f".{name}."):
            raise OSError(28, "No space left on device")
        real[1](descriptor)

    patch.setattr(Path, "replace", replace)
    patch.setattr(writing.os, "fsync", fsync)


@pytest.fixture
def cheaply(tmp_path, natural, images):
    """evaluate_to_folder() of a few images into a folder of that name."""
    eps = Epsilon.of("0.15")
    few, score = images.take(torch.arange(10)), Stage("pgd-20", "pgd", "Linf", (eps,), {"steps": 2})
    probes = (stage for stage in protocols.probes("Linf", eps) if stage.attack != "square")
    quick = (dataclasses.replace(stage, settings=dict.fromkeys(stage.settings, 1)) for stage in probes)
    protocol = Protocol("quick", "Linf", eps, (score, *quick))
    model = Model("natural", "test", natural)
    return lambda out: evaluate_to_folder(model, few, protocol, tmp_path / out, batch_size=10)
