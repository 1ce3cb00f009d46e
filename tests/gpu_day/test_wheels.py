"""Packages that are absent are added from a folder, beside the machine's own Python and without a network."""

from __future__ import annotations

import os
import sys
import zipfile

import pytest
from gpu_day import wheels


def wheel(folder, name, files=None):
    """A pure-Python wheel with one module, and other files."""
    folder.mkdir(exist_ok=True)
    content = {f"{name}.py": "here = True\n", **(files or {})}
    info = f"{name}-1.0.dist-info"
    content |= {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*content, f"{info}/RECORD"))
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        for file, text in content.items():
            packed.writestr(file, text)
    return path


def test_what_is_absent_is_installed_and_what_is_there_is_not(tmp_path):
    for name in ("carried_one", "numpy"):
        wheel(tmp_path / "wheels", name)
    site = tmp_path / "site"
    settings = {**os.environ, "PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1", "PIP_INDEX_URL": "http://127.0.0.1:9"}
    assert wheels.install(tmp_path / "wheels", site, settings) == ["carried_one"]
    assert (site / "carried_one.py").is_file()
    assert not (site / "numpy.py").exists()
    assert wheels.install(tmp_path / "wheels", site, settings) == [], "it is there by now"


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^WHEELS is .*, where there is no wheel; `make wheels`"):
        wheels.install(tmp_path, tmp_path / "site", os.environ)


def test_weights_of_examples_stay_behind(tmp_path):
    noise = os.urandom(wheels.BALLAST + 1000).hex()
    path = wheel(tmp_path / "wheels", "heavy", {"heavy_data/model.pt": noise, "heavy_data/small.txt": "kept"})
    before = path.stat().st_size
    wheels.lighten(path)
    assert path.stat().st_size < before / 10
    with zipfile.ZipFile(path) as packed:
        assert "heavy_data/model.pt" not in packed.read("heavy-1.0.dist-info/RECORD").decode()
    assert wheels.install(tmp_path / "wheels", tmp_path / "site", os.environ) == ["heavy"]
    assert (tmp_path / "site" / "heavy_data" / "small.txt").read_text() == "kept"
    assert not (tmp_path / "site" / "heavy_data" / "model.pt").exists()


def test_a_package_that_is_not_found_fails_and_the_others_come(tmp_path, monkeypatch, capsys):
    asked = []

    def pip(words, environment):
        asked.append(words)
        if "tyro" in words:
            return 1
        return 1 if "hypothesis" in words and "--constraint" in words else 0

    monkeypatch.setattr(wheels, "_pip", pip)
    assert wheels.main([str(tmp_path / "wheels")]) == 1
    assert capsys.readouterr().err == "not found as pure-Python wheels: tyro\n"
    assert all("--no-deps" in words and "any" in words for words in asked)
    assert sys.executable
