"""Builds afd/_C with CMake. Settings come from the environment (README, Build)."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SETTINGS = ("AFD_CUDA", "AFD_CUDA_ARCHITECTURES", "AFD_SANITIZE", "AFD_WERROR")


class CMakeBuild(build_ext):
    """Hands the one extension over to CMake and lets it place the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds and installs in one go."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = (Path(self.build_temp) / ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            *(f"-D{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(ext_modules=[Extension("afd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
