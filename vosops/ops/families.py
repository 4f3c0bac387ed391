# SPDX-License-Identifier: Apache-2.0
"""The two families of torch operators that share a schema: compiled libraries register kernels for the plain
names (CPU, CUDA), Triton's launchers have the prefix "triton_"."""

from __future__ import annotations

import importlib
from typing import Any

import torch

FAMILIES = ("", "triton_")


def operator(family: str, name: str) -> Any:
    """The operator `name` of a family."""
    return getattr(torch.ops.vosops, family + name)


def register_triton(library: torch.library.Library, name: str, package: str | None) -> None:
    """Lets `package`.triton serve the operator `name`; imported with the first call, so that importing vosops
    needs torch only."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(".triton", package), name)(*arguments)

    for device in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter
        library.impl(f"triton_{name}", call, device)
