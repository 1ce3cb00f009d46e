"""What a machine may lack, and children must not feel."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from gpu_day import setting as room
from gpu_day.setting import Machine, MachineError, environment, machine

CACHES = ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")


def test_every_cache_is_a_folder_in_the_work_folder(tmp_path):
    found = environment(tmp_path, tmp_path / "work", None, {"PATH": "/usr/bin", "HOME": str(tmp_path)})
    for name in CACHES:
        assert Path(found[name]).is_relative_to(tmp_path / "work")
        assert Path(found[name]).is_dir()
    assert found["MPLBACKEND"] == "Agg"


@pytest.mark.parametrize("home", [None, "", "/absent/home", "/proc"])
def test_a_home_that_cannot_be_written_is_replaced(tmp_path, home):
    found = environment(
        tmp_path, tmp_path / "work", None, {"PATH": "/usr/bin"} | ({} if home is None else {"HOME": home})
    )
    assert found["HOME"] == str(tmp_path / "work" / "home")
    assert Path(found["HOME"]).is_dir()


def test_a_home_that_can_be_written_stays(tmp_path):
    assert environment(tmp_path, tmp_path / "work", None, {"HOME": str(tmp_path)})["HOME"] == str(tmp_path)


def test_a_temporary_folder_that_is_not_there_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    found = environment(tmp_path, tmp_path / "work", None, os.environ)
    assert found["TMPDIR"] != str(tmp_path / "absent")
    assert os.access(found["TMPDIR"], os.W_OK)


def test_without_any_temporary_folder_the_checkout_is_not_littered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where Python ends up when no other can be written
    assert environment(tmp_path, tmp_path / "work", None, {})["TMPDIR"] == str(tmp_path / "work" / "tmp")


def test_this_checkout_comes_first_and_what_make_passes_down_is_dropped(tmp_path):
    given = {"PYTHONPATH": "/peers", "MAKEFLAGS": "-j --jobserver-auth=3,4", "AFD_BACKEND": "reference", "PATH": "/bin"}
    found = environment(tmp_path, tmp_path / "work", tmp_path / "data", given)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), str(tmp_path / "work" / "site"), "/peers"]
    assert not {"MAKEFLAGS", "AFD_BACKEND"} & set(found)
    assert found["PATH"].startswith("/bin:"), "cmake and ninja may lie beside this Python, which comes last"
    assert str(Path(sys.executable).parent) in found["PATH"].split(os.pathsep)
    assert found["AFD_DATA_ROOT"] == str(tmp_path / "data")


def test_modules_are_found_in_the_site_folder_and_not_by_guessing(make_setting):
    setting = make_setting()
    assert setting.has("pytest")
    assert not setting.has("carried_here")
    (setting.work / "site").mkdir()
    (setting.work / "site" / "carried_here.py").touch()
    assert setting.has("carried_here")


@pytest.mark.parametrize("folder", ["bin", "compute-sanitizer"])
def test_tools_are_found_in_a_toolkit_that_is_not_on_the_path(make_setting, tmp_path, folder):
    tool = tmp_path / "toolkit" / folder / "compute-sanitizer-of-a-test"
    tool.parent.mkdir(parents=True)
    tool.touch(mode=0o755)
    setting = make_setting(given={**os.environ, "CUDA_HOME": str(tmp_path / "toolkit")})
    assert setting.tool(tool.name) == str(tool)
    assert make_setting(given={**os.environ, "CUDA_HOME": "/absent/toolkit"}).tool(tool.name) is None


def test_tools_are_found_beside_an_nvcc_that_is_a_link(make_setting, tmp_path):
    for name in ("toolkit/bin/nvcc", "toolkit/compute-sanitizer/sanitizer-of-a-test"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "toolkit" / "bin" / "nvcc")
    setting = make_setting(given={**os.environ, "PATH": f"{tmp_path / 'bin'}:/bin"})
    assert setting.tool("sanitizer-of-a-test") == str(
        tmp_path / "toolkit" / "compute-sanitizer" / "sanitizer-of-a-test"
    )


def test_a_python_without_torch_is_an_error_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PROBE", "import no_such_torch")
    with pytest.raises(MachineError, match=r"cannot import torch: ModuleNotFoundError: .*; name another with PYTHON="):
        machine(os.environ, tmp_path)


def test_the_machine_is_what_torch_says(tmp_path, monkeypatch):
    told = '{"torch": "2.11.0+cu130", "cuda": "13.0", "gpu": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.2}'
    monkeypatch.setattr(room, "PROBE", f"print('noise'); print({told!r})")
    found = machine(os.environ, tmp_path)
    assert (found.gpu, found.architecture) == ("NVIDIA H100", "90-real")
    assert Machine("2.11.0", gpu="B200", capability="10.0").architecture == "100-real"
    assert Machine("2.11.0").architecture == ""
