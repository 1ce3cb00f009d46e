"""Two processes with a CPU's gloo: the same training as one process on the joint batch, and what survives a kill."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from afd.errors import InputError
from afd.methods import Execution, Natural
from afd.nn import FeatureClassifier
from afd.training import Trainer, load_checkpoint

SCRIPT = Path(__file__).with_name("joint.py")
joint = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("joint", SCRIPT))
spec.loader.exec_module(joint)


def torchrun(*arguments, restarts=0):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
    path = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])  # for the toys
    return subprocess.run(
        [sys.executable, *command, str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    ran = torchrun(out, "--methods", *joint.METHODS)
    assert ran.returncode == 0, ran.stderr
    return out


@pytest.mark.parametrize("method", joint.METHODS)
def test_two_processes_train_as_one_does_on_the_joint_batch(method, two_processes, tmp_path):
    alone = joint.run(method, tmp_path, epochs=2)
    state, metadata = load_checkpoint(two_processes / method / "last.pt")
    expected, _ = load_checkpoint(tmp_path / "last.pt")
    torch.testing.assert_close(state["model"], expected["model"], rtol=0, atol=1e-5)
    torch.testing.assert_close(state["players"], expected["players"], rtol=0, atol=1e-5)
    start = joint.model(unused=method == "alternating").state_dict()
    assert any((state["model"][name] - start[name]).abs().max() > 1e-3 for name in start)
    for ours, one in zip(metadata["history"], alone.history, strict=True):
        assert ours["losses"] == pytest.approx(one.losses, abs=1e-5)
        assert (ours["natural"], ours["robust"]) == (one.natural, one.robust)


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_training_goes_on(tmp_path):
    whole = torchrun(tmp_path / "whole", "--methods", "joint", "--epochs", "4", "--resume", "auto")
    killed = torchrun(
        tmp_path / "killed", "--methods", "joint", "--epochs", "4", "--resume", "auto", "--kill-at", "8", restarts=1
    )
    assert whole.returncode == killed.returncode == 0, killed.stderr
    assert "SIGKILL" in killed.stderr or "-9" in killed.stderr
    ends = [load_checkpoint(tmp_path / name / "joint" / "last.pt") for name in ("whole", "killed")]
    torch.testing.assert_close(ends[0][0]["model"], ends[1][0]["model"], rtol=0, atol=0)
    assert ends[0][1]["position"] == ends[1][1]["position"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_round(tmp_path):
    """In step 7, of three an epoch: the processes agree to stop one step later."""
    stopped = torchrun(tmp_path, "--methods", "joint", "--epochs", "4", "--kill-at", "6", "--send", "SIGTERM")
    assert stopped.returncode != 0
    assert "StoppedError: SIGTERM: stopped in epoch 3 after step 8; saved" in stopped.stderr
    assert load_checkpoint(tmp_path / "joint" / "last.pt")[1]["position"] == {"epoch": 3, "batch": 2, "global_step": 8}


@pytest.mark.slow
def test_each_process_goes_on_with_what_it_remembers(tmp_path):
    """Stopped in the second or third of the steps on a batch, of nine an epoch."""
    whole = torchrun(tmp_path / "whole", "--methods", "remembers", "--epochs", "2")
    stopped = torchrun(tmp_path / "part", "--methods", "remembers", "--kill-at", "12", "--send", "SIGTERM")
    assert whole.returncode == 0, whole.stderr
    position = load_checkpoint(tmp_path / "part" / "remembers" / "last.pt")[1]["position"]
    assert position["global_step"] % 3, stopped.stderr
    resumed = torchrun(tmp_path / "part", "--methods", "remembers", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    ends = [load_checkpoint(tmp_path / name / "remembers" / "last.pt")[0] for name in ("whole", "part")]
    torch.testing.assert_close(ends[0]["model"], ends[1]["model"], rtol=0, atol=0)
    memories = [[one["delta"] for one in end["memory"]] for end in ends]
    assert len(memories[0]) == 2
    assert not torch.equal(*memories[0])
    assert all(map(torch.equal, *memories))


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "afd", "train"]
    settings = ["--epochs", "2", "--width", "4", "--attack-steps", "2", "--out", str(tmp_path)]
    ran = subprocess.run([sys.executable, *command, *settings], capture_output=True, text=True, check=True)
    assert ran.stdout.count("1/2") == 1  # one process talks
    assert (tmp_path / "model.pt").is_file()
    assert load_checkpoint(tmp_path / "last.pt")[1]["run"]["processes"] == 2


def test_synchronised_batchnorm_needs_cuda():
    network = FeatureClassifier(torch.nn.Flatten(), 4, 2)
    with pytest.raises(InputError, match="sync_batchnorm is True, but the model is on cpu"):
        Trainer(network, Natural(), execution=Execution(sync_batchnorm=True))
