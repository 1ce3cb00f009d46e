"""An evaluation that is killed, stopped or out of room, at any moment, and the same command again: the same results."""

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
from afd.evaluation import results as files
from afd.training.checkpoint import save_checkpoint

# starts evaluations as children of a process that has imported everything, so that a kill hits the work itself
SERVER = """
import os, signal, sys, traceback
import matplotlib.figure, afd.cli, afd.evaluation.protocols, afd.data
import torch
torch.set_num_threads(1)
afd.evaluation.protocols.installed = lambda _: False
afd.data.load("digits")
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
            os.kill(
                child, kill
            )  # a child that has ended is a zombie until the server waits for it, or its number unused
        return int(self.process.stdout.readline()), self.log.read_text(errors="replace")


@pytest.fixture
def evaluations(tmp_path, robust):
    network = {"recipe": afd.nn.build.recipe_of(robust), "normalize": True}
    metadata = {"network": network, "config": {"data": {"name": "digits"}, "attack": {"eps": 0.15}}}
    save_checkpoint(tmp_path / "net.pt", {"model": robust.state_dict()}, metadata)
    server = Evaluations(tmp_path)
    yield server
    server.process.stdin.close()
    server.process.wait()


WORDS = ("net.pt", "--images", "60", "--batch-size", "15", "--eps", "0.1", "0.15")


def told(folder):
    """Results, but for times."""
    found = files.read(folder)
    return json.dumps({**found, "attacks": [{**attack, "seconds": 0} for attack in found["attacks"]]})


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def check_kills(evaluations, folder, out, rounds, seed, wanted, duration):
    """Ends evaluations at random moments, each again and again until the same command has finished it."""
    generator, kinds, ended = random.Random(seed), [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 0
    while ended < rounds:
        kill = kinds[ended % 3]
        status, said = evaluations.run(*WORDS, *out(ended), kill=kill, after=generator.uniform(0.0, 1.05 * duration))
        finished = status == 0
        if not finished:
            ended += 1
            assert status in (-kill, 128 + kill), (status, said)
            assert "Traceback" not in said
            if status == 128 + kill:
                line = said.strip().splitlines()[-1]
                assert line.startswith((f"afd: {kill.name}: ", "afd: interrupted"))
                assert "the same command" in line or "report is written" in line or "interrupted" in line
        if ended % 4 == 0 or finished:
            status, said = (0, said) if finished else evaluations.run(*WORDS, *out(ended))
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
    check_kills(evaluations, tmp_path, lambda ended: ("--out", f"out{ended // 4}"), 4, 1, *whole)


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [True, False])
def test_an_evaluation_killed_at_many_moments_goes_on_to_the_same_results(evaluations, whole, tmp_path, numbered):
    out = (lambda _: ()) if numbered else (lambda ended: ("--out", f"out{ended // 4}"))
    check_kills(evaluations, tmp_path, out, 24, 2, *whole)


WRITES = ("run.json", "pgd-20.0.0.pt", "examples.png", "curves.png", "report.html", "results.json")


@pytest.mark.parametrize("at", WRITES)
@pytest.mark.parametrize("how", ["killed before", "killed after", "disk full"])
def test_whatever_file_is_written_last_the_same_command_ends_the_same(at, how, cheaply, tmp_path):
    cheaply("whole")
    with pytest.MonkeyPatch.context() as patch:
        disturb(patch, at, how)
        with pytest.raises((Killed, files.AfdError)) as caught:
            cheaply("out")
    if how == "disk full":
        assert "No space left on device; what was computed before is kept, and the same command goes on" in str(
            caught.value
        )
        assert not list((tmp_path).rglob("*.part"))
    cheaply("out")
    assert told(tmp_path / "out") == told(tmp_path / "whole")
    assert left_in(tmp_path / "out") == left_in(tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but what a context manager does, which a kill would not do either."""


def disturb(patch, name, how):
    """Has the write of the first file of that name fail."""
    from afd import files as writing

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
    """evaluate() of a few images into a folder of that name."""
    from afd.evaluation import protocols
    from afd.evaluation.epsilon import Epsilon, ascending
    from afd.evaluation.evaluate import evaluate
    from afd.evaluation.subject import Subject

    few, eps = images.take(torch.arange(20)), Epsilon.of("0.15")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "installed", lambda _: False)
        protocol = protocols.named("quick", data="digits", norm="Linf", epsilons=ascending(["0.15"]), trained_at=eps)
        yield lambda out: evaluate(Subject("natural", "test", natural), few, protocol, tmp_path / out, batch_size=10)
