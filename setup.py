# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled operators with CMake and Ninja; without a compiler the install still works.

VOSOPS_BUILD_CPU = auto (default) | 0 | 1: auto builds when a C++ compiler is there and goes on without it,
1 fails instead, 0 skips. The metadata is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def wanted() -> str:
    choice = os.environ.get("VOSOPS_BUILD_CPU", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"VOSOPS_BUILD_CPU must be auto, 0 or 1, got {choice!r}")
    return choice


class CMakeBuild(build_ext):
    """Runs CMake once and lets it install into the package: `vosops/_lib` and `vosops/_C`."""

    def run(self) -> None:
        if wanted() == "0":
            return
        try:
            self.build_with_cmake()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wanted() == "1":
                raise
            print(f"vosops: installing without compiled operators: {error}", file=sys.stderr)

    def build_with_cmake(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise RuntimeError("no C++ compiler found (Debian: apt-get install g++)")
        torch_spec = find_spec("torch")
        if torch_spec is None or torch_spec.origin is None:
            raise RuntimeError("torch, whose headers the build needs, is not installed")
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self.cmake(
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DVOSOPS_TORCH_DIR={Path(torch_spec.origin).parent}",
            f"-DVOSOPS_TORCH_VERSION={version('torch')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self.pybind11_directory()}",
            f"-DCMAKE_MAKE_PROGRAM={self.tool('ninja')}",
        )  # fmt: skip
        self.cmake("--build", str(build))
        self.cmake("--install", str(build))

    @staticmethod
    def pybind11_directory() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    @staticmethod
    def tool(name: str) -> str:
        beside_python = Path(sys.executable).parent / name
        found = str(beside_python) if beside_python.exists() else shutil.which(name)
        if not found:
            raise RuntimeError(f"{name} is not installed (pip install {name})")
        return found

    def cmake(self, *arguments: str) -> None:
        subprocess.run([self.tool("cmake"), *arguments], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(
    # Never compiled by setuptools: it only makes the wheel a platform wheel.
    ext_modules=[] if wanted() == "0" else [Extension("vosops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
