"""Which implementation serves an op, and what a user reads when it is not the one hoped for."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from afd import ops
from afd.ops import backend, native

STEP = """
import torch
from afd import ops
x = torch.full((2, 3), 0.5)
print(ops.pgd_step(x, x, x, alpha=0.125, eps=0.25).unique().tolist(), ops.backend.explain(x.device))
"""
# As if the module had been built for another machine: found, but impossible to load.
BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "afd._C":
            raise ImportError("libmissing.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
"""


def python(code: str, choice: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "AFD_BACKEND"}
    if choice is not None:
        environment["AFD_BACKEND"] = choice
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("choice", "served_by"),
    [(None, "native"), ("auto", "native"), ("native", "native"), ("reference", "reference (AFD_BACKEND=reference)")],
)
def test_environment_chooses(choice, served_by):
    ran = python(STEP, choice)
    assert ran.stdout.strip() == f"[0.625] {served_by}", ran.stderr
    assert "slow PyTorch reference" not in ran.stderr


def test_unknown_choice_is_one_clear_error():
    ran = python(STEP, "fastest")
    assert ran.returncode == 1
    last = ran.stderr.strip().splitlines()[-1]
    words = "the environment variable AFD_BACKEND is 'fastest'; allowed are auto, native, reference"
    assert last.endswith(f"Error: {words}")


def test_module_that_cannot_be_loaded_warns_once_and_the_reference_serves():
    ran = python(BROKEN + STEP * 2, None)
    reason = "the compiled module afd._C cannot be imported (libmissing.so: cannot open shared object file)"
    assert ran.stderr.count(f"RuntimeWarning: afd runs on its slow PyTorch reference: {reason}") == 1
    assert ran.stdout.splitlines() == [f"[0.625] reference: {reason}"] * 2


def test_module_that_cannot_be_loaded_is_an_error_where_native_is_demanded():
    ran = python(BROKEN + STEP, "native")
    assert ran.returncode == 1
    assert "RuntimeError: AFD_BACKEND=native, but the compiled module afd._C cannot be imported" in ran.stderr


def test_native_refuses_float64_and_says_why():
    x = torch.rand(2, 3, dtype=torch.float64)
    with (
        backend.use("native"),
        pytest.raises(RuntimeError, match=r"the kernels' iterates are float32, not torch\.float64"),
    ):
        ops.pgd_step(x, x, x, alpha=0.1, eps=0.1)


def test_auto_serves_float64_in_float64():
    x = torch.rand(2, 3, dtype=torch.float64)
    out = ops.random_start(x, eps=1e-12, seed=0)  # far below float32's resolution
    assert out.dtype == torch.float64
    assert 0 < (out - x).abs().max().item() <= 1e-12


def test_use_restores_the_choice_after_an_exception():
    before = backend.choice()
    with pytest.raises(RuntimeError, match="size"), backend.use("reference"):
        torch.ones(2) + torch.ones(3)
    assert backend.choice() == before


def test_use_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="backend is 'cuda'; allowed are auto, native, reference"), backend.use("cuda"):
        pytest.fail("the block must not run")


# --- Explanations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "covered"),
    [("75", False), ("80", True), ("86", True), ("87", True), ("90", True), ("100", True), ("103", True),
     ("110", False), ("120", True), ("121", True), ("130", True)],
)  # fmt: skip
def test_released_architectures_cover(compute, covered):
    major, minor = int(compute[:-1]), int(compute[-1])
    assert native.covers("80-real,86-real,89-real,90-real,100-real,120", major, minor) is covered


def test_machine_code_serves_no_earlier_minor_and_ptx_no_earlier_gpu():
    assert not native.covers("89-real", 8, 6)
    assert not native.covers("90-virtual", 8, 9)
    assert native.covers("80-virtual", 12, 0)


@pytest.fixture
def machine(monkeypatch):
    """Pretends: a module with these CUDA architectures, and a GPU of this compute capability (or none)."""

    def pretend(architectures: str | None, capability: tuple[int, int] | None) -> str | None:
        module = SimpleNamespace() if architectures is None else SimpleNamespace(
            cuda=SimpleNamespace(architectures=architectures)
        )  # fmt: skip
        monkeypatch.setattr(native, "_C", module)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
        return native.device_reason(torch.device("cuda"))

    native.device_reason.cache_clear()
    yield pretend
    native.device_reason.cache_clear()


def test_reasons_for_not_serving_cuda(machine):
    assert "afd was built without CUDA kernels" in machine(None, (9, 0))


def test_reason_without_a_gpu(machine):
    assert "torch sees no CUDA device" in machine("80-real", None)


def test_reason_on_a_gpu_too_old(machine):
    assert (
        machine("80-real,120", (7, 5)) == "the GPU is sm_75, which the compiled architectures 80-real,120 do not cover"
    )


def test_no_reason_on_a_gpu_that_is_covered(machine):
    assert machine("80-real,120", (8, 9)) is None


def test_explain_follows_the_choice():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    with backend.use("auto"):
        assert backend.explain(cpu) == "native"
        assert backend.explain(meta) == "reference: there are no kernels for meta tensors"
    with backend.use("native"):
        assert backend.explain(meta) == "error: there are no kernels for meta tensors"
    with backend.use("reference"):
        assert backend.explain(cpu) == "reference (AFD_BACKEND=reference)"


def test_explain_cuda_on_this_machine():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert backend.explain(torch.device("cuda")).startswith("reference: ")


def test_build_info_names_what_runs_here():
    info = native.build_info()
    assert info["cpu_isas"][0] == "baseline"
    assert info["cpu_isa"] in info["cpu_isas"]
    assert info["cpu_threads_from"] == "torch's OpenMP"
