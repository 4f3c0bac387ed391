# SPDX-License-Identifier: Apache-2.0
"""What a result must carry to be read later: the machine, the versions, the revision, the date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import vosops
from vosops.ops.backends import build_module

_ROOT = Path(__file__).parent.parent
_SOURCES = (".", ":(exclude)benchmarks/results")  # writing the results does not change what was measured


def collect(device: torch.device) -> dict[str, str | int | None]:
    """The environment of a result, flat and ready for JSON; None for what is not there.

    Keys: cpu, isa (of the vosops kernels, or of torch where they were not built), cores, threads, gpu,
    driver, python, torch, triton, vosops, backends, revision (git, "+" for uncommitted changes) and
    date (UTC, ISO 8601). No host or user names.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "cpu": _cpu_name(),
        "isa": _isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "vosops": vosops.__version__,
        "backends": ", ".join(
            name for name, state in vosops.backend_report().items() if state.startswith("available")
        ),
        "revision": _revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _isa() -> str:
    build = build_module()
    return str(build.cpu_isa()) if build else f"{torch.backends.cpu.get_cpu_capability()} (torch)"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    revision = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    changes = _output(
        "git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no", "--", *_SOURCES
    )
    return f"{revision}+" if revision and changes else revision


def _output(*command: str) -> str | None:
    """Standard output of a command that may be missing or fail, as git does outside a checkout."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
