"""How the CUDA kernels share out their work, held here without a GPU: grids walked on the host, and what nvcc makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
WALK = Path(__file__).with_name("cuda_grids.cpp")


def tool(name: str) -> str:
    """A compiler on the path, or the test is skipped."""
    found = shutil.which(os.environ.get({"c++": "CXX", "nvcc": "CUDACXX"}[name], name))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


# --- Grids ----------------------------------------------------------------------------------------------------------


def walk(sources: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Compiles cuda_grids.cpp against `sources` and runs it."""
    program = folder / "grids"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *options]
    includes = [f"-I{sources}", f"-I{sources / 'include'}"]
    subprocess.run([tool("c++"), *flags, *includes, str(WALK), "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, text=True)


def test_every_element_is_written_once_and_right(tmp_path):
    ran = walk(CSRC, tmp_path, "-O1")
    assert (ran.returncode, ran.stdout) == (0, "0 failures\n")


@pytest.mark.slow
def test_no_thread_reaches_outside_of_its_memory(tmp_path):
    ran = walk(CSRC, tmp_path, "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "0 failures\n", "")


PLANTED = [
    ("tiles.h", "left < 4 ?", "left < 3 ?"),
    ("tiles.h", "first < 0 ? skew : 0", "0"),
    ("tiles.h", "pieces = ceil_div(packs, kThreads)", "pieces = packs / kThreads + (packs < kThreads)"),
    ("tiles.h", "const int64_t first = 4 * pack - skew", "const int64_t first = static_cast<int>(4 * pack - skew)"),
    ("load_batch.h", "(length + 6) / 4", "(length + 3) / 4"),
    ("load_batch.h", "a.width - 4 - cut.first", "a.width - 3 - cut.first"),
    ("load_batch.h", "right < 4 ?", "right < 3 ?"),
    ("load_batch.h", "++channel == a.channels", "channel++ == a.channels"),
    ("load_batch.h", "channel * a.height * a.width", "channel * a.width"),
    ("random_start.h", "left < 4 ?", "left < 3 ?"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED, ids=lambda text: text)
def test_the_walk_notices_what_is_planted(tmp_path, name, right, wrong):
    sources = shutil.copytree(CSRC, tmp_path / "csrc")
    header = sources / "cuda" / name
    text = header.read_text()
    assert right in text
    header.write_text(text.replace(right, wrong))
    assert walk(sources, tmp_path, "-O0").returncode != 0


# --- What nvcc makes of the kernels ---------------------------------------------------------------------------------


def compiled(source: Path, folder: Path, *options: str) -> str:
    """What nvcc says of one kernel file for sm_90, with the flags of CMakeLists.txt."""
    flags = ["-std=c++17", "-O3", "-fmad=false", "-arch=sm_90", *options]
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    command = [tool("nvcc"), *flags, *includes, str(source), "-o", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills(tmp_path, source):
    said = compiled(source, tmp_path, "-cubin", "-Xptxas=-v")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(frames) == said.count("Compiling entry function")
    assert set(frames) <= {("0", "0", "0")}, said
    assert frames or source.stem == "runtime"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_batch", "random_start"])
def test_four_floats_are_moved_at_once(tmp_path, name):
    compiled(CSRC / "cuda" / f"{name}.cu", tmp_path, "-ptx")
    ptx = (tmp_path / "out").read_text()
    assert re.search(r"\bst\.global\.v4\.f32\b", ptx)
    assert not re.search(r"\b(?:ld|st)\.(?:v4\.)?[bfus]\d+\b", ptx)  # the compiler knows which memory it is
