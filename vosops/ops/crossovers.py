# SPDX-License-Identifier: Apache-2.0
"""Where the CUDA C++ kernels are taken instead of Triton's: measured on a GPU, nowhere else.

A row is added when the kernels have passed tests/gpu on that architecture and a committed benchmark shows
them ahead. Until then they serve only when forced (`vosops.use_backend("cuda")`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crossover:
    """`operator` on GPUs of compute capability `architecture`, for `dtypes`, from `memory` positions on.

    source: the file in benchmarks/results that shows it.
    """

    operator: str
    architecture: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    memory: int
    source: str


MEASURED: tuple[Crossover, ...] = ()


def prefers_cuda(operator: str, tensors: dict[str, Tensor]) -> bool:
    """Whether a measurement says that CUDA C++ is the faster backend for this call."""
    if not MEASURED:
        return False
    value = tensors.get("memory_value", next(iter(tensors.values())))
    architecture = torch.cuda.get_device_capability(value.device)
    memory = value[:1, :1, :1].numel() if value.dim() > 3 else value[:1, :1].numel()
    return any(
        row.operator == operator
        and row.architecture == architecture
        and value.dtype in row.dtypes
        and memory >= row.memory
        for row in MEASURED
    )
