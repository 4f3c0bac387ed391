# SPDX-License-Identifier: Apache-2.0
"""local_attention's torch.library operators: schemas, fake kernels and gradients. Torch only.

Two families share them (`..families`). The log-sum-exp of every query is all that a backward pass needs
besides the inputs: the weights are computed again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, operator, register_triton

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? relative_bias, Tensor? relative_weight, "
    "Tensor? relative_offset, Tensor? relative_value, int num_heads, int window, int dilation, float scale"
)
_SCHEMAS = {
    "local_attention": f"({_OPERANDS}) -> (Tensor read, Tensor lse)",
    "local_attention_backward": (
        f"(Tensor grad_read, Tensor delta, Tensor lse, {_OPERANDS}) -> (Tensor grad_query, "
        "Tensor grad_key, Tensor grad_value, Tensor grad_relative_bias, Tensor grad_relative_weight, "
        "Tensor grad_relative_offset, Tensor grad_relative_value)"
    ),
}
_TENSORS = 7


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    batch, _, height, width = query.shape
    return (
        query.new_empty((batch, value.shape[1], height, width), dtype=torch.float32),
        query.new_empty((batch, others[4], height, width), dtype=torch.float32),
    )


def _fake_backward(grad_read: Tensor, delta: Tensor, lse: Tensor, *operands: Any) -> tuple[Tensor, ...]:
    tensors = operands[:_TENSORS]
    return tuple(grad_read.new_empty((0,) if x is None else x.shape, dtype=torch.float32) for x in tensors)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.sizes = inputs[_TENSORS:]
    ctx.save_for_backward(*inputs[:_TENSORS], *output)


def _gradient(ctx: Any, grad_read: Tensor, grad_lse: Tensor, family: str) -> tuple[Tensor | None, ...]:
    *operands, read, lse = ctx.saved_tensors
    mass = (grad_read * read).unflatten(1, (lse.shape[1], -1)).sum(2)  # [B, h, H, W]
    grads = operator(family, "local_attention_backward")(
        grad_read.contiguous(), (mass - grad_lse).contiguous(), lse, *operands, *ctx.sizes
    )
    shaped = (None if x is None else g.to(x.dtype) for x, g in zip(operands, grads, strict=True))
    return (*shaped, *[None] * len(ctx.sizes))


_library = torch.library.Library("vosops", "FRAGMENT")
for _family in FAMILIES:
    for _name, _schema in _SCHEMAS.items():
        _library.define(f"{_family}{_name}{_schema}")
        if _family:
            register_triton(_library, _name, __package__)
    torch.library.register_fake(f"vosops::{_family}local_attention", _fake_forward)
    torch.library.register_fake(f"vosops::{_family}local_attention_backward", _fake_backward)
    torch.library.register_autograd(
        f"vosops::{_family}local_attention",
        functools.partial(_gradient, family=_family),
        setup_context=_context,
    )
