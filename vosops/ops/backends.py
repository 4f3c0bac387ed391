# SPDX-License-Identifier: Apache-2.0
"""Which backends exist, which of them can serve a call, and why the others cannot."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

# Best first. `reference` serves every call, so it ends the list.
BACKENDS = ("cpu", "reference")
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: str | None = None
_warned: set[str] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _load_cpu_library() -> str | None:
    """Load the compiled CPU operators; return why that failed, or None."""
    if os.environ.get("VOSOPS_DISABLE_EXT", "0") not in ("", "0"):
        return "switched off by VOSOPS_DISABLE_EXT"
    path = Path(__file__).parent.parent / "_lib" / "libvosops_cpu.so"
    if not path.exists():
        return (
            "the C++ operators were not compiled when vosops was installed "
            "(install a C++20 compiler, then run: pip install --force-reinstall --no-deps vosops)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


_cpu_library_error = _load_cpu_library()


def build_module() -> ModuleType | None:
    """The pybind11 module with build information and the CPU instruction sets, if it was built."""
    if _cpu_library_error:
        return None
    try:
        return importlib.import_module("vosops._C")
    except ImportError:
        return None


def reasons_against(backend: str, tensors: dict[str, Tensor]) -> list[str]:
    """Every reason why `backend` cannot serve a call on `tensors` (name -> tensor); empty if it can."""
    if backend == "reference":
        return []
    reasons = [_cpu_library_error] if _cpu_library_error else []
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            reasons.append(f"{name} is on {tensor.device}, the backend runs on the CPU")
        if tensor.is_floating_point() and tensor.dtype not in _CPU_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}, it serves float32, bfloat16, float16")
    return reasons


def choose(operator: str, tensors: dict[str, Tensor]) -> str:
    """The backend that serves `operator` on `tensors`.

    Raises:
        BackendError: a backend was forced (`use_backend`, `VOSOPS_BACKEND`) and cannot serve the call.
    """
    if _forced is not None:
        reasons = reasons_against(_forced, tensors)
        if reasons:
            raise BackendError(
                f"{operator}: backend '{_forced}' was asked for but cannot serve this call: "
                + "; ".join(reasons)
            )
        return _forced
    passed_over: list[str] = []
    for backend in BACKENDS:
        reasons = reasons_against(backend, tensors)
        if not reasons:
            break
        passed_over.append(f"{backend}: {'; '.join(reasons)}")
    if backend == "reference" and not torch.compiler.is_compiling():
        _warn_once(f"vosops.{operator} falls back to the reference backend ({'. '.join(passed_over)})")
    return backend


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _check_name(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got '{backend}'")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend inside a `with` block, for the whole process.

    A call that the backend cannot serve raises `BackendError` with every reason; nothing falls back.

    Args:
        backend: "cpu" or "reference".

    Example:
        >>> with vosops.use_backend("reference"):
        ...     read = vosops.memory_read(query_key, memory_key, memory_value)
    """
    global _forced
    previous, _forced = _forced, _check_name(backend)
    try:
        yield
    finally:
        _forced = previous


def backend_report() -> dict[str, str]:
    """Backend -> "available", or the reason why it is not."""
    build = build_module()
    cpu = "available" + (f" ({build.cpu_isa()})" if build else "")
    return {
        "cpu": f"not available: {_cpu_library_error}" if _cpu_library_error else cpu,
        "triton": "not available: this version has no GPU kernels; CUDA tensors use reference",
        "cuda": "not available: this version has no GPU kernels; CUDA tensors use reference",
        "reference": "available",
    }


if os.environ.get("VOSOPS_BACKEND"):
    _forced = _check_name(os.environ["VOSOPS_BACKEND"])
