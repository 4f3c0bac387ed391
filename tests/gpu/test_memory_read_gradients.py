# SPDX-License-Identifier: Apache-2.0
"""Gradients of the memory read on every GPU backend against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vosops

from ..ops.helpers import VARIANTS, relative_error, widened
from ..ops.test_memory_read_gradients import INPUTS, leaves
from .helpers import Arguments, on, problem, skip_if_refused

LOW = [pytest.param(torch.float16, marks=pytest.mark.interpreter), torch.bfloat16]


def gradients(arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    """Of one weighted sum of the read, on the CPU."""
    arguments = leaves(arguments)
    read = vosops.memory_read(**arguments, **options)
    weight = torch.linspace(-1, 2, read.numel(), dtype=torch.float64).view(read.shape)
    (read.double() * weight.to(read.device)).sum().backward()
    return {key: value.grad.cpu() for key, value in arguments.items() if key in INPUTS}


def expected_gradients(arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    with vosops.use_backend("reference"):
        return gradients(on(torch.device("cpu"), widened(arguments)), **options)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("prior", [None, pytest.param("kernel", marks=pytest.mark.interpreter)])
@pytest.mark.parametrize("top_k", [pytest.param(None, marks=pytest.mark.interpreter), 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_reference(
    variant: str, top_k: int | None, prior: str | None, mask: bool, backend: str, device: torch.device
) -> None:
    sizes = {"grid": (2, 4), "value_channels": 18} if device.type == "cpu" else {"value_channels": 35}
    arguments = problem(variant, device, mask=mask, **sizes)
    there = on(device, arguments)
    options = {"top_k": top_k, "prior": vosops.KernelPrior(3.0) if prior else None}
    skip_if_refused(backend, there, top_k, options["prior"])
    ours = gradients(there, **options)
    expected = expected_gradients(arguments, **options)
    for name, grad in ours.items():
        assert grad is not None, f"{name} got no gradient"
        assert grad.shape == arguments[name].shape
        assert relative_error(grad, expected[name]) < 6e-5, name


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("variant", ["dot", "l2", "l2_both"])
def test_low_precision(
    variant: str, dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    if device.type == "cpu" and variant == "dot":
        pytest.skip("two variants are enough for the interpreter's time")
    sizes = {"grid": (2, 4)} if device.type == "cpu" else {}
    arguments = problem(variant, device, dtype=dtype, **sizes)
    there = on(device, arguments)
    skip_if_refused(backend, there, top_k)
    ours = gradients(there, top_k=top_k)
    expected = expected_gradients(arguments, top_k=top_k)
    # With top_k one rounding of the result; the dense read's products take their operands in `dtype`.
    allowed = torch.finfo(dtype).eps * (1 if top_k else 4)
    for name, grad in ours.items():
        assert grad.dtype == dtype
        assert relative_error(grad, expected[name]) < allowed, name


def test_only_what_is_asked(backend: str, gpu: torch.device) -> None:
    arguments = on(gpu, problem("l2_both", gpu, dtype=torch.bfloat16))
    top_k = 3 if backend == "cuda" else None
    for name in INPUTS:
        leaf = arguments[name].clone().requires_grad_()
        read = vosops.memory_read(**{**arguments, name: leaf}, top_k=top_k)
        assert read.requires_grad
        total = read.sum() if name == "memory_value" else read.float().square().sum()
        (grad,) = torch.autograd.grad(total, leaf)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("top_k", [None, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_repeats(
    dtype: torch.dtype, top_k: int | None, deterministic: bool, backend: str, gpu: torch.device
) -> None:
    """Bit by bit under deterministic algorithms; within rounding where a backend may use atomics."""
    arguments = on(gpu, problem("l2_both", gpu, batch=1, grid=(24, 37), value_channels=64, dtype=dtype))
    skip_if_refused(backend, arguments, top_k)
    torch.use_deterministic_algorithms(deterministic)  # the autouse fixture switches it off afterwards
    first = gradients(arguments, top_k=top_k)
    for _ in range(5):
        again = gradients(arguments, top_k=top_k)
        for name, grad in first.items():
            if deterministic:
                assert torch.equal(again[name], grad), name
            else:
                assert relative_error(again[name], grad) < 4 * torch.finfo(dtype).eps, name


def test_match_and_gather_differentiate_separately(backend: str, gpu: torch.device) -> None:
    arguments = leaves(on(gpu, problem("l2", gpu, value_channels=9, dtype=torch.bfloat16)))
    value = arguments.pop("memory_value")
    match = vosops.memory_match(**arguments, top_k=4)
    assert not match.indices.requires_grad
    (2 * vosops.memory_gather(match, value)).sin().sum().backward()
    whole = leaves(on(gpu, problem("l2", gpu, value_channels=9, dtype=torch.bfloat16)))
    (2 * vosops.memory_read(**whole, top_k=4)).sin().sum().backward()
    assert torch.equal(value.grad, whole["memory_value"].grad)
    for name in ("query_key", "memory_key"):
        assert torch.equal(arguments[name].grad, whole[name].grad)


def test_every_value_gradient_of_a_long_list(backend: str, gpu: torch.device) -> None:
    """One position that every query keeps: its gradient is a sum over all of them."""
    query_key = torch.randn(1, 8, 3000, device=gpu).abs().half()
    memory_key = torch.randn(1, 8, 900, device=gpu).half()
    memory_key[:, :, 17] = 60.0
    value = torch.randn(1, 2, 24, 900, device=gpu).half()
    arguments = {"query_key": query_key, "memory_key": memory_key, "memory_value": value, "similarity": "dot"}
    ours, expected = gradients(arguments, top_k=4), expected_gradients(arguments, top_k=4)
    assert relative_error(ours["memory_value"], expected["memory_value"]) < 1e-3


def test_usage_carries_no_gradient(backend: str, gpu: torch.device) -> None:
    arguments = leaves(on(gpu, problem("l2", gpu, dtype=torch.bfloat16)))
    _, usage = vosops.memory_read(**arguments, top_k=3, return_usage=True)
    assert not usage.requires_grad
