# SPDX-License-Identifier: Apache-2.0
"""Attention's torch.library operators: schemas, fake kernels and gradients. Torch only.

Two families share them (`..families`). Reading what was matched is the memory read's operator, with the heads
as its batch. Autocast has no rule on purpose, as for the memory read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, operator, register_triton
from . import backward
from .problem import Heads, split_heads

_SCORES = "Tensor query, Tensor key, Tensor? identity_gate, int num_heads, bool distance, float scale"
_SCHEMAS = {
    "attention_match": f"({_SCORES}, int top_k) -> (Tensor indices, Tensor weights)",
    "attention_dense": f"({_SCORES}, Tensor[] values, Tensor? identity) -> (Tensor read, Tensor lse)",
    "attention_dense_backward": (
        f"({_SCORES}, Tensor value, Tensor? identity, Tensor grad_read, Tensor delta, Tensor lse) "
        "-> (Tensor grad_left, Tensor grad_right, Tensor grad_bias, Tensor grad_value)"
    ),
    "attention_usage": f"({_SCORES}, Tensor lse) -> Tensor",
}


def _fake_match(query, key, gate, num_heads, distance, scale, top_k):
    kept = torch.sym_min(top_k, key.shape[1])
    shape = (query.shape[0], num_heads, query.shape[1], kept)
    return query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32)


def _fake_match_backward(query, key, gate, *others):
    empty = query.new_empty((0,), dtype=torch.float32)
    grads = (torch.empty_like(x, dtype=torch.float32).contiguous() for x in (query, key))
    return (*grads, empty if gate is None else torch.empty_like(gate, dtype=torch.float32).contiguous())


def _fake_dense(query, key, gate, num_heads, distance, scale, values, identity):
    batch, queries = query.shape[:2]
    columns = sum(value.shape[2] for value in values)
    read = query.new_empty((batch, queries, columns), dtype=torch.float32)
    return read, query.new_empty((batch, num_heads, queries), dtype=torch.float32)


def _fake_dense_backward(query, key, gate, num_heads, distance, scale, value, *others, family):
    entries, channels = query.shape[0] * num_heads, query.shape[2] // num_heads
    queries, memory = query.shape[1], key.shape[1]
    shapes = ((entries, queries, channels), (entries, memory, channels), (entries, memory))
    grads = [query.new_empty(shape, dtype=torch.float32) for shape in shapes]
    width = value.shape[2] // num_heads
    if family:  # Triton's kernels write it position-major
        return (*grads, query.new_empty((entries, 1, memory, width), dtype=torch.float32).mT)
    return (*grads, query.new_empty((entries, 1, width, memory), dtype=torch.float32))


def _fake_usage(query, key, gate, num_heads, distance, scale, lse):
    return query.new_empty((query.shape[0], num_heads, key.shape[1]), dtype=torch.float32)


def _match_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[3:6]
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(output[0])


def _match_gradient(ctx: Any, _: Tensor | None, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    *operands, indices, weights = ctx.saved_tensors
    grads = operator("", "attention_match_backward")(
        *operands, *ctx.options, grad_weights.contiguous(), indices, weights
    )
    typed = [None if x is None else g.to(x.dtype) for x, g in zip(operands, grads, strict=True)]
    return (*typed, None, None, None, None)


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, gate, *options, values, identity = inputs
    ctx.options = options
    ctx.save_for_backward(query, key, gate, identity, *output, *values)


def _dense_gradient(ctx: Any, grad_read: Tensor, grad_lse: Tensor, family: str) -> tuple[Any, ...]:
    query, key, gate, identity, read, lse, *values = ctx.saved_tensors
    num_heads = ctx.options[0]
    widths = [value.shape[2] for value in values]
    value = values[0] if len(values) == 1 else _interleaved(values, num_heads)
    delta = -grad_lse
    heads = []
    for grad, out in zip(grad_read.split(widths, 2), read.split(widths, 2), strict=True):
        heads.append(split_heads(grad, num_heads))  # [B, h, Q, Cv/h]
        delta = delta + (heads[-1] * split_heads(out, num_heads)).sum(-1)
    grad = torch.cat(heads, -1).mT  # [B, h, Cv/h, Q]
    p = Heads(query, key, gate, *ctx.options)
    *packed, grad_value = operator(family, "attention_dense_backward")(
        *p.arguments(), value, identity, grad if family else grad.contiguous(), delta.contiguous(), lse
    )
    grads = backward.unpack(p, *packed)
    grad_value = grad_value[:, 0].unflatten(0, delta.shape[:2]).permute(0, 3, 1, 2)  # [B, M, h, Cv/h]
    parts = grad_value.split([width // num_heads for width in widths], 3)
    grad_values = [part.flatten(2).to(v.dtype) for part, v in zip(parts, values, strict=True)]
    grad_identity = None if identity is None else grad_value.flatten(2).to(identity.dtype)
    return (*grads, None, None, None, grad_values, grad_identity)


def _interleaved(values: list[Tensor], num_heads: int) -> Tensor:
    """Several value tensors as one whose heads hold the channels of all."""
    wide = values[0].dtype
    for value in values:
        wide = torch.promote_types(wide, value.dtype)
    return torch.cat([value.to(wide).unflatten(2, (num_heads, -1)) for value in values], 3).flatten(2)


_library = torch.library.Library("vosops", "FRAGMENT")
# Plain torch on every device: it touches the h Q k pairs that were kept and nothing else.
_library.define(
    f"attention_match_backward({_SCORES}, Tensor grad_weights, Tensor indices, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("attention_match_backward", backward.match, _device)
torch.library.register_fake("vosops::attention_match_backward", _fake_match_backward)

for _family in FAMILIES:
    for _name, _schema in _SCHEMAS.items():
        _library.define(f"{_family}{_name}{_schema}")
        if _family:
            register_triton(_library, _name, __package__)
    _fakes: dict[str, Callable[..., Any]] = {
        "attention_match": _fake_match,
        "attention_dense": _fake_dense,
        "attention_dense_backward": functools.partial(_fake_dense_backward, family=_family),
        "attention_usage": _fake_usage,
    }
    for _name, _fake in _fakes.items():
        torch.library.register_fake(f"vosops::{_family}{_name}", _fake)
    for _name, _gradient, _context in (
        ("attention_match", _match_gradient, _match_context),
        ("attention_dense", functools.partial(_dense_gradient, family=_family), _dense_context),
    ):
        torch.library.register_autograd(f"vosops::{_family}{_name}", _gradient, setup_context=_context)
