# SPDX-License-Identifier: Apache-2.0
"""Gradients: gradcheck of the reference in float64, and the compiled backend against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops

from .helpers import VARIANTS, problem, relative_error, widened

INPUTS = ("query_key", "memory_key", "memory_value", "shrinkage", "selection")


def leaves(arguments: dict) -> dict:
    """The same numbers as leaves that require gradients."""
    return {
        key: value.clone().requires_grad_() if key in INPUTS and isinstance(value, Tensor) else value
        for key, value in arguments.items()
    }


def gradients(arguments: dict, **options: object) -> dict[str, Tensor]:
    arguments = leaves(arguments)
    read = vosops.memory_read(**arguments, **options)
    weight = torch.linspace(-1, 2, read.numel(), dtype=torch.float64).view(read.shape)
    (read.double() * weight).sum().backward()
    return {key: value.grad for key, value in arguments.items() if key in INPUTS}


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_of_the_reference(variant: str, top_k: int | None) -> None:
    arguments = widened(problem(variant, batch=1, channels=4, grid=(2, 3), frames=2, value_channels=3))
    names = [name for name in INPUTS if name in arguments]

    def read(*tensors: Tensor) -> Tensor:
        return vosops.memory_read(**{**arguments, **dict(zip(names, tensors, strict=True))}, top_k=top_k)

    with vosops.use_backend("reference"):
        assert torch.autograd.gradcheck(read, [arguments[name].clone().requires_grad_() for name in names])


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("prior", [None, "kernel"])
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_reference(
    variant: str, top_k: int | None, prior: str | None, mask: bool, isa: str, cpu_backend: None
) -> None:
    arguments = problem(variant, mask=mask, channels=12, value_channels=35)
    options = {"top_k": top_k, "prior": vosops.KernelPrior(3.0) if prior else None}
    ours = gradients(arguments, **options)
    with vosops.use_backend("reference"):
        expected = gradients(widened(arguments), **options)
    for name, grad in ours.items():
        assert grad is not None, f"{name} got no gradient"
        assert grad.shape == arguments[name].shape
        assert relative_error(grad, expected[name]) < 3e-5, name


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, top_k: int | None, cpu_backend: None) -> None:
    arguments = problem("l2_both", dtype=dtype)
    ours = gradients(arguments, top_k=top_k)
    with vosops.use_backend("reference"):
        expected = gradients(widened(arguments), top_k=top_k)
    for name, grad in ours.items():
        assert grad.dtype == dtype
        # One rounding of the result: half a unit in the last place of the largest entry.
        assert relative_error(grad, expected[name]) < torch.finfo(dtype).eps, name


def test_only_what_is_asked(cpu_backend: None) -> None:
    arguments = problem("l2_both")
    for name in INPUTS:
        leaf = arguments[name].clone().requires_grad_()
        for top_k in (None, 3):
            read = vosops.memory_read(**{**arguments, name: leaf}, top_k=top_k)
            assert read.requires_grad
            (grad,) = torch.autograd.grad(read.sum() if name == "memory_value" else read.square().sum(), leaf)
            assert grad.abs().sum() > 0


def test_match_and_gather_differentiate_separately(cpu_backend: None) -> None:
    arguments = leaves(problem("l2", value_channels=9))
    value = arguments.pop("memory_value")
    match = vosops.memory_match(**arguments, top_k=4)
    assert not match.indices.requires_grad
    (2 * vosops.memory_gather(match, value)).sin().sum().backward()
    whole = leaves(problem("l2", value_channels=9))
    (2 * vosops.memory_read(**whole, top_k=4)).sin().sum().backward()
    assert torch.equal(value.grad, whole["memory_value"].grad)
    assert torch.equal(arguments["query_key"].grad, whole["query_key"].grad)
    assert torch.equal(arguments["memory_key"].grad, whole["memory_key"].grad)


def test_deterministic(cpu_backend: None) -> None:
    arguments = problem("l2_both", batch=1, grid=(12, 17), frames=4, value_channels=64)
    for top_k in (None, 10):
        first, second = gradients(arguments, top_k=top_k), gradients(arguments, top_k=top_k)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_usage_carries_no_gradient(cpu_backend: None) -> None:
    for top_k in (None, 3):
        _, usage = vosops.memory_read(**leaves(problem("l2")), top_k=top_k, return_usage=True)
        assert not usage.requires_grad
