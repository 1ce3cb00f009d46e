"""A module serves where these sources, this Python and this GPU made it; a pack holds what is needed, and no more."""

import os
import zipfile

import gpu_pack
import pytest
from gpu_day import DayError, module
from gpu_day.results import read_json, write
from gpu_day.run import environment


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Makes a module from the sources of a checkout, as gpu_day.module.compiled does, but of nothing."""

    def compiled(into, _python="", architecture="90", _given=None):
        (into / "afd").mkdir(parents=True)
        (into / "afd" / module.MODULE).write_text(into.parent.name)
        write(into / "stamp.json", module.stamp(into / "afd" / module.MODULE, architecture))

    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "compiled", compiled)
    return compiled


def wheel(name, folder, **files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as written:
        for file, content in {f"{name}/__init__.py": "", f"{name}-1.0.dist-info/METADATA": "", **files}.items():
            written.writestr(file, content)


def test_a_module_serves_where_it_was_made_for_and_from_nothing_else(compiled, tmp_path, monkeypatch):
    folder = tmp_path / "pack" / "module"
    assert module.misfit(folder, "") == module.misfit(folder, "90") == "there is no stamp.json"
    compiled(folder)
    assert module.misfit(folder, "") == module.misfit(folder, "90") == ""
    assert module.misfit(folder, "100") == "its architecture is 90, not 100"
    for changed in ("csrc/new.cu", "csrc/new.cu", "CMakeLists.txt"):
        (tmp_path / changed).open("a").write("more")
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
    served, places = {"CPU tensors": "native", "CUDA tensors": "native"}, [f"{tmp_path}/work", f"{tmp_path}/pack"]
    monkeypatch.setattr("afd.ops.backend.facts", lambda: served)
    for architecture, taken in (("90", "pack"), ("100", "work")):
        module.install(*places, architecture, f"{tmp_path}/it.json")
        assert (tmp_path / "afd" / module.MODULE).read_text() == taken
        assert read_json(tmp_path / "it.json")["figures"] == {"module": f"{tmp_path}/{taken}/module", **served}
    served["CUDA tensors"] = "reference: no kernels"
    with pytest.raises(DayError, match=r"^the module does not serve this machine: .*reference: no kernels"):
        module.install(*places, "100", f"{tmp_path}/it.json")


def test_what_is_absent_is_unpacked_and_what_is_there_is_not(tmp_path):
    given, site = environment(tmp_path, tmp_path, os.environ), tmp_path / "site"
    (site / "carried").mkdir(parents=True)
    (site / "carried" / "__init__.py").write_text("half of it, when a day was killed")
    for name in ("carried", "numpy"):
        wheel(name, tmp_path, **{f"{name}/more.py": ""})
    module.unpack(tmp_path, site, given)
    assert sorted(path.name for path in site.rglob("*.py")) == ["__init__.py", "more.py"]
    (tmp_path / "cut.whl").write_bytes(b"PK")
    with pytest.raises(DayError, match=r"cut.whl is no whole wheel: make gpu-pack makes it anew"):
        module.unpack(tmp_path, site, given)


def test_a_pack_holds_light_wheels_the_module_and_data_or_says_what_is_missing(compiled, tmp_path, monkeypatch, capsys):
    """Of tiny wheels, and with programs for a Python: one that agrees to all, and one that does not."""
    data, wheels, heavy = tmp_path / "data" / "cifar10-jpeg", tmp_path / "wheels", os.urandom(gpu_pack.BALLAST + 1000)
    for folder in (data, wheels / "data" / "cifar10-jpeg"):
        folder.mkdir(parents=True)
    for file in (data / "images.tar.xz", data.parent / "thesis.tex", tmp_path / "nvcc"):
        file.touch(0o755)
    data.chmod(0o555)
    fakes = {"ROOT": tmp_path, "compiled": compiled, "environment": lambda *_: {"PATH": str(tmp_path)}}
    fakes |= {"LARGEST": 2**20, "fetch": lambda *to: wheel(*to, **{"a.pt": heavy, "a.py": heavy})}
    for name, fake in fakes.items():
        monkeypatch.setattr(gpu_pack, name, fake)
    for python, of, said in (
        ("false", None, "GPU_PYTHON is 'false'; it must be a Python 3.12 with headers"),
        ("true", tmp_path, "DATA is .*, which holds none of cifar10-jpeg, "),
        ("true", wheels / "data", "DATA is .*, which lies in .*; that folder is emptied first"),
        ("true", data.parent, "wheels has [0-9.]+ MiB; at most 1 can be carried: leave data out"),
    ):
        with pytest.raises(DayError, match=said):
            gpu_pack.pack(wheels, python, of, "abc")
    monkeypatch.setattr(gpu_pack, "LARGEST", 2**26)
    gpu_pack.pack(wheels, "true", data.parent, "abc")
    assert "STAGES=4:128,5:resnet18,6:cifar10 BUDGET=330 WHEELS=build/wheels COMMIT=abc" in capsys.readouterr().out
    assert [path.name for path in (wheels / "data").rglob("*")] == ["cifar10-jpeg", "images.tar.xz"]
    assert (wheels / "data" / "cifar10-jpeg").stat().st_mode & 0o200, "can be removed again"
    assert zipfile.ZipFile(wheels / "tyro-1.0-py3-none-any.whl").namelist()[2:] == ["a.py"], "and no weights"
    assert read_json(wheels / "module" / "stamp.json")["architecture"] == "90"
    (tmp_path / "nvcc").unlink()
    with pytest.raises(DayError, match="nvcc is missing"):
        gpu_pack.pack(wheels, "true", None, "abc")
