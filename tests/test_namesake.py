"""Somebody else's `afd` of the package index is noticed and named, and what we were once called is not taken for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUMMARY = "Agent-First Development toolkit"


def install(site, summary):
    """As pip leaves a wheel: files of a package afd whose cli is a package, too, and its metadata."""
    (site / "afd" / "cli").mkdir(parents=True, exist_ok=True)
    (site / "afd" / "cli" / "__init__.py").write_text("raise SystemExit('this is the stranger')\n")
    (site / "afd-0.10.0.dist-info").mkdir()
    written = f"Metadata-Version: 2.1\nName: afd\nVersion: 0.10.0\nSummary: {summary}\n"
    (site / "afd-0.10.0.dist-info" / "METADATA").write_text(written)


def ours(site):
    """This package, but for its compiled module."""
    shutil.copytree(ROOT / "afd", site / "afd", ignore=shutil.ignore_patterns("*.so", "__pycache__"))


def run(*words, path, folder):
    environment = {"PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    child = [sys.executable, *words]
    return subprocess.run(child, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.mark.parametrize("last", ["the stranger", "we"])
def test_files_of_both_in_one_folder_end_the_command_in_one_line(last, tmp_path):
    site = tmp_path / "site"
    ours(site)
    install(site, SUMMARY)
    if last == "the stranger":
        (site / "afd" / "__init__.py").write_text("__version__ = '0.10.0'\n")
    ran = run("-m", "afd", "--version", path=[site], folder=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("\n") == 1
    assert f"afd: error: another package is installed as afd: afd 0.10.0 ({SUMMARY})" in ran.stderr
    assert "run `pip uninstall afd`, then `pip install --force-reinstall --no-deps afd-torch`" in ran.stderr


def test_a_stranger_elsewhere_is_a_warning_and_we_work(tmp_path):
    install(tmp_path / "other", SUMMARY)
    path = [ROOT, tmp_path / "other"]
    told = run("-m", "afd", "--version", path=path, folder=tmp_path)
    assert (told.returncode, told.stdout.split()[0]) == (0, "afd")
    assert told.stderr.startswith(f"afd: warning: another package is installed as afd: afd 0.10.0 ({SUMMARY})")
    assert told.stderr.count("\n") == 1
    told = run("-c", "import afd; import afd; print(afd.__version__)", path=path, folder=tmp_path)
    assert told.returncode == 0
    assert told.stderr.count("UserWarning: another package is installed as afd: afd 0.10.0") == 1
    told = run("-m", "afd", "info", path=path, folder=tmp_path)
    assert f"name taken       another package is installed as afd: afd 0.10.0 ({SUMMARY})" in told.stdout, told.stderr


def test_what_we_were_once_called_is_no_stranger(tmp_path):
    install(tmp_path / "other", "Adversarial Feature Desensitization: fused attacks")
    told = run("-W", "error", "-c", "import afd", path=[ROOT, tmp_path / "other"], folder=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")


def test_the_command_starts_where_no_stranger_shadows_it():
    """Beside a folder `cli`, a module `cli.py` is not found."""
    assert 'afd = "afd.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    assert not (ROOT / "afd" / "cli").exists()
