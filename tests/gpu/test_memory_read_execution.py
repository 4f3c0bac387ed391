# SPDX-License-Identifier: Apache-2.0
"""How the memory read runs on a GPU: streams, graphs, devices, no waiting, compile, export, settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.memory_read import schema

from ..ops.helpers import VARIANTS, relative_error, scores_of
from ..ops.test_memory_read_registration import MATCH_CHECKS
from .helpers import Arguments, has_kernel, on, problem, read64, skip_if_refused

TOP_K = [None, 5]


@pytest.fixture
def fast(gpu: torch.device) -> torch.device:
    """The hot path as users run it: no deterministic algorithms, no filling of new memory."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return gpu


def ready(
    backend: str, device: torch.device, top_k: int | None, variant: str = "l2_both", **options: Any
) -> Arguments:
    arguments = on(device, problem(variant, device, dtype=torch.bfloat16, **options))
    skip_if_refused(backend, arguments, top_k)
    return arguments


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str, requires_grad: bool, backend: str, gpu: torch.device) -> None:
    arguments = on(gpu, problem(variant, gpu, grid=(3, 5), mask=variant == "l2_both", dtype=torch.bfloat16))
    if requires_grad:
        for tensor in arguments.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.requires_grad_()
    family = "triton_" if backend == "triton" else ""

    def operator(name: str) -> Any:
        return getattr(torch.ops.vosops, family + name).default

    scores = schema.scores_arguments(scores_of(arguments))
    value = arguments["memory_value"]
    plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in scores)
    indices, weights = (t.detach() for t in operator("memory_match")(*plain, 4))
    torch.library.opcheck(operator("memory_match"), (*scores, 4), test_utils=MATCH_CHECKS)
    torch.library.opcheck(operator("memory_gather"), (indices, weights, value))
    grad = torch.ones(*value.shape[:3], indices.shape[1], device=gpu)
    calls = {
        "memory_gather_backward": (grad, indices, weights, value.detach(), True),
        "memory_best_query": (*plain[:5], *plain[7:], None, None, 0),
    }
    if family or has_kernel("memory_read_dense"):
        read, lse = (t.detach() for t in operator("memory_read_dense")(*plain, value.detach()))
        torch.library.opcheck(operator("memory_read_dense"), (*scores, value))
        calls["memory_usage"] = (*plain, lse)
        calls["memory_read_dense_backward"] = (
            *(*plain, value.detach(), torch.ones_like(read)),
            *(torch.ones_like(lse), lse),
        )
    for name, call in calls.items():
        if family or has_kernel(name):
            torch.library.opcheck(operator(name), call)


@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("variant", ["dot", "l2_both"])
def test_compile_fullgraph(variant: str, top_k: int | None, backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()
    ready(backend, gpu, top_k, variant)

    def step(arguments: Arguments) -> tuple[Tensor, Tensor]:
        read, usage = vosops.memory_read(**arguments, top_k=top_k, return_usage=True)
        return read * 2, usage

    compiled = torch.compile(step, fullgraph=True)
    for seed in (0, 1):
        arguments = ready(backend, gpu, top_k, variant, seed=seed)
        for ours, expected in zip(compiled(arguments), step(arguments), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("top_k", TOP_K)
def test_compile_fullgraph_with_gradients(top_k: int | None, backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()

    def loss(arguments: Arguments) -> Tensor:
        return vosops.memory_read(**arguments, top_k=top_k).float().square().sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        arguments = ready(backend, gpu, top_k)
        for tensor in arguments.values():
            if isinstance(tensor, Tensor):
                tensor.requires_grad_()
        call(arguments).backward()
        grads.append({k: v.grad for k, v in arguments.items() if isinstance(v, Tensor)})
    for name, grad in grads[0].items():
        assert grad is not None
        torch.testing.assert_close(grads[1][name], grad)


def test_compile_with_dynamic_shapes(backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **arguments: vosops.memory_read(**arguments, top_k=5).relu(), fullgraph=True, dynamic=True
    )
    for frames in (2, 3, 5):
        arguments = ready(backend, gpu, 5, "l2", frames=frames)
        torch.testing.assert_close(compiled(**arguments), vosops.memory_read(**arguments, top_k=5).relu())


@pytest.mark.parametrize("top_k", TOP_K)
def test_export(top_k: int | None, backend: str, gpu: torch.device) -> None:
    class Reader(torch.nn.Module):
        def forward(self, query_key: Tensor, memory_key: Tensor, memory_value: Tensor) -> Tensor:
            return vosops.memory_read(query_key, memory_key, memory_value, similarity="l2", top_k=top_k)

    arguments = ready(backend, gpu, top_k, "l2")
    tensors = tuple(arguments[name] for name in ("query_key", "memory_key", "memory_value"))
    program = torch.export.export(Reader(), tensors)
    assert torch.equal(program.module()(*tensors), Reader()(*tensors))


@pytest.mark.parametrize("top_k", TOP_K)
def test_graph_replay_with_changed_data(top_k: int | None, backend: str, fast: torch.device) -> None:
    arguments = ready(backend, fast, top_k, mask=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture must not
        vosops.memory_read(**arguments, top_k=top_k)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = vosops.memory_read(**arguments, top_k=top_k)
    for seed in (1, 2):
        fresh = ready(backend, fast, top_k, mask=True, seed=seed)
        for name, tensor in fresh.items():
            if isinstance(tensor, Tensor):
                arguments[name].copy_(tensor)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, vosops.memory_read(**fresh, top_k=top_k))


def test_graph_of_forward_and_backward(backend: str, fast: torch.device) -> None:
    arguments = ready(backend, fast, 5)
    leaf = arguments["memory_value"].clone().requires_grad_()
    call = {**arguments, "memory_value": leaf}

    def step() -> Tensor:
        read = vosops.memory_read(**call, top_k=5)
        (grad,) = torch.autograd.grad(read, leaf, torch.ones_like(read))
        return grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured.fill_(torch.nan)
    graph.replay()
    assert relative_error(captured, expected) < 1e-2  # a rounding of bfloat16 where atomics add


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("prior", [None, "kernel"])
@pytest.mark.parametrize("top_k", TOP_K)
def test_never_waits_for_the_gpu(
    top_k: int | None, prior: str | None, backward: bool, backend: str, fast: torch.device
) -> None:
    options = {"top_k": top_k, "prior": vosops.KernelPrior() if prior else None}
    arguments = ready(backend, fast, top_k)
    skip_if_refused(backend, arguments, top_k, options["prior"])
    if backward:
        arguments = {
            k: v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }

    def step() -> None:
        read = vosops.memory_read(**arguments, **options)
        if backward:
            read.sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream(backend: str, fast: torch.device) -> None:
    """A kernel on another stream would not wait for the sleep that fills the input in late."""
    arguments = ready(backend, fast, 5)
    expected = vosops.memory_read(**arguments, top_k=5)
    late = {**arguments, "memory_key": torch.zeros_like(arguments["memory_key"])}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: a tenth of a second
        late["memory_key"].copy_(arguments["memory_key"])
        read = vosops.memory_read(**late, top_k=5)
        assert not stream.query(), "the read waited for the stream"
    stream.synchronize()
    assert torch.equal(read, expected)


def test_two_streams_at_once(backend: str, fast: torch.device) -> None:
    """No scratch memory is shared between calls."""
    sets = [ready(backend, fast, 20, seed=seed, grid=(30, 54)) for seed in (0, 1)]
    expected = [vosops.memory_read(**arguments, top_k=20) for arguments in sets]
    streams = [torch.cuda.Stream() for _ in sets]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(vosops.memory_read(**sets[index], top_k=20))
    torch.cuda.synchronize()
    for index, reads in enumerate(results):
        assert all(torch.equal(read, expected[index]) for read in reads)


def test_a_second_device(backend: str, fast: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    arguments = ready(backend, fast, 5)
    expected = vosops.memory_read(**arguments, top_k=5)
    read = vosops.memory_read(**on(other, on(torch.device("cpu"), arguments)), top_k=5)
    assert read.device == other
    assert torch.equal(read.cpu(), expected.cpu())


@pytest.mark.parametrize("top_k", TOP_K)
def test_autocast_keeps_the_affinity_in_float32(top_k: int | None, backend: str, gpu: torch.device) -> None:
    arguments = ready(backend, gpu, top_k)
    plain = vosops.memory_read(**arguments, top_k=top_k)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(vosops.memory_read(**arguments, top_k=top_k), plain)
        leaf = arguments["query_key"].clone().requires_grad_()
        read = vosops.memory_read(**{**arguments, "query_key": leaf}, top_k=top_k)
        assert read.dtype == torch.bfloat16
        read.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_follows_torchs_setting(precision: str, backend: str, gpu: torch.device) -> None:
    """tf32 only where torch allows it: three passes are about a thousand times as accurate."""
    arguments = on(gpu, problem("dot", gpu, batch=1, channels=64, grid=(20, 30)))
    skip_if_refused(backend, arguments, None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        error = relative_error(vosops.memory_read(**arguments).cpu(), read64(arguments))
    finally:
        torch.set_float32_matmul_precision(before)
    assert (error < 2e-5) if precision == "highest" else (1e-5 < error < 5e-3)
