# SPDX-License-Identifier: Apache-2.0
"""`vosops doctor`: what is installed, what the machine offers, and which backends run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from rich.console import Console
from rich.table import Table

import vosops
from vosops.ops import backends

# Distribution -> what vosops uses it for. `pip install 'vosops[apps]'` brings all of them.
OPTIONAL_PACKAGES = {
    "av": "reads and writes video files",
    "matplotlib": "plots of the benchmarks",
    "opencv-python-headless": "contours of the F score, resizing, overlays",
    "pillow": "mask PNGs with their palette",
    "rich": "tables and progress bars of the command line",
    "scikit-image": "photographs of the rendered demo clip",
    "timm": "features and encoders (--features timm:NAME)",
    "torchvision": "features and encoders (--features torchvision:NAME)",
    "typer": "the command line",
}
# Other distributions that provide the same module.
_ALTERNATIVES = {
    "opencv-python-headless": (
        "opencv-python",
        "opencv-contrib-python-headless",
        "opencv-contrib-python",
    )
}

Row = tuple[str, str]


def doctor() -> None:
    """Report versions, CPU, GPUs, backends (with reasons) and optional packages."""
    # Piped output is for logs and reports: no boxes, and lines that do not wrap at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 200)
    sections: dict[str, list[Row]] = {
        "Versions": _versions(),
        "Machine": _machine(),
        "GPU": _gpus(),
        "Backends": list(vosops.backend_report().items()),
        "Build": _build(),
        "Optional packages": _packages(),
        "Environment": _environment(),
    }
    for title, rows in sections.items():
        if console.is_terminal:
            table = Table(title=title, title_justify="left", show_header=False, min_width=72)
        else:
            console.print(title)
            table = Table(box=None, show_header=False, pad_edge=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value)
        console.print(table, markup=False, highlight=False)
        console.print()


def _versions() -> list[Row]:
    return [
        ("vosops", vosops.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}"),
        ("triton", _version("triton") or _version("triton-windows") or "not installed"),
        ("numpy", numpy.__version__),
    ]


def _machine() -> list[Row]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    build = backends.build_module()
    isa = "unknown: the C++ operators are not built"
    if build is not None:
        isa = f"{build.cpu_isa()} chosen; usable: {', '.join(build.cpu_isas())}"
    return [
        ("OS", f"{platform.system()} {platform.release()}, {platform.machine()}, {platform.libc_ver()[0]}"),
        ("CPU", _cpu_name()),
        ("instruction sets", isa),
        ("cores", f"{os.cpu_count()} logical, {usable} usable by this process"),
        (
            "torch threads",
            f"{torch.get_num_threads()} per operator, {torch.get_num_interop_threads()} between",
        ),
    ]


def _gpus() -> list[Row]:
    rows = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = gpu.total_memory / 2**30
            rows.append(
                (f"cuda:{index}", f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory:.1f} GiB")
            )
    else:
        rows.append(("CUDA devices", "none"))
    return [*rows, ("nvcc", _nvcc())]


def _build() -> list[Row]:
    build = backends.build_module()
    if build is None:
        return [("C++ operators", vosops.backend_report()["cpu"])]
    return [(str(name), str(value)) for name, value in build.build_info().items()]


def _packages() -> list[Row]:
    rows = []
    for name, purpose in OPTIONAL_PACKAGES.items():
        found = [(other, _version(other)) for other in (name, *_ALTERNATIVES.get(name, ()))]
        version = next((f"{version} ({other})" for other, version in found if version), None)
        rows.append((name, f"{version.removesuffix(f' ({name})') if version else 'MISSING'}: {purpose}"))
    if any("MISSING" in value for _, value in rows):
        rows.append(("to install", "pip install 'vosops[apps]'"))
    return rows


def _environment() -> list[Row]:
    variables = sorted(item for item in os.environ.items() if item[0].startswith("VOSOPS_"))
    return variables or [("VOSOPS_*", "none set")]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    return _cpu_name_from(_lines(Path("/proc/cpuinfo"))) or platform.processor() or "unknown"


def _cpu_name_from(cpuinfo: Iterable[str]) -> str | None:
    for line in cpuinfo:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return None


def _lines(path: Path) -> list[str]:
    # Other systems have no /proc.
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _nvcc() -> str:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{root}/bin/nvcc" for root in roots if root)]
    path = next((candidate for candidate in candidates if candidate and Path(candidate).is_file()), None)
    if path is None:
        return "none"
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}, does not run: {error}"
    release = next((line for line in run.stdout.splitlines() if "release" in line), "unknown version").strip()
    return f"{path}: {release}"
