"""A module is taken as it is only where these sources, this Python and this GPU made it."""

from __future__ import annotations

import sysconfig

import pytest
from gpu_day import build
from gpu_day.child import Command, Exit
from gpu_day.steps import Box


@pytest.fixture
def compiled(make_setting, tmp_path):
    """A setting after a build that went well."""

    def make(**settings):
        setting = make_setting(**settings)
        (tmp_path / "csrc" / "cuda").mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / "cuda" / "op.cu").write_text("kernel")
        (tmp_path / "CMakeLists.txt").write_text("project")
        build.module_path(setting).parent.mkdir(exist_ok=True)
        build.module_path(setting).write_bytes(b"module")
        build.build_folder(setting).mkdir()
        finished = ended(setting, "", "said by ptxas")
        assert not build.read_build(Box(setting, setting.work, 60), [finished]).problems
        return setting

    return make


def ended(setting, name, text, status=0):
    log = setting.work / f"{name}.log"
    log.write_text(text)
    return Exit(Command(name, ()), log, status, 1.0)


def test_a_build_is_not_made_twice(compiled):
    setting = compiled()
    assert build.up_to_date(setting)
    assert [step.name for step in build.steps(setting)] == ["info"]
    assert build.ptxas_log(setting).read_text() == "said by ptxas"


@pytest.mark.parametrize("changed", ["csrc/cuda/op.cu", "csrc/new.h", "CMakeLists.txt", "module"])
def test_a_change_makes_a_new_one(compiled, changed):
    setting = compiled()
    path = build.module_path(setting) if changed == "module" else setting.root / changed
    path.write_text("other")
    assert not build.up_to_date(setting)
    assert [step.name for step in build.steps(setting)] == ["compile", "info"]


def test_no_module_is_never_up_to_date(compiled):
    setting = compiled()
    build.module_path(setting).unlink()
    assert not build.up_to_date(setting)


def test_another_python_or_gpu_has_a_folder_of_its_own(compiled, make_setting, monkeypatch):
    on_gpu = compiled(gpu="NVIDIA H100")
    assert not build.up_to_date(make_setting())
    config = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: config(name).replace("cpython", "later"))
    assert not build.up_to_date(on_gpu)


def test_a_build_that_failed_or_left_no_module_sets_no_stamp(compiled):
    setting = compiled()
    (build.build_folder(setting) / "stamp").unlink()
    build.read_build(Box(setting, setting.work, 60), [ended(setting, "compile", "error:", status=1)])
    assert not build.up_to_date(setting)
    build.module_path(setting).unlink()
    found = build.read_build(Box(setting, setting.work, 60), [ended(setting, "compile", "")])
    assert "left no" in found.problems[0]
    assert not build.up_to_date(setting)


def test_only_the_gpus_own_code_is_compiled_and_without_a_gpu_none(make_setting):
    def words(**settings):
        setting = make_setting(**settings)
        (command,) = build.compiled(Box(setting, setting.work, 60))
        return command.words[-1]

    assert "-DAFD_CUDA_ARCHITECTURES=90-real" in words(gpu="NVIDIA H100")
    assert "-DAFD_CUDA=on" in words(gpu="NVIDIA H100")
    assert "-DAFD_CUDA=off" in words()


def test_info_must_name_kernels_for_what_there_is(make_setting):
    text = "CPU tensors      native\nCUDA tensors     reference: torch sees no CUDA device\n"
    for gpu, problems in ((None, []), ("NVIDIA H100", ["CUDA tensors: reference: torch sees no CUDA device"])):
        setting = make_setting(gpu=gpu)
        assert build.read_info(Box(setting, setting.work, 9), [ended(setting, "info", text)]).problems == problems
