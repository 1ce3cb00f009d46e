"""A module is taken only where these sources, this Python and this GPU made it; wheels only where they are needed."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_pack
import pytest
from gpu_day import DayError, module
from gpu_day.results import read_json, write
from gpu_day.run import environment, has

PTXAS = """ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_90'
ptxas info    : Function properties for _Z6calledf
    99 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
ptxas info    : Function properties for _Z4slowPf
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem
"""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Makes a module from the sources of a checkout, as gpu_day.module.compiled does, but of nothing."""
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "op.cu").write_text("kernel")

    def compiled(into, _python="", architecture="90", _given=None):
        file = into / "afd" / module.MODULE
        file.parent.mkdir(parents=True)
        file.write_text(into.parent.name)
        write(into / "stamp.json", module.stamp(file, architecture))
        return PTXAS

    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(gpu_pack, "compiled", compiled)
    return compiled


def wheel(name, folder, **files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as written:
        for file, content in {f"{name}/__init__.py": "", f"{name}-1.0.dist-info/METADATA": "", **files}.items():
            written.writestr(file, content)


def test_a_module_serves_where_it_was_made_for_and_from_nothing_else(compiled, tmp_path, monkeypatch):
    folder, absent = tmp_path / "pack" / "module", tmp_path / "absent"
    compiled(folder)
    assert module.misfit(folder, "") == module.misfit(folder, "90") == ""
    assert module.misfit(folder, "100") == "its architecture is 90, not 100"
    assert module.misfit(absent, "") == module.misfit(absent, "90") == "there is no stamp.json"
    for changed in ("csrc/op.cu", "csrc/new.h", "CMakeLists.txt"):
        (tmp_path / changed).write_text(changed)
        assert module.misfit(folder, "90").startswith("its digest of sources is ")
        write(folder / "stamp.json", module.stamp(folder / "afd" / module.MODULE, "90"))
    (folder / "afd" / module.MODULE).write_text("cut off")
    assert module.misfit(folder, "").startswith("its digest is ")
    monkeypatch.setattr(module, "MODULE", "_C.other.so")
    assert module.misfit(folder, "").startswith("its file is _C.cpython")
    write(folder / "stamp.json", {"sources": "of an earlier format"})
    assert module.misfit(folder, "90").startswith("its file is None, not _C.other.so; its architecture is None")


def test_the_module_of_the_pack_is_installed_or_one_that_is_compiled(compiled, tmp_path, monkeypatch):
    compiled(tmp_path / "pack" / "module")
    (tmp_path / "afd").mkdir()
    served = {"CPU tensors": "native", "CUDA tensors": "native"}
    monkeypatch.setattr("afd.info.facts", lambda: served)
    for architecture, taken in (("90", "pack"), ("100", "work")):
        module.install(*(str(tmp_path / name) for name in ("work", "pack")), architecture, str(tmp_path / "it.json"))
        assert (tmp_path / "afd" / module.MODULE).read_text() == taken
        assert read_json(tmp_path / "it.json")["figures"] == {"module": str(tmp_path / taken / "module"), **served}
    served["CUDA tensors"] = "reference: no kernels"
    with pytest.raises(DayError, match=r"^the module does not serve this machine: .*reference: no kernels"):
        module.install(str(tmp_path / "work"), str(tmp_path / "pack"), "100", str(tmp_path / "it.json"))


def test_what_is_absent_is_unpacked_and_what_is_there_is_not(tmp_path):
    given, site = environment(tmp_path, tmp_path, os.environ), tmp_path / "site"
    (site / "carried").mkdir(parents=True)
    (site / "carried" / "__init__.py").write_text("half of it, when a day was killed")
    for name in ("carried", "numpy"):
        wheel(name, tmp_path, **{f"{name}/more.py": ""})
    module.unpack(tmp_path, site, given)
    assert has("carried", given)
    assert [path.name for path in site.rglob("*.py")] == ["__init__.py", "more.py"]
    (tmp_path / "cut.whl").write_bytes(b"PK")
    with pytest.raises(DayError, match=r"cut.whl is no whole wheel: make gpu-pack makes it anew"):
        module.unpack(tmp_path, site, given)


@pytest.fixture
def packed(tmp_path, monkeypatch, compiled):
    """Makes a pack of tiny wheels, with a Python that agrees to all, or one that does not."""
    (tmp_path / "nvcc").touch(0o755)
    monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_pack, "environment", lambda *_: {"PATH": str(tmp_path)})
    heavy = os.urandom(gpu_pack.BALLAST + 1000)
    monkeypatch.setattr(gpu_pack, "fetch", lambda name, folder: wheel(name, folder, **{"a.pt": heavy, "a.py": heavy}))
    return lambda python="true", data=None: gpu_pack.pack(tmp_path / "wheels", python, data, "abc")


def test_a_pack_holds_light_wheels_the_module_and_data_that_can_be_removed(packed, tmp_path, capsys):
    data, wheels = tmp_path / "data" / "cifar10-jpeg", tmp_path / "wheels"
    data.mkdir(parents=True)
    for name in ("../thesis.tex", "images.tar.xz"):
        (data / name).touch()
    data.chmod(0o555)
    packed(data=data.parent)
    assert [path.name for path in (wheels / "data").rglob("*")] == ["cifar10-jpeg", "images.tar.xz"]
    assert (wheels / "data" / "cifar10-jpeg").stat().st_mode & 0o200
    names = zipfile.ZipFile(wheels / "tyro-1.0-py3-none-any.whl").namelist()
    assert names == ["tyro/__init__.py", "tyro-1.0.dist-info/METADATA", "a.py"]
    assert module.misfit(wheels / "module", "90") == ""
    spills = {"stack": 8, "spill_stores": 16, "spill_loads": 24, "registers": 255}
    assert read_json(wheels / "module" / "registers.json") == {"_Z4slowPf": spills}
    assert "STAGES=4:128,5:resnet18,6:cifar10 BUDGET=330 WHEELS=build/wheels COMMIT=abc" in capsys.readouterr().out


def test_what_a_pack_cannot_be_made_of_is_told(packed, tmp_path, monkeypatch):
    (tmp_path / "wheels" / "data" / "cifar10-jpeg").mkdir(parents=True)
    monkeypatch.setattr(gpu_pack, "LARGEST", 2**20)
    for given, said in (
        ({"python": "false"}, "GPU_PYTHON is 'false'; it must be a Python 3.12 with headers"),
        ({"data": tmp_path}, "DATA is .*, which holds none of cifar10-jpeg, "),
        ({"data": tmp_path / "wheels" / "data"}, "DATA is .*, which lies in .*; that folder is emptied first"),
        ({}, "wheels has [0-9.]+ MiB; at most 1 can be carried: leave data out"),
    ):
        with pytest.raises(DayError, match=said):
            packed(**given)
    (tmp_path / "nvcc").unlink()
    with pytest.raises(DayError, match="nvcc is missing"):
        packed()
    script = Path(gpu_pack.__file__)
    words = [sys.executable, script, tmp_path / "other", "/no/python", "", ""]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.stderr.startswith("make gpu-pack: GPU_PYTHON is '/no/python'; it must be a Python 3.12 with headers")
