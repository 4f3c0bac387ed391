# SPDX-License-Identifier: Apache-2.0
"""soft_aggregate on the GPU backends that have it."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.ops import backends
from vosops.ops.aggregate import api

from ..ops.test_aggregate import probabilities

DTYPES = [
    pytest.param(torch.float32, marks=pytest.mark.interpreter),
    pytest.param(torch.float16, marks=pytest.mark.interpreter),
    torch.bfloat16,
]


@pytest.fixture(autouse=True)
def _served(backend: str) -> None:
    reasons = backends.reasons_against(backend, {}) + api._limits(backend)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 17, 23), (1, 1, 5), (1, 30, 4, 64), (0, 2, 3, 4), (2, 0, 3, 4)])
def test_values(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    p = probabilities(*shape, dtype=dtype)
    logits = vosops.soft_aggregate(p.to(device))
    assert logits.shape == (shape[0], shape[1] + 1, *shape[2:])
    assert logits.dtype == dtype
    with vosops.use_backend("reference"):
        expected = vosops.soft_aggregate(p)
    # Near 1 - 1e-7 float32 has two or three values left, and a logit jumps by 0.7 between them.
    inner = expected.float().abs() < 12
    rtol, atol = {torch.float32: (2e-5, 2e-5)}.get(dtype, (2 * torch.finfo(dtype).eps, 1e-3))
    torch.testing.assert_close(logits.cpu()[inner], expected[inner], rtol=rtol, atol=atol)
    torch.testing.assert_close(logits.cpu().float(), expected.float(), rtol=0, atol=1.0)


@pytest.mark.interpreter
def test_strides_and_nan(device: torch.device) -> None:
    p = probabilities(2, 3, 17, 23).to(device)
    expected = vosops.soft_aggregate(p)
    last = p.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(vosops.soft_aggregate(last), expected)
    wide = torch.nn.functional.pad(p, (1, 2, 3, 4))[..., 3:-4, 1:-2]
    assert torch.equal(vosops.soft_aggregate(wide), expected)
    p[1, 1, 4, 9] = torch.nan
    touched = vosops.soft_aggregate(p)
    assert touched[1, [0, 2], 4, 9].isnan().all()
    touched[1, [0, 2], 4, 9] = expected[1, [0, 2], 4, 9]
    assert torch.equal(touched, expected)


@pytest.mark.interpreter
def test_gradients(device: torch.device) -> None:
    p = probabilities(2, 4, 9, 21).clamp(0.02, 0.98)
    p[0, 0, 0, :5] = 0.0  # outside the clamp: no gradient of its own, still part of the background
    weight = torch.randn(2, 5, 9, 21)
    leaf = p.to(device, copy=True).requires_grad_()
    (vosops.soft_aggregate(leaf) * weight.to(device)).sum().backward()
    exact = p.double().requires_grad_()
    with vosops.use_backend("reference"):
        (vosops.soft_aggregate(exact) * weight.double()).sum().backward()
    torch.testing.assert_close(leaf.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_registration(backend: str, gpu: torch.device) -> None:
    family = "triton_" if backend == "triton" else ""
    p = probabilities(2, 3, 4, 5).clamp(0.01, 0.99).to(gpu).requires_grad_()
    torch.library.opcheck(getattr(torch.ops.vosops, f"{family}soft_aggregate").default, (p,))
    torch._dynamo.reset()
    compiled = torch.compile(vosops.soft_aggregate, fullgraph=True)
    torch.testing.assert_close(compiled(p), vosops.soft_aggregate(p))
