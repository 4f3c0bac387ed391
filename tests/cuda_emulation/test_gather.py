# SPDX-License-Identifier: Apache-2.0
"""The CUDA read and its gradient, their device code run on the host, against float64."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from . import emulation


@pytest.mark.parametrize(
    ("dtype", "objects", "channels", "layout", "runs"),
    [
        (torch.bfloat16, 2, 24, "rows", True),
        (torch.float16, 2, 24, "rows", True),
        (torch.float32, 3, 8, "rows", True),
        (torch.bfloat16, 1, 264, "rows", True),
        (torch.bfloat16, 2, 24, "rows slice", True),
        (torch.bfloat16, 2, 24, "columns", False),
        (torch.float32, 2, 24, "slice", False),
        (torch.bfloat16, 5, 3, "rows", False),
    ],
)
@pytest.mark.parametrize(("top_k", "outside"), [(5, False), (40, False), (5, True)])
def test_read_and_gradients(
    built: ctypes.CDLL,
    dtype: torch.dtype,
    objects: int,
    channels: int,
    layout: str,
    runs: bool,
    top_k: int,
    outside: bool,
) -> None:
    torch.manual_seed(top_k)
    batch, queries, (height, width) = 2, 37, (5, 7)
    memory = 2 * height * width
    value = torch.randn(batch, 2, height, width * 2, objects, channels).to(dtype)
    if layout.startswith("rows"):
        value = value.permute(0, 4, 5, 1, 2, 3)
    else:
        value = value.permute(0, 4, 5, 1, 2, 3).contiguous()
    value = value[..., :width] if layout.endswith("slice") else value[..., ::2]
    if not layout.endswith("slice"):  # one merged dimension
        value = value.movedim((1, 2), (-2, -1)).contiguous().movedim((-2, -1), (1, 2))
        value = value if layout == "rows" else value.contiguous()
    indices = torch.randint(0, memory, (batch, queries, top_k))
    indices[:, ::3, -2:] = -1
    indices[:, 5] = -1
    weights = torch.rand(batch, queries, top_k).masked_fill(indices < 0, 0)
    if outside:
        indices[0, 4, 1] = memory
    grad = torch.randn(batch, objects, channels, queries)
    read, grad_weights, grad_value, fast = emulation.gather(built, indices, weights, value, grad)
    assert fast == runs

    rows = indices.clamp(0, memory - 1)
    flat = value.flatten(3).double()
    entry = rows.flatten(1)[:, None, None].expand(batch, objects, channels, -1)
    picked = flat.gather(3, entry).unflatten(3, (queries, top_k))  # [B, O, Cv, Q, k]
    w = weights.double()[:, None, None]
    expected = (picked * w).sum(-1)
    expected_weights = (picked * grad.double()[..., None]).sum((1, 2)).masked_fill(indices < 0, 0)
    if outside:
        expected[0, :, :, 4] = math.nan
        expected_weights[0, 4, 1] = math.nan
        w = w.masked_fill((indices >= memory)[:, None, None], 0)
    expected_value = torch.zeros_like(flat).scatter_add(3, entry, (grad.double()[..., None] * w).flatten(3))
    close = {"rtol": 1e-5, "atol": 3e-5, "equal_nan": True}
    torch.testing.assert_close(read.double(), expected, **close)
    torch.testing.assert_close(grad_weights.double(), expected_weights, **close)
    torch.testing.assert_close(grad_value.double(), expected_value, **close)
