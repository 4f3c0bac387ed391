# SPDX-License-Identifier: Apache-2.0
"""Which backends exist, which of them can serve a call, and why the others cannot."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import crossovers

# Best first. `reference` serves every call, so it ends the list.
BACKENDS = ("cuda", "cpu", "triton", "reference")
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

_forced: str | None = None
_warned: set[str] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot serve the call."""


def _load_library(device: str) -> str | None:
    """Load the compiled operators for "cpu" or "cuda"; return why that failed, or None."""
    if os.environ.get("VOSOPS_DISABLE_EXT", "0") not in ("", "0"):
        return "switched off by VOSOPS_DISABLE_EXT"
    language, compiler = ("C++", "C++20 compiler") if device == "cpu" else ("CUDA", "CUDA toolkit (nvcc)")
    if device == "cuda" and torch.version.cuda is None:
        return "this torch was built without CUDA"
    path = Path(__file__).parent.parent / "_lib" / f"libvosops_{device}.so"
    if not path.exists():
        return (
            f"the {language} operators were not compiled when vosops was installed "
            f"(install a {compiler}, then run: pip install --force-reinstall --no-deps vosops)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton_error() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


_cpu_library_error = _load_library("cpu")
_cuda_library_error = _load_library("cuda")


def build_module() -> ModuleType | None:
    """The pybind11 module with build information and the CPU instruction sets, if it was built."""
    if _cpu_library_error:
        return None
    try:
        return importlib.import_module("vosops._C")
    except ImportError:
        return None


def _unavailable(backend: str) -> str | None:
    """Why `backend` can serve no call at all in this process."""
    if backend == "cpu":
        return _cpu_library_error
    if backend == "triton":
        return _triton_error()
    if backend == "cuda":
        return _cuda_library_error or (None if torch.cuda.is_available() else "torch sees no CUDA device")
    return None


def reasons_against(backend: str, tensors: dict[str, Tensor]) -> list[str]:
    """Every reason why `backend` cannot serve a call on `tensors` (name -> tensor); empty if it can."""
    if backend == "reference":
        return []
    unavailable = _unavailable(backend)
    reasons = [unavailable] if unavailable else []
    device = "cpu" if backend == "cpu" or (backend == "triton" and interpreted()) else "cuda"
    for name, tensor in tensors.items():
        if tensor.device.type != device:
            runs = "the CPU" if device == "cpu" else "CUDA devices"
            reasons.append(f"{name} is on {tensor.device}, the backend runs on {runs}")
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES[backend]:
            served = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES[backend])
            reasons.append(f"{name} has dtype {tensor.dtype}, it serves {served}")
    return reasons


Limits = Callable[[str], list[str]]
"""Backend -> the operator's own reasons why it cannot serve the call."""


def choose(operator: str, tensors: dict[str, Tensor], limits: Limits) -> str:
    """The backend that serves `operator` on `tensors`.

    Raises:
        BackendError: a backend was forced (`use_backend`, `VOSOPS_BACKEND`) and cannot serve the call.
    """
    if _forced is not None:
        reasons = reasons_against(_forced, tensors) + limits(_forced)
        if reasons:
            raise BackendError(
                f"{operator}: backend '{_forced}' was asked for but cannot serve this call: "
                + "; ".join(reasons)
            )
        return _forced
    device = next(iter(tensors.values())).device.type
    passed_over: list[str] = []
    for backend in BACKENDS:
        if backend in ("cpu", "cuda", "triton") and (backend == "cpu") != (device == "cpu"):
            continue
        reasons = reasons_against(backend, tensors) + limits(backend)
        if not reasons and backend == "cuda" and not crossovers.prefers_cuda(operator, tensors):
            reasons = ["no measurement prefers it here"]
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
        backend: "cpu", "triton", "cuda" or "reference".

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
    details = {
        "cpu": f" ({build.cpu_isa()})" if build else "",
        "triton": " (interpreted, on CPU tensors)" if interpreted() else "",
        "cuda": "" if crossovers.MEASURED else " when forced: not measured against triton yet",
        "reference": "",
    }
    return {
        backend: f"not available: {reason}" if (reason := _unavailable(backend)) else f"available{detail}"
        for backend, detail in details.items()
    }


if os.environ.get("VOSOPS_BACKEND"):
    _forced = _check_name(os.environ["VOSOPS_BACKEND"])
