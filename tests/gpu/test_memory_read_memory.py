# SPDX-License-Identifier: Apache-2.0
"""Peak extra GPU memory, growth over repeated calls, and offsets that 32 bits cannot hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops

from .helpers import skip_if_refused

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _unfilled() -> Iterator[None]:
    """Without filling new memory, which would touch all of it, and the fast path of the gradients."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes that `call` holds at most beyond what is there before it, its result included."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def xmem(gpu: torch.device, queries: tuple[int, int], memory: int, dtype: torch.dtype) -> dict[str, Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=gpu).to(dtype)

    return {
        "query_key": randn(1, 64, *queries),
        "memory_key": randn(1, 64, memory),
        "memory_value": randn(1, 1, 512, memory),
        "similarity": "l2",
        "shrinkage": 1 + randn(1, 1, memory).square(),
        "selection": randn(1, 64, *queries).sigmoid(),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_1080p_at_the_memory_cap_needs_less_than_a_gigabyte(
    dtype: torch.dtype, backend: str, gpu: torch.device
) -> None:
    arguments = xmem(gpu, (68, 120), 83_440, dtype)
    skip_if_refused(backend, arguments, 30)
    assert peak_extra(lambda: vosops.memory_read(**arguments, top_k=30)) < 1e9


def test_top_k_at_the_memory_cap_needs_a_twentieth_of_eager(backend: str, gpu: torch.device) -> None:
    """Eager holds five matrices of Q x M while it computes the similarity."""
    arguments = xmem(gpu, (30, 54), 26_200, torch.bfloat16)
    eager = 5 * 1620 * 26_200 * 4
    assert peak_extra(lambda: vosops.memory_read(**arguments, top_k=30)) < eager / 20


@pytest.mark.parametrize("top_k", [None, 20])
def test_backward_never_holds_the_whole_matrix(top_k: int | None, backend: str, gpu: torch.device) -> None:
    shapes = {"query_key": (1, 8, 8000), "memory_key": (1, 8, 60_000), "memory_value": (1, 1, 8, 60_000)}
    arguments: dict[str, Any] = {
        name: torch.randn(*shape, device=gpu).bfloat16().requires_grad_() for name, shape in shapes.items()
    }
    arguments["similarity"] = "dot"
    skip_if_refused(backend, arguments, top_k)
    assert peak_extra(lambda: vosops.memory_read(**arguments, top_k=top_k).sum().backward()) < 8000 * 60_000


@pytest.mark.parametrize("top_k", [None, 20])
def test_memory_does_not_grow(top_k: int | None, backend: str, gpu: torch.device) -> None:
    arguments = xmem(gpu, (10, 17), 3000, torch.bfloat16)
    skip_if_refused(backend, arguments, top_k)
    value = arguments["memory_value"].requires_grad_()

    def settled() -> tuple[int, int]:
        for _ in range(30):
            vosops.memory_read(**arguments, top_k=top_k).sum().backward()
            value.grad = None
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    settled()
    before = settled()
    assert settled() == before


@pytest.mark.parametrize("top_k", [None, 2])
def test_strides_beyond_2_31(top_k: int | None, backend: str, gpu: torch.device) -> None:
    """Positions more than 2^31 elements apart, in keys and values."""
    stride = 1_100_000_000
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=gpu)  # 4.4 GB
    keys = storage.as_strided((1, 8, 3), (0, 1, stride))
    values = storage.as_strided((1, 1, 4, 3), (0, 0, 1, stride), 16)
    small_keys = torch.randn(1, 8, 3, device=gpu).bfloat16()
    small_values = torch.randn(1, 1, 4, 3, device=gpu).bfloat16()
    keys.copy_(small_keys)
    values.copy_(small_values)
    query = torch.randn(1, 8, 5, device=gpu).bfloat16()
    call = {"query_key": query, "memory_key": keys, "memory_value": values, "similarity": "dot"}
    skip_if_refused(backend, call, top_k)
    expected = vosops.memory_read(query, small_keys, small_values, top_k=top_k)
    torch.testing.assert_close(vosops.memory_read(query, keys, values, top_k=top_k), expected)


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_value_bank_of_more_than_2_31_elements(top_k: int | None, backend: str, gpu: torch.device) -> None:
    """Also as a batch: the second entry starts beyond 2^31."""
    memory, width = 1_100_000, 1024
    value = torch.zeros(2, memory, 1, width, dtype=torch.float16, device=gpu)  # 4.5 GB
    value[1, -5:] = torch.arange(5.0, device=gpu).half()[:, None, None]
    keys = torch.zeros(2, memory, 8, dtype=torch.float16, device=gpu)
    keys[1, -5:] = 1.0
    call = {
        "query_key": torch.full((2, 8, 3), 20.0, dtype=torch.float16, device=gpu),
        "memory_key": keys.movedim(1, -1),
        "memory_value": value.permute(0, 2, 3, 1),
        "similarity": "dot",
    }
    skip_if_refused(backend, call, top_k)
    read = vosops.memory_read(**call, top_k=5 if top_k else None)
    assert (read[0] == 0).all()
    torch.testing.assert_close(read[1].float(), torch.full((1, width, 3), 2.0, device=gpu))
