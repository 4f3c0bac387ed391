# SPDX-License-Identifier: Apache-2.0
"""Where every Triton kernel is launched, and how many programs fill the device."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launches `kernel`: one place, so that a test can see what would be launched without a GPU."""
    kernel[grid](*arguments, enable_fp_fusion=True, **options)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the device of the tensors, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; that of an A100 where there is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def processors(device: torch.device) -> int:
    """Multiprocessors to fill; the interpreter pretends to have few, so that it meets split work too."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(blocks: int, others: int, device: torch.device) -> int:
    """Parts to cut `blocks` memory blocks into when `others` programs alone would not fill the device."""
    return max(1, min(blocks, math.ceil(2 * processors(device) / max(1, others))))
