"""smoke: every op is among its cases, a wrong result or a failed launch is told, and the others still run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import smoke
import torch

from afd.bench.op_cases import Batch, OpCase, small
from afd.ops import native

ROOT = Path(__file__).parents[1]
OPS = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")} - {"runtime"}


def run(folder: Path) -> tuple[int, dict]:
    out = folder / "smoke.json"
    status = smoke.main(["--device", "cpu", "--out", str(out)])
    assert list(folder.iterdir()) == [out]
    return status, json.loads(out.read_text())


def failed(told: dict) -> set[str]:
    """The ops of the cases that failed."""
    return {name.split()[0] for name, case in told["cases"].items() if not case["ok"]}


def only(monkeypatch, *ops: str) -> None:
    monkeypatch.setattr(smoke, "small", lambda: (case for case in small() if case.name.startswith(ops)))


def test_every_op_agrees_with_the_reference(tmp_path, capsys):
    status, told = run(tmp_path)
    assert (status, failed(told), told["finished"], told["device"]) == (0, set(), True, "cpu")
    assert {name.split()[0] for name in told["cases"]} == OPS
    assert len(told["cases"]) == len(list(small()))  # no two have one name
    assert set(told["cases"]["apgd_step 1x33 float32"]) == {"ok", "tolerance", "words"}
    assert capsys.readouterr().out.startswith(f"smoke: {len(told['cases'])} cases, 0 failed, ")


def test_a_wrong_result_is_told(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "project ", "apgd_step")
    right = native.project

    def wrong(out, *arguments):
        right(out, *arguments)
        out[..., -1:] += 1e-4

    monkeypatch.setattr(native, "project", wrong)
    status, told = run(tmp_path)
    assert (status, failed(told), told["finished"]) == (1, {"project"}, True)
    assert told["cases"]["project Linf 0x33 float32"]["ok"]  # there is nothing to be wrong
    assert "difference: 0.0001" in told["cases"]["project L2 1x33 float32"]["words"]
    assert "project Linf 1x33 float32: AssertionError: Tensor-likes are not equal" in capsys.readouterr().out


def test_a_failed_launch_fails_its_case_alone(tmp_path, monkeypatch):
    only(monkeypatch, "random_start", "load_batch")

    def refuse(*_):
        raise RuntimeError("the CUDA kernel random_start failed to launch: invalid argument")

    monkeypatch.setattr(native, "random_start", refuse)
    status, told = run(tmp_path)
    assert (status, failed(told), told["finished"]) == (1, {"random_start"}, True)
    assert told["cases"]["random_start L1 1x33 float32"]["words"].startswith("RuntimeError: the CUDA kernel")


@pytest.mark.parametrize("tolerance", [0.0, 1e-5])
@pytest.mark.parametrize("wrong", [torch.full((3,), torch.nan), torch.ones(2), torch.ones(3, dtype=torch.float64)])
def test_what_cannot_be_compared_is_wrong(monkeypatch, wrong, tolerance):
    monkeypatch.setattr(smoke, "both", lambda *_: ([wrong], [torch.ones(3)]))
    assert not smoke.verdict(OpCase("any", "", lambda _: None, Batch((3,)), tolerance), "cpu")["ok"]


def test_a_lost_context_ends_the_run_with_valid_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(smoke, "context_lives", lambda: False)
    monkeypatch.setattr(smoke, "both", lambda *_: ([torch.zeros(1)], [torch.ones(1)]))
    out = tmp_path / "smoke.json"
    assert smoke.main(["--device", "cuda", "--out", str(out)]) == 1
    told = json.loads(out.read_text())
    assert (told["device"], len(told["cases"]), told["finished"]) == ("a GPU", 1, False)
    assert "the CUDA context is lost" in capsys.readouterr().out
