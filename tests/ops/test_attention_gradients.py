# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention: gradcheck of the reference in float64, and the compiled backend against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops

from .helpers import relative_error
from .test_attention import FORMS, changed, problem

INPUTS = ("query", "key", "value", "identity", "identity_gate")


def gradients(arguments: dict, **options: object) -> dict[str, Tensor]:
    leaves = changed(arguments, lambda x: x.clone().requires_grad_())
    read = vosops.attention(**leaves, **options)
    weight = torch.linspace(-1, 2, read.numel(), dtype=torch.float64).view(read.shape)
    (read.double() * weight.to(read.device)).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items() if isinstance(leaf, Tensor)}


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_of_the_reference(form: str, top_k: int | None) -> None:
    sizes = {"batch": 2, "queries": 3, "memory": 6, "channels": 4, "value_channels": 2, "num_heads": 2}
    arguments = changed(problem(**FORMS[form], **sizes), Tensor.double)
    names = [name for name in INPUTS if name in arguments]

    def read(*tensors: Tensor) -> Tensor:
        return vosops.attention(**{**arguments, **dict(zip(names, tensors, strict=True))}, top_k=top_k)

    with vosops.use_backend("reference"):
        assert torch.autograd.gradcheck(read, [arguments[name].clone().requires_grad_() for name in names])


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("form", [*FORMS, "gate per head"])
def test_against_the_reference(form: str, top_k: int | None, isa: str, cpu_backend: None) -> None:
    arguments = problem(**FORMS.get(form, {"gate": "heads"}), value_channels=76)
    ours = gradients(arguments, top_k=top_k)
    with vosops.use_backend("reference"):
        expected = gradients(changed(arguments, Tensor.double), top_k=top_k)
    for name, grad in ours.items():
        assert grad is not None, f"{name} got no gradient"
        assert relative_error(grad, expected[name]) < 3e-5, name


@pytest.mark.parametrize("top_k", [None, 6])
def test_several_values(top_k: int | None, isa: str, cpu_backend: None) -> None:
    arguments = problem(num_heads=2)
    grads = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        values = [
            torch.randn(2, 131, width, generator=torch.Generator().manual_seed(width)) for width in (10, 34)
        ]
        leaves = [x.to(dtype).requires_grad_() for x in (arguments["query"], arguments["key"], *values)]
        with vosops.use_backend(backend):
            first, second = vosops.attention(
                leaves[0], leaves[1], (leaves[2], leaves[3]), num_heads=2, top_k=top_k
            )
        loss = first.square().sum() + (second * torch.linspace(-1, 1, 34).to(dtype)).sum()
        grads[backend] = torch.autograd.grad(loss, leaves)
    for ours, expected in zip(grads["cpu"], grads["reference"], strict=True):
        assert relative_error(ours, expected) < 3e-5


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, top_k: int | None, cpu_backend: None) -> None:
    arguments = problem(**FORMS["everything"], dtype=dtype)
    ours = gradients(arguments, top_k=top_k)
    with vosops.use_backend("reference"):
        expected = gradients(changed(arguments, Tensor.double), top_k=top_k)
    for name, grad in ours.items():
        assert grad.dtype == dtype
        # One rounding of the result: half a unit in the last place of the largest entry.
        assert relative_error(grad, expected[name]) < torch.finfo(dtype).eps, name


@pytest.mark.parametrize("top_k", [None, 6])
def test_only_what_is_asked(top_k: int | None, cpu_backend: None) -> None:
    arguments = problem(**FORMS["everything"])
    for name in INPUTS:
        leaf = arguments[name].clone().requires_grad_()
        read = vosops.attention(**{**arguments, name: leaf}, top_k=top_k)
        (grad,) = torch.autograd.grad(read.square().sum(), leaf)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("top_k", [None, 20])
def test_deterministic(top_k: int | None, cpu_backend: None) -> None:
    arguments = problem(batch=1, queries=200, memory=600, **FORMS["everything"])
    first, second = gradients(arguments, top_k=top_k), gradients(arguments, top_k=top_k)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("top_k", [None, 6])
def test_usage_carries_no_gradient(top_k: int | None, cpu_backend: None) -> None:
    leaves = changed(problem(), lambda x: x.requires_grad_())
    _, usage = vosops.attention(**leaves, top_k=top_k, return_usage=True)
    assert not usage.requires_grad
