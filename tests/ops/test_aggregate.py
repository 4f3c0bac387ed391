# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

import vosops


def probabilities(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    p = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    p[..., 0] = 0
    p[..., 1] = 1
    p[:, :1, ..., 2] = 1e-9
    return p.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 17, 23), (1, 1, 5), (1, 30, 4, 64), (0, 2, 3, 4), (2, 0, 3, 4)])
def test_values(shape: tuple[int, ...], dtype: torch.dtype, isa: str, cpu_backend: None) -> None:
    p = probabilities(*shape, dtype=dtype)
    logits = vosops.soft_aggregate(p)
    assert logits.shape == (shape[0], shape[1] + 1, *shape[2:])
    assert logits.dtype == dtype
    with vosops.use_backend("reference"):
        expected = vosops.soft_aggregate(p)
    # Near 1 - 1e-7 float32 has two or three values left, and a logit jumps by 0.7 between them.
    inner = expected.float().abs() < 12
    rtol, atol = {torch.float32: (2e-5, 2e-5)}.get(dtype, (2 * torch.finfo(dtype).eps, 1e-3))
    torch.testing.assert_close(logits[inner], expected[inner], rtol=rtol, atol=atol)
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0, atol=1.0)
    torch.testing.assert_close(logits.float().softmax(1), expected.float().softmax(1), rtol=0, atol=2e-3)


def test_strides_and_nan(isa: str, cpu_backend: None) -> None:
    p = probabilities(2, 3, 17, 23)
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


def test_gradients(isa: str, cpu_backend: None) -> None:
    p = probabilities(2, 4, 9, 21).clamp(0.02, 0.98)
    p[0, 0, 0, :5] = 0.0  # outside the clamp: no gradient of its own, still part of the background
    weight = torch.randn(2, 5, 9, 21)
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaf = p.detach().to(dtype, copy=True).requires_grad_()
        with vosops.use_backend(backend):
            (vosops.soft_aggregate(leaf) * weight.to(dtype)).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-4)


def test_gradcheck_of_the_reference() -> None:
    p = torch.rand(1, 3, 2, 2, dtype=torch.float64).clamp(0.05, 0.95).requires_grad_()
    with vosops.use_backend("reference"):
        assert torch.autograd.gradcheck(vosops.soft_aggregate, [p])


def test_registration(cpu_backend: None) -> None:
    p = probabilities(2, 3, 4, 5).clamp(0.01, 0.99).requires_grad_()
    torch.library.opcheck(torch.ops.vosops.soft_aggregate.default, (p,))
    grad = torch.ones(2, 4, 20)
    torch.library.opcheck(torch.ops.vosops.soft_aggregate_backward.default, (grad, p.detach()))
    torch._dynamo.reset()
    compiled = torch.compile(vosops.soft_aggregate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(p), vosops.soft_aggregate(p))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"probabilities must be a tensor \(B, O, H, W\), got list"):
        vosops.soft_aggregate([0.5])
    with pytest.raises(TypeError, match="probabilities must have dtype float32.*got torch.int64"):
        vosops.soft_aggregate(torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"probabilities must have at least 2 dimensions .* got shape \[3\]"):
        vosops.soft_aggregate(torch.zeros(3))
