"""SIGKILL at random moments of training and of saving: what is gone on with ends as what nobody disturbed.

A process is forked from one that has imported afd already, so that most kills meet training, not imports.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from afd.training import load_checkpoint

COMMAND = [
    "train", "--epochs", "4", "--width", "2", "--attack-steps", "1", "--eval-steps", "1", "--batch-size", "256",
    "--save-every", "2", "--log-every", "2", "--ema", "0.9",
]  # fmt: skip
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["afd.cli", "afd.experiments.train"])


def run(out, kill_at_step=None):
    """One process: `afd train --resume auto` to its end, or killed at its n-th step of writing a file."""
    from afd import cli
    from afd.experiments import train

    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  (for as long as the process lives)
    train.TEST_STEPS = 1
    if kill_at_step is not None:
        _die_in_writing(kill_at_step)
    sys.exit(cli.main([*COMMAND, "--resume", "auto", "--out", str(out)]))


def _die_in_writing(number):
    """Kills this process at its n-th call of what puts bytes or names on a disk."""
    left = iter(range(number, -1, -1))

    def dying(real):
        def call(*arguments, **settings):
            if next(left, 0) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **settings)

        return call

    os.fsync, os.link = dying(os.fsync), dying(os.link)
    Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)


def ended(*arguments, kill_after=None):
    """The exit status of a process, killed after so many seconds if it has not ended by then."""
    process = FORKED.Process(target=run, args=arguments)
    process.start()
    process.join(kill_after)
    if process.exitcode is None:
        process.kill()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert ended(out) == 0
    started = time.perf_counter()
    assert ended(out.with_name("timed")) == 0
    return out, time.perf_counter() - started


def contents(out):
    """All that a run leaves, without what a clock says."""
    states = {}
    for name in ("last.pt", "best.pt"):
        state, metadata = load_checkpoint(out / name)
        state["generators"] = [at["now"]["torch"] for at in state["generators"]]
        history = [{**report, "images_per_second": 0} for report in metadata["history"]]
        states[name] = (state, history, metadata["position"], metadata["losses"]["sums"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return states, torch.load(out / "model.pt"), [{**line, "images_per_second": 0} for line in log]


def assert_equal(left, right, where=""):
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_equal(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}.{number}")
    else:
        assert left == right, where


def assert_undisturbed(out, undisturbed):
    assert_equal(contents(out), contents(undisturbed))
    assert sorted(path.name for path in out.iterdir() if "tfevents" not in path.name) == [
        "best.pt", "curves.png", "last.pt", "log.jsonl", "model.pt", "previous.pt", "result.json", "run.toml",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_killed_at_random_moments_again_and_again(seed, undisturbed, tmp_path):
    """Five kills of one run: a hundred in all with the test below, and with `-m slow`."""
    whole, seconds = undisturbed
    draw, kills = random.Random(seed), 0
    for _ in range(5):
        kills += ended(tmp_path, kill_after=draw.uniform(0, seconds)) == -signal.SIGKILL
    assert kills >= 1
    assert ended(tmp_path) == 0
    assert_undisturbed(tmp_path, whole)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_killed_while_it_writes_again_and_again(seed, undisturbed, tmp_path):
    whole, _ = undisturbed
    draw = random.Random(100 + seed)
    for _ in range(5):
        assert ended(tmp_path, draw.randrange(40)) in (-signal.SIGKILL, 0)
    assert ended(tmp_path) == 0
    assert_undisturbed(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_workers_of_torchrun_killed_and_started_anew(seed, tmp_path):
    """torchrun starts all workers again when one is killed; the run ends as one that nobody disturbed."""
    draw = random.Random(seed)

    def torchrun(out, kill):
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", "-m", "afd"]
        words += [*COMMAND, "--resume", "auto", "--out", str(out)]
        agent = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while kill and not (out / "last.pt").exists() and agent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if kill:
            time.sleep(draw.uniform(0, 1))
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            if children:
                os.kill(int(draw.choice(children)), signal.SIGKILL)
        _, said = agent.communicate(timeout=300)
        assert agent.returncode == 0, said

    torchrun(tmp_path / "whole", kill=False)
    torchrun(tmp_path / "killed", kill=True)
    assert_undisturbed(tmp_path / "killed", tmp_path / "whole")
