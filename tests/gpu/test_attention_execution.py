# SPDX-License-Identifier: Apache-2.0
"""How attention runs on a GPU: registration, compile, graphs, no waiting, memory, offsets past 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vosops

from ..ops.helpers import relative_error
from ..ops.test_attention import FORMS, attend64, changed
from ..ops.test_attention_registration import check_operators
from .helpers import Arguments
from .test_attention import problem, spare_the_interpreter
from .test_attention_gradients import gradients
from .test_memory_read_memory import peak_extra

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)
TOP_K = [None, 5]


@pytest.fixture
def fast(gpu: torch.device) -> torch.device:
    """The hot path as users run it: no deterministic algorithms, no filling of new memory."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return gpu


def low(device: torch.device, **options: Any) -> Arguments:
    return problem(device, **FORMS["everything"], dtype=torch.bfloat16, **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_opcheck(form: str, requires_grad: bool, backend: str, device: torch.device) -> None:
    spare_the_interpreter(device, form == "plain" or not requires_grad)
    check_operators("triton_", problem(device, 4, **FORMS[form], batch=1, memory=14), requires_grad)


@pytest.mark.parametrize("top_k", TOP_K)
def test_compile_fullgraph(top_k: int | None, backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()

    def step(arguments: Arguments) -> tuple[Tensor, Tensor]:
        read, usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
        return read * 2, usage

    compiled = torch.compile(step, fullgraph=True)
    for seed in (0, 1):
        arguments = low(gpu, seed=seed)
        for ours, expected in zip(compiled(arguments), step(arguments), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("top_k", TOP_K)
def test_compile_fullgraph_with_gradients(top_k: int | None, backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()

    def loss(arguments: Arguments) -> Tensor:
        return vosops.attention(**arguments, top_k=top_k).float().square().sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = changed(low(gpu), lambda x: x.clone().requires_grad_())
        call(leaves).backward()
        grads.append({name: x.grad for name, x in leaves.items() if isinstance(x, Tensor)})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_compile_with_dynamic_shapes(backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **arguments: vosops.attention(**arguments, top_k=5) + vosops.attention(**arguments),
        fullgraph=True,
        dynamic=True,
    )
    for memory in (200, 331, 445):
        arguments = low(gpu, memory=memory)
        expected = vosops.attention(**arguments, top_k=5) + vosops.attention(**arguments)
        torch.testing.assert_close(compiled(**arguments), expected)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("top_k", TOP_K)
def test_graph_replay_with_changed_data(
    top_k: int | None, backward: bool, backend: str, fast: torch.device
) -> None:
    arguments = changed(low(fast), lambda x: x.requires_grad_(backward))

    def step(call: Arguments) -> list[Tensor]:
        read = vosops.attention(**call, top_k=top_k)
        if not backward:
            return [read]
        leaves = [x for x in call.values() if isinstance(x, Tensor)]
        return list(torch.autograd.grad(read, leaves, torch.ones_like(read)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture must not
        for _ in range(3):
            step(arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(arguments)
    for seed in (1, 2):
        fresh = changed(low(fast, seed=seed), lambda x: x.requires_grad_(backward))
        with torch.no_grad():
            for name, tensor in fresh.items():
                if isinstance(tensor, Tensor):
                    arguments[name].copy_(tensor)
        for tensor in captured:
            tensor.fill_(torch.nan)
        graph.replay()
        for ours, expected in zip(captured, step(fresh), strict=True):
            assert relative_error(ours, expected) < 1e-2  # a rounding of bfloat16 where atomics add


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("top_k", TOP_K)
def test_never_waits_for_the_gpu(top_k: int | None, backward: bool, backend: str, fast: torch.device) -> None:
    arguments = changed(low(fast), lambda x: x.requires_grad_(backward))

    def step() -> None:
        read, _ = vosops.attention(**arguments, top_k=top_k, return_usage=True)
        if backward:
            read.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("top_k", TOP_K)
def test_autocast_keeps_float32(top_k: int | None, backend: str, gpu: torch.device) -> None:
    arguments = problem(gpu, **FORMS["everything"])
    plain = vosops.attention(**arguments, top_k=top_k)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(vosops.attention(**arguments, top_k=top_k), plain)
        grads = gradients(arguments, top_k=top_k)
    for name, grad in gradients(arguments, top_k=top_k).items():
        assert torch.equal(grads[name], grad), name


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_follows_torchs_setting(precision: str, backend: str, gpu: torch.device) -> None:
    """tf32 only where torch allows it: three passes are about a thousand times as accurate."""
    arguments = problem(gpu)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        read = vosops.attention(**arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    error = relative_error(read, attend64(arguments))
    assert (error < 2e-5) if precision == "highest" else (1e-5 < error < 5e-3)


@pytest.mark.parametrize("top_k", [None, 32])
def test_never_holds_the_matrix(top_k: int | None, backend: str, fast: torch.device) -> None:
    """One head's scores would be 112 MB, keys or values with identity or gate applied 17 MB each.

    Dense: the read and its parts. Top-k: group maxima and candidates, 29 KB a query and head at most.
    """
    sizes = {"batch": 1, "queries": 1674, "memory": 16740, "channels": 256, "value_channels": 256}
    arguments = problem(fast, **sizes, num_heads=8, identity=True, gate=1)
    allowed = 15e6 if top_k is None else 260e6
    assert peak_extra(lambda: vosops.attention(**arguments, top_k=top_k)) < allowed


def test_backward_never_holds_the_matrix(backend: str, fast: torch.device) -> None:
    sizes = {"batch": 1, "queries": 8000, "memory": 30_000, "channels": 32, "value_channels": 32}
    arguments = changed(problem(fast, **sizes, num_heads=2), lambda x: x.requires_grad_())
    assert peak_extra(lambda: vosops.attention(**arguments).sum().backward()) < 8000 * 30_000


@pytest.mark.parametrize("top_k", [None, 2])
def test_strides_beyond_2_31(top_k: int | None, backend: str, fast: torch.device) -> None:
    """Positions more than 2^31 elements apart, in keys, values, identities; so is a batch entry."""
    stride = 1_100_000_000
    storage = torch.empty(2 * stride + 192, dtype=torch.bfloat16, device=fast)  # 4.4 GB
    far, near = {}, {}
    for index, name in enumerate(("key", "value", "identity")):
        near[name] = torch.randn(2, 3, 8, device=fast).bfloat16()
        far[name] = storage.as_strided((2, 3, 8), (16, stride, 1), 32 * index)
        far[name].copy_(near[name])
    query = torch.randn(2, 5, 8, device=fast).bfloat16()
    expected = vosops.attention(query, **near, num_heads=2, top_k=top_k)
    read = vosops.attention(query, **far, num_heads=2, top_k=top_k)
    torch.testing.assert_close(read, expected)
    entries = storage.as_strided((2, 3, 8), (2 * stride, 8, 1), 100)
    entries.copy_(near["key"])
    read = vosops.attention(query, **{**near, "key": entries}, num_heads=2, top_k=top_k)
    torch.testing.assert_close(read, expected)
