# SPDX-License-Identifier: Apache-2.0
"""Every peer computes what vosops computes: held against the float64 reference."""

from __future__ import annotations

import shutil

import pytest
import torch

import vosops
from benchmarks.case import Settings
from benchmarks.memory_read import draw_inputs
from benchmarks.peers import attention, compiled, eager, smart_eager
from benchmarks.peers.scores import as_product
from benchmarks.shapes import MemoryReadShape

_NAMES = ("dot", "l2", "xmem", "kmn")


def _shape(kind: str, top_k: int | None, batch: int = 2) -> MemoryReadShape:
    return MemoryReadShape(
        kind,
        "test",
        memory=60,
        key_channels=8,
        value_channels=6,
        objects=3,
        top_k=top_k,
        similarity="l2" if kind in ("l2", "xmem") else "dot",
        modulated=kind == "xmem",
        sigma=1.5 if kind == "kmn" else None,
        batch=batch,
        grid=(4, 5),
    )


def _reads(peer, shape: MemoryReadShape, layout: str, dtype: torch.dtype):
    inputs = draw_inputs(shape, Settings(layout=layout), seed=3)
    options = inputs.options(shape)
    q, k, v = inputs.query_key, inputs.memory_key, inputs.memory_value
    if peer not in (attention.memory_read_sdpa, attention.memory_read_flex):
        options["top_k"] = shape.top_k
    with vosops.use_backend("reference"):
        wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        expected = vosops.memory_read(q.double(), k.double(), v.double(), **wide)
    cast = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return peer(q.to(dtype), k.to(dtype), v.to(dtype), **cast), expected


@pytest.mark.parametrize("layout", ["channel_major", "position_major"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("top_k", [None, 7, 100])
@pytest.mark.parametrize("kind", _NAMES)
def test_eager(kind, top_k, dtype, layout):
    read, expected = _reads(eager.memory_read, _shape(kind, top_k), layout, dtype)
    _assert_close(read, expected)


@pytest.mark.parametrize("layout", ["channel_major", "position_major"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("top_k", [7, 100])
@pytest.mark.parametrize("kind", _NAMES)
def test_smart_eager(kind, top_k, dtype, layout):
    read, expected = _reads(smart_eager.memory_read, _shape(kind, top_k), layout, dtype)
    _assert_close(read, expected)


def test_smart_eager_needs_top_k():
    with pytest.raises(ValueError, match="top_k must be an integer"):
        _reads(smart_eager.memory_read, _shape("dot", None), "channel_major", torch.float32)


@pytest.mark.parametrize("layout", ["channel_major", "position_major"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", _NAMES)
def test_sdpa(kind, dtype, layout):
    read, expected = _reads(attention.memory_read_sdpa, _shape(kind, None), layout, dtype)
    _assert_close(read, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_flex():
    read, expected = _reads(attention.memory_read_flex, _shape("kmn", None), "channel_major", torch.float32)
    _assert_close(read, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled():
    read, expected = _reads(compiled.memory_read, _shape("xmem", 7), "channel_major", torch.float32)
    _assert_close(read, expected)


@pytest.mark.parametrize("peer", [eager.memory_read, smart_eager.memory_read])
@pytest.mark.parametrize("kind", _NAMES)
def test_gradients(peer, kind):
    shape = _shape(kind, 7)
    inputs = draw_inputs(shape, Settings(), seed=4)
    keys = [inputs.query_key, inputs.memory_key, inputs.memory_value]
    upstream = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    gradients = []
    for read in (peer, vosops.memory_read):
        leaves = [x.double().requires_grad_() for x in keys]
        options = {
            name: x.double() if isinstance(x, torch.Tensor) else x
            for name, x in inputs.options(shape).items()
        }
        with vosops.use_backend("reference"):
            gradients.append(torch.autograd.grad(read(*leaves, top_k=7, **options), leaves, upstream))
    for got, expected in zip(*gradients, strict=True):
        _assert_close(got, expected)


def test_gradient_calls_leave_the_inputs_alone():
    inputs = draw_inputs(_shape("l2", 7), Settings(), seed=5)
    before = inputs.memory_value.clone()
    eager.memory_read(inputs.query_key, inputs.memory_key, inputs.memory_value, similarity="l2", top_k=7)
    assert torch.equal(before, inputs.memory_value)


def test_as_product_is_the_score():
    inputs = draw_inputs(_shape("xmem", None), Settings(), seed=6)
    q, k = as_product(
        inputs.query_key.double(),
        inputs.memory_key.double(),
        similarity="l2",
        scale=0.3,
        shrinkage=inputs.shrinkage.double(),
        selection=inputs.selection.double(),
    )
    query, key = inputs.query_key.double().flatten(2), inputs.memory_key.double()
    difference = (query[..., :, None] - key[..., None, :]).square()  # [B, Ck, Q, M]
    expected = -0.3 * (inputs.selection.double().flatten(2)[..., None] * difference).sum(1)
    _assert_close(q.mT @ k, expected * inputs.shrinkage.double())


def _assert_close(read, expected):
    assert read.shape == expected.shape
    tolerance = 1e-6 if read.dtype == torch.float64 else 2e-5  # vosops keeps sigma in float32
    torch.testing.assert_close(read.double(), expected, rtol=tolerance, atol=tolerance)
