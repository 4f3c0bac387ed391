# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled operators with CMake and Ninja; without a compiler the install still works.

VOSOPS_BUILD_CPU = auto (default) | 0 | 1: auto builds when a C++ compiler is there and goes on without it,
1 fails instead, 0 skips. VOSOPS_BUILD_CUDA says the same of the CUDA operators, which come on top: auto
builds them when nvcc is there and torch has CUDA, whether or not a GPU is. The metadata is in
pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def wanted(part: str = "CPU") -> str:
    choice = os.environ.get(f"VOSOPS_BUILD_{part}", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"VOSOPS_BUILD_{part} must be auto, 0 or 1, got {choice!r}")
    return choice


class CMakeBuild(build_ext):
    """Runs CMake once and lets it install into the package: `vosops/_lib` and `vosops/_C`."""

    def run(self) -> None:
        cuda = wanted("CUDA")
        if wanted() == "0":
            if cuda == "1":
                raise SystemExit("VOSOPS_BUILD_CUDA=1 builds on the CPU operators, got VOSOPS_BUILD_CPU=0")
            return
        if self.attempt("CPU", "installing without compiled operators", self.build_cpu):
            self.attempt("CUDA", "installing without CUDA operators", self.build_cuda)

    def attempt(self, part: str, otherwise: str, build: Callable[[], None]) -> bool:
        if wanted(part) == "0":
            return False
        try:
            build()
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if wanted(part) == "1":
                raise
            print(f"vosops: {otherwise}: {error}", file=sys.stderr)
            return False
        return True

    def build_cpu(self) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise RuntimeError("no C++ compiler found (Debian: apt-get install g++)")
        self.build_with_cmake(f"-DCMAKE_CXX_COMPILER={compiler}", "-DVOSOPS_CUDA=OFF")

    def build_cuda(self) -> None:
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
        if not nvcc:
            raise RuntimeError("no CUDA compiler found (nvcc, of the CUDA toolkit)")
        if not (self.torch_directory() / "lib" / "libtorch_cuda.so").exists():
            raise RuntimeError("the installed torch is without CUDA")
        self.build_with_cmake(f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DVOSOPS_CUDA=ON")

    def build_with_cmake(self, *options: str) -> None:
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        self.cmake(
            "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DVOSOPS_TORCH_DIR={self.torch_directory()}",
            f"-DVOSOPS_TORCH_VERSION={version('torch')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={self.pybind11_directory()}",
            f"-DCMAKE_MAKE_PROGRAM={self.tool('ninja')}",
            *options,
        )  # fmt: skip
        self.cmake("--build", str(build))
        self.cmake("--install", str(build))

    @staticmethod
    def torch_directory() -> Path:
        torch_spec = find_spec("torch")
        if torch_spec is None or torch_spec.origin is None:
            raise RuntimeError("torch, whose headers the build needs, is not installed")
        return Path(torch_spec.origin).parent

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
