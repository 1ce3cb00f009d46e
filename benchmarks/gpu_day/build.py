"""Stage 1: the compiled module, for this GPU alone, straight into the checkout; then `afd info`.

Objects of another Python, GPU or compiler must not be linked: the build folder carries their names, and is emptied when
a source has changed. ptxas tells registers and spills as it compiles; stage 2 reads its words.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_day.child import Command, Exit
from gpu_day.setting import Setting
from gpu_day.steps import AFD, Box, Findings, Stage, Step

SOURCES = ("csrc/**/*", "CMakeLists.txt")


def stage() -> Stage:
    """Under two minutes on a machine with a dozen cores."""
    return Stage(1, "build", "build for this machine, afd info", share=2, steps=steps, least=240)


def steps(setting: Setting) -> Sequence[Step]:
    """Configure and compile, unless the module is what these sources give; then ask it."""
    info = Step("info", told, share=1, modules=AFD, read=read_info)
    if up_to_date(setting):
        return [info]
    tools = ("cmake", "c++", *(("nvcc",) if setting.machine.gpu else ()))
    return [Step("compile", compiled, share=9, modules=("pybind11",), tools=tools, read=read_build), info]


def told(box: Box) -> list[Command]:
    """What the installation says of itself."""
    del box
    return [Command("info", (sys.executable, "-m", "afd", "info"))]


def compiled(box: Box) -> list[Command]:
    """One child that configures, compiles and installs."""
    setting, folder = box.setting, build_folder(box.setting)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cuda = [
        "-DAFD_CUDA=on", f"-DAFD_CUDA_ARCHITECTURES={setting.machine.architecture}",
        f"-DCMAKE_CUDA_COMPILER={setting.tool('nvcc')}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v",
    ]  # fmt: skip
    configure = [
        setting.tool("cmake"), "-S", setting.root, "-B", folder, *(["-G", "Ninja"] if setting.tool("ninja") else []),
        f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={setting.root / 'afd'}",
        *(cuda if setting.machine.gpu else ["-DAFD_CUDA=off"]),
    ]  # fmt: skip
    build = [setting.tool("cmake"), "--build", folder, "--target", "install", "--parallel", setting.machine.cores]
    script = (
        "import subprocess, sys, pybind11\n"
        f"configure, build = {[str(word) for word in configure]}, {[str(word) for word in build]}\n"
        "subprocess.run([*configure, '-Dpybind11_DIR=' + pybind11.get_cmake_dir()], check=True)\n"
        "sys.exit(subprocess.run(build).returncode)"
    )
    return [Command("compile", (sys.executable, "-c", script))]


def build_folder(setting: Setting) -> Path:
    """Named for all that its objects depend on besides the sources."""
    kind = f"sm{setting.machine.architecture.removesuffix('-real')}" if setting.machine.gpu else "cpu"
    return setting.work / f"build-{sysconfig.get_config_var('SOABI')}-{kind}"


def module_path(setting: Setting) -> Path:
    """Where the compiled module lies."""
    return setting.root / "afd" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def up_to_date(setting: Setting) -> bool:
    """Whether the module in the checkout is the one that was built here from these sources."""
    stamp = build_folder(setting) / "stamp"
    return stamp.is_file() and stamp.read_text() == _state(setting)


def read_build(box: Box, exits: Sequence[Exit]) -> Findings:
    """Sets the stamp of a build that went well."""
    setting = box.setting
    if not (exits and all(exit_.well for exit_ in exits)):
        return Findings()
    if not module_path(setting).is_file():
        return Findings(problems=[f"the build left no {module_path(setting)}"])
    shutil.copyfile(exits[0].log, ptxas_log(setting))
    (build_folder(setting) / "stamp").write_text(_state(setting))
    return Findings({"seconds": round(exits[0].seconds, 1), "architecture": setting.machine.architecture or "CPU only"})


def ptxas_log(setting: Setting) -> Path:
    """What the compiler said about the module in the checkout."""
    return build_folder(setting) / "compile.log"


def read_info(box: Box, exits: Sequence[Exit]) -> Findings:
    """`afd info` ends well whatever it has to tell; here kernels must serve what there is."""
    text = exits[0].log.read_text(errors="replace") if exits else ""
    found = dict(re.findall(r"^((?:CPU|CUDA) tensors|CPU kernels|CUDA kernels)\s+(.+)$", text, re.MULTILINE))
    wanted = ["CPU tensors", *(["CUDA tensors"] if box.setting.machine.gpu else [])]
    problems = [f"{name}: {found.get(name, 'not told')}" for name in wanted if found.get(name) != "native"]
    return Findings(found, problems)


def _state(setting: Setting) -> str:
    """A digest of the sources and of the module; without a module, of nothing that was ever stamped."""
    digest = hashlib.sha256()
    for path in (*_sources(setting.root), module_path(setting)):
        digest.update(str(path.relative_to(setting.root)).encode())
        digest.update(path.read_bytes() if path.is_file() else b"-")
    return digest.hexdigest()


def _sources(root: Path) -> Iterator[Path]:
    for pattern in SOURCES:
        yield from sorted(path for path in root.glob(pattern) if path.is_file())
