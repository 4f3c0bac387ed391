# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention through Triton against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vosops

from ..ops.helpers import relative_error
from ..ops.test_attention import FORMS, changed
from ..ops.test_attention_gradients import INPUTS, gradients
from .helpers import Arguments
from .test_attention import problem, spare_the_interpreter

pytestmark = pytest.mark.parametrize("backend", ["triton"], indirect=True)


def gradients64(arguments: Arguments, **options: Any) -> dict[str, Tensor]:
    with vosops.use_backend("reference"):
        return gradients(changed(arguments, Tensor.double), **options)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("form", [*FORMS, "gate per head", "distance"])
def test_against_the_reference(form: str, top_k: int | None, backend: str, device: torch.device) -> None:
    further = {"gate per head": {"gate": "heads"}, "distance": {"distance": True}}
    spare_the_interpreter(device, top_k is not None and form != "everything")
    arguments = problem(device, top_k, **{**FORMS, **further}[form])
    ours, expected = gradients(arguments, top_k=top_k), gradients64(arguments, top_k=top_k)
    for name, grad in ours.items():
        assert grad is not None, f"{name} got no gradient"
        assert grad.shape == arguments[name].shape
        assert relative_error(grad, expected[name]) < 6e-5, name


@pytest.mark.interpreter
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_are_not_positive(scale: float, backend: str, device: torch.device) -> None:
    arguments = problem(device)
    ours, expected = gradients(arguments, scale=scale), gradients64(arguments, scale=scale)
    for name, grad in ours.items():
        assert relative_error(grad, expected[name]) < 6e-5, name


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 6])
def test_several_values(top_k: int | None, backend: str, device: torch.device) -> None:
    arguments = problem(device, top_k)
    heads, memory = arguments["num_heads"], arguments["key"].shape[1]
    values = [torch.randn(2, memory, heads * width, device=device) for width in (3, 18)]
    grads = []
    for forced, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (arguments["query"], arguments["key"], *values)]
        with vosops.use_backend(forced):
            reads = vosops.attention(*leaves[:2], tuple(leaves[2:]), num_heads=heads, top_k=top_k)
        loss = reads[0].square().sum() + reads[1].sin().sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for ours, expected in zip(*grads, strict=True):
        assert relative_error(ours, expected) < 6e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_low_precision(
    form: str, dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    spare_the_interpreter(device, dtype == torch.bfloat16 or top_k is not None)
    arguments = problem(device, top_k, **FORMS[form], dtype=dtype)
    ours, expected = gradients(arguments, top_k=top_k), gradients64(arguments, top_k=top_k)
    # With top_k one rounding of the result; the dense read's products take their operands in `dtype`.
    allowed = torch.finfo(dtype).eps * (1 if top_k else 4)
    for name, grad in ours.items():
        assert grad.dtype == dtype
        assert relative_error(grad, expected[name]) < allowed, name


def test_strides(backend: str, gpu: torch.device) -> None:
    arguments = problem(gpu, **FORMS["everything"])
    expected = gradients(arguments)
    moved = changed(arguments, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    for name, grad in gradients(moved).items():
        assert relative_error(grad, expected[name]) < 2e-5, name


@pytest.mark.parametrize("top_k", [None, 6])
def test_only_what_is_asked(top_k: int | None, backend: str, gpu: torch.device) -> None:
    arguments = problem(gpu, **FORMS["everything"])
    for name in INPUTS:
        leaf = arguments[name].clone().requires_grad_()
        read = vosops.attention(**{**arguments, name: leaf}, top_k=top_k)
        (grad,) = torch.autograd.grad(read.square().sum(), leaf)
        assert grad.abs().sum() > 0


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats(
    dtype: torch.dtype, top_k: int | None, deterministic: bool, backend: str, gpu: torch.device
) -> None:
    """Bit by bit; with top_k only under deterministic algorithms, as torch's index_add says."""
    arguments = problem(gpu, **FORMS["everything"], queries=700, memory=3000, dtype=dtype)
    torch.use_deterministic_algorithms(deterministic)  # the autouse fixture switches it off afterwards
    first = gradients(arguments, top_k=top_k)
    for _ in range(5):
        for name, grad in gradients(arguments, top_k=top_k).items():
            if deterministic or top_k is None:
                assert torch.equal(grad, first[name]), name
            else:
                assert relative_error(grad, first[name]) < 4 * torch.finfo(dtype).eps, name
