# SPDX-License-Identifier: Apache-2.0
"""The identity embedding's torch.library operators: schemas, fake kernels and gradient. Torch only.

Two families share them (`..families`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, operator, register_triton


def _cells(size: Any, kernel: Any, stride: int, padding: int) -> Any:
    return (size + 2 * padding - kernel) // stride + 1


def _fake_forward(labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    height, width = (
        _cells(size, kernel, stride, padding)
        for size, kernel in zip(labels.shape[1:], weight.shape[2:], strict=True)
    )
    return weight.new_empty((labels.shape[0], weight.shape[0], height, width), dtype=torch.float32)


def _fake_backward(grad: Tensor, labels: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    labels, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(labels, weight, bias)


def _gradient(ctx: Any, grad: Tensor, family: str) -> tuple[Tensor | None, ...]:
    labels, weight, bias = ctx.saved_tensors
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        backward = operator(family, "identity_embedding_backward")
        grad_weight = backward(grad.contiguous(), labels, weight, *ctx.options).to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3)).to(bias.dtype)
    return None, grad_weight, grad_bias, None, None


_library = torch.library.Library("vosops", "FRAGMENT")
for _family in FAMILIES:
    for _name, _signature, _fake in (
        (
            "identity_embedding",
            "(Tensor labels, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor",
            _fake_forward,
        ),
        (
            "identity_embedding_backward",
            "(Tensor grad, Tensor labels, Tensor weight, int stride, int padding) -> Tensor",
            _fake_backward,
        ),
    ):
        _library.define(f"{_family}{_name}{_signature}")
        torch.library.register_fake(f"vosops::{_family}{_name}", _fake)
        if _family:
            register_triton(_library, _name, __package__)
    torch.library.register_autograd(
        f"vosops::{_family}identity_embedding",
        functools.partial(_gradient, family=_family),
        setup_context=_context,
    )
