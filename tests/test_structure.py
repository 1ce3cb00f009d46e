"""The house rules that a reader relies on: imports go down, one seam, no torch below it, one op one name."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from imports import cycles

from afd import ops
from afd.bench import op_cases

ROOT = Path(__file__).parents[1]
PACKAGE, CSRC = ROOT / "afd", ROOT / "csrc"
OPS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu") if path.stem != "runtime")
MOST_FILES, MOST_LINES = 170, 400  # of the library in Python: what one can find one's way in, and read at a sitting

# From the ground up; a room may import from lower floors and from itself.
FLOORS = (
    {"_version", "errors"},
    {"deprecated", "files", "process", "processes"},
    {"graphs", "installation", "machine", "python_state", "runtime"},
    {"_C"},
    {"ops"},
    {"data", "nn"},
    {"execution"},
    {"attacks"},
    {"metrics", "passes"},
    {"methods"},
    {"presets"},
    {"config", "checkpoint"},
    {"training"},
    {"evaluation"},
    {"experiments"},
    {"bench", "demo"},
    {""},  # afd/__init__.py
    {"options"},
    {"entries"},
    {"comparing"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return f"{module}.".split(".")[1]


def afd_imports(path: Path) -> Iterator[str]:
    """Every module of afd that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "afd")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "afd":
                yield from (f"afd.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("afd."):
                yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down(path):
    room = room_of(module_name(path))
    assert room in FLOOR, f"afd.{room} has no floor in the table above"
    for imported in afd_imports(path):
        below = room_of(imported)
        assert below == room or FLOOR[below] < FLOOR[room], f"{module_name(path)} imports {imported}"


def test_no_module_imports_one_that_imports_it():
    assert cycles() == []


def test_files_are_few_and_short():
    assert len(SOURCES) <= MOST_FILES
    assert {
        module_name(path): lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > MOST_LINES
    } == {}


def test_only_native_imports_the_compiled_module():
    assert [module_name(path) for path in SOURCES if "afd._C" in afd_imports(path)] == ["afd.ops.native"]


def test_the_library_and_its_benchmarks_need_no_command_line_package():
    """They run where only torch and what draws and prints is installed."""
    code = """
    import sys
    sys.modules["tyro"] = None
    import afd.installation
    from afd.bench import attacks, base, kernels, methods
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_core_includes_no_torch_header():
    sources = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"}]
    assert len(sources) > 10
    for path in sources:
        assert not re.findall(r'#\s*include\s*[<"](?:torch|ATen|c10)[/.]', path.read_text()), path


def test_build_does_not_import_torch():
    nodes = list(ast.walk(ast.parse((ROOT / "setup.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "setuptools" in names
    assert not {name for name in names if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("op", OPS)
def test_one_op_has_one_name_in_every_room(op):
    files = [
        f"csrc/include/afd/{op}.h", f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu",
        f"tests/ops/test_{op}.py",
    ]  # fmt: skip
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for room in ("native", "reference"):
        trees = [ast.parse(path.read_text()) for path in (PACKAGE / "ops").rglob(f"{room}.py")]
        assert op in {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}, room
    assert {op, f"{op}_"} & set(ops.__all__)  # with the underscore, it works in place


def test_every_op_is_timed_and_checked_by_its_cases():
    assert {case.op for case in op_cases.timed("cifar")} == {case.op for case in op_cases.small()} == set(OPS)


# --- The compiled module --------------------------------------------------------------------------------------------


def disassembler(tool: str, *arguments: str) -> str:
    """What a binutils tool says about the compiled module."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    spec = importlib.util.find_spec("afd._C")
    assert spec is not None
    assert spec.origin is not None
    return subprocess.run([tool, *arguments, spec.origin], capture_output=True, text=True, check=True).stdout


def test_module_needs_neither_torch_nor_openmp_nor_a_driver():
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", disassembler("readelf", "--dynamic", "--wide"))
    assert any(name.startswith("libc.so") for name in needed)
    assert [name for name in needed if re.match(r"lib(torch|c10|gomp|omp|iomp|cuda|nv)", name)] == []


def test_wide_registers_stay_in_their_namespaces():
    listing = disassembler("objdump", "--disassemble", "--demangle", "--no-show-raw-insn")
    if "file format elf64-x86-64" not in listing:
        pytest.skip("the module is not built for x86-64")
    wide: dict[str, set[str]] = {}
    function = ""
    for line in listing.splitlines():
        if label := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = label[1]
        else:
            wide.setdefault(function, set()).update(re.findall(r"%([yz]mm)\d", line))
    users = {name: registers for name, registers in wide.items() if registers}
    assert any("::avx512::" in name for name in users)
    for name, registers in users.items():
        allowed = {"ymm", "zmm"} if "::avx512::" in name else {"ymm"} if "::avx2::" in name else set()
        assert registers <= allowed, f"{name} uses {registers}"
