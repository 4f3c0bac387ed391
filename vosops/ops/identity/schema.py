# SPDX-License-Identifier: Apache-2.0
"""The identity embedding's torch.library operators: schemas, fake kernels and gradient. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.vosops


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


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    labels, weight, bias = ctx.saved_tensors
    grad_weight = grad_bias = None
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.identity_embedding_backward(grad.contiguous(), labels, weight, *ctx.options)
        grad_weight = grad_weight.to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3)).to(bias.dtype)
    return None, grad_weight, grad_bias, None, None


_library = torch.library.Library("vosops", "FRAGMENT")
_library.define(
    "identity_embedding(Tensor labels, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor"
)
_library.define(
    "identity_embedding_backward"
    "(Tensor grad, Tensor labels, Tensor weight, int stride, int padding) -> Tensor"
)
torch.library.register_fake("vosops::identity_embedding", _fake_forward)
torch.library.register_fake("vosops::identity_embedding_backward", _fake_backward)
torch.library.register_autograd("vosops::identity_embedding", _gradient, setup_context=_context)
