# SPDX-License-Identifier: Apache-2.0
"""The device and the GPU backends that these tests run through; without either they skip and say so.

Tests marked `interpreter` also run without a GPU, with TRITON_INTERPRET=1: Triton's interpreter then runs its
kernels on CPU tensors (tests/ops/test_memory_read_triton.py does that).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import vosops
from vosops.ops import backends

# Deterministic algorithms, which every test here switches on, ask cuBLAS for this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> torch.device:
    """Where tensors go: a GPU, or the CPU for Triton's interpreter."""
    if backends.interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A GPU, for what an interpreter cannot show."""
    if device.type != "cuda":
        pytest.skip("Triton's interpreter has no streams, graphs or memory of its own")
    return device


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Forces each GPU backend in turn, so that no test passes on another by accident."""
    reasons = backends.reasons_against(request.param, {})
    if reasons:
        pytest.skip(f"the {request.param} backend is not available: {'; '.join(reasons)}")
    with vosops.use_backend(request.param):
        yield request.param
