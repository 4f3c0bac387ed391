# SPDX-License-Identifier: Apache-2.0
"""The memory read's torch.library operators: schemas, fake kernels and gradients. Torch only.

Two families share them (`..families`). Autocast has no rule on purpose: the kernels take any mix of float
types and accumulate in float32, so casting would only copy the memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, operator, register_triton
from . import backward
from .problem import Scores

_SCORES = (
    "Tensor query_key, Tensor memory_key, Tensor? shrinkage, Tensor? selection, Tensor? memory_mask, "
    "Tensor? centers, Tensor? precision, bool l2, float scale"
)
_KEYS = _SCORES.replace("Tensor? centers, Tensor? precision, ", "")
_SCHEMAS = {
    "memory_match": f"({_SCORES}, int top_k) -> (Tensor indices, Tensor weights)",
    "memory_read_dense": f"({_SCORES}, Tensor memory_value) -> (Tensor read, Tensor lse)",
    "memory_usage": f"({_SCORES}, Tensor lse) -> Tensor",
    "memory_best_query": f"({_KEYS}, Tensor? log_prior, Tensor? gain, int window) -> Tensor",
    "memory_gather": "(Tensor indices, Tensor weights, Tensor memory_value) -> Tensor",
    "memory_gather_backward": (
        "(Tensor grad_read, Tensor indices, Tensor weights, Tensor memory_value, bool need_value) "
        "-> (Tensor grad_weights, Tensor grad_value)"
    ),
    "memory_read_dense_backward": (
        f"({_SCORES}, Tensor memory_value, Tensor grad_read, Tensor delta, Tensor lse) "
        "-> (Tensor grad_left, Tensor grad_right, Tensor grad_bias, Tensor grad_value)"
    ),
}

_library = torch.library.Library("vosops", "FRAGMENT")


def scores_arguments(p: Scores) -> tuple[Any, ...]:
    """The operators' leading arguments."""
    tensors = (p.query_key, p.memory_key, p.shrinkage, p.selection, p.memory_mask, p.centers, p.precision)
    return (*tensors, p.similarity == "l2", p.scale)


def _flat(tensor: Tensor, first: int) -> Any:
    return tensor.flatten(first).shape[first]


def _fake_match(query_key, memory_key, shrinkage, selection, mask, centers, precision, l2, scale, top_k):
    kept = torch.sym_min(top_k, _flat(memory_key, 2))
    shape = (query_key.shape[0], _flat(query_key, 2), kept)
    return query_key.new_empty(shape, dtype=torch.int64), query_key.new_empty(shape, dtype=torch.float32)


def _fake_dense(query_key, memory_key, shrinkage, selection, mask, centers, precision, l2, scale, value):
    shape = (query_key.shape[0], _flat(query_key, 2))
    read = query_key.new_empty((shape[0], *value.shape[1:3], shape[1]), dtype=torch.float32)
    return read, query_key.new_empty(shape, dtype=torch.float32)


def _fake_usage(query_key, memory_key, shrinkage, selection, mask, centers, precision, l2, scale, lse):
    return query_key.new_empty((query_key.shape[0], _flat(memory_key, 2)), dtype=torch.float32)


def _fake_best_query(query_key, memory_key, shrinkage, selection, mask, l2, scale, log_prior, gain, window):
    return query_key.new_empty((query_key.shape[0], _flat(memory_key, 2)), dtype=torch.int64)


def _fake_gather(indices, weights, value):
    return value.new_empty((*value.shape[:3], indices.shape[1]), dtype=torch.float32)


def _value_gradient(value: Tensor, memory: Any, family: str) -> Tensor:
    """(B, O, Cv, M); Triton's kernels write it position-major."""
    batch, objects, channels = value.shape[:3]
    if family:
        return value.new_empty((batch, memory, objects, channels), dtype=torch.float32).permute(0, 2, 3, 1)
    return value.new_empty((batch, objects, channels, memory), dtype=torch.float32)


def _fake_gather_backward(grad_read, indices, weights, value, need_value, family):
    memory = _flat(value, 3) if need_value else 0
    return torch.empty_like(weights), _value_gradient(value, memory, family)


def _fake_match_backward(query_key, memory_key, shrinkage, selection, *others):
    batch, channels = query_key.shape[:2]
    queries, memory = _flat(query_key, 2), _flat(memory_key, 2)
    return (
        query_key.new_empty((batch, channels, queries), dtype=torch.float32),
        query_key.new_empty((batch, channels, memory), dtype=torch.float32),
        query_key.new_empty((batch, 1, memory if shrinkage is not None else 0), dtype=torch.float32),
        query_key.new_empty((batch, channels, queries if selection is not None else 0), dtype=torch.float32),
    )


def _fake_dense_backward(query_key, memory_key, *others, family):
    selection, value = others[1], others[7]
    batch, channels = query_key.shape[:2]
    depth = channels if selection is None else 2 * channels + 1
    queries, memory = _flat(query_key, 2), _flat(memory_key, 2)
    shapes = ((batch, queries, depth), (batch, memory, depth), (batch, memory))
    grads = (query_key.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return (*grads, _value_gradient(value, memory, family))


def _match_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.l2, ctx.scale = inputs[7:9]
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(output[0])


def _match_gradient(ctx: Any, _: Tensor | None, grad_weights: Tensor) -> tuple[Tensor | None, ...]:
    *scores, indices, weights = ctx.saved_tensors
    arguments = (*scores, ctx.l2, ctx.scale, grad_weights.contiguous(), indices, weights)
    return (*_shaped(scores[:4], operator("", "memory_match_backward")(*arguments)), *[None] * 6)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gather_gradient(ctx: Any, grad_read: Tensor, family: str) -> tuple[Tensor | None, ...]:
    indices, weights, value = ctx.saved_tensors
    need_value = ctx.needs_input_grad[2]
    arguments = (grad_read.contiguous(), indices, weights, value, need_value)
    grad_weights, grad_value = operator(family, "memory_gather_backward")(*arguments)
    return None, grad_weights, grad_value.view(value.shape).to(value.dtype) if need_value else None


def _dense_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.l2, ctx.scale = inputs[7:9]
    ctx.save_for_backward(*inputs[:7], inputs[9], *output)


def _dense_gradient(ctx: Any, grad_read: Tensor, grad_lse: Tensor, family: str) -> tuple[Tensor | None, ...]:
    *scores, value, read, lse = ctx.saved_tensors
    delta = (grad_read * read).sum((1, 2)) - grad_lse  # [B, Q]
    arguments = (*scores, ctx.l2, ctx.scale)
    *packed, grad_value = operator(family, "memory_read_dense_backward")(
        *arguments, value, grad_read.contiguous(), delta.contiguous(), lse
    )
    grads = backward.unpack(backward.scores_from(*arguments), *packed)
    return (*grads, *[None] * 5, grad_value.view(value.shape).to(value.dtype))


def _shaped(inputs: Any, grads: Any) -> list[Tensor | None]:
    return [None if x is None else g.view(x.shape).to(x.dtype) for x, g in zip(inputs, grads, strict=True)]


# Plain torch on every device: it touches the Q k pairs that were kept and nothing else.
_library.define(
    f"memory_match_backward({_SCORES}, Tensor grad_weights, Tensor indices, Tensor weights) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("memory_match_backward", backward.match, _device)
torch.library.register_fake("vosops::memory_match_backward", _fake_match_backward)

for _family in FAMILIES:
    for _name, _schema in _SCHEMAS.items():
        _library.define(f"{_family}{_name}{_schema}")
        if _family:
            register_triton(_library, _name, __package__)
    _fakes: dict[str, Callable[..., Any]] = {
        "memory_match": _fake_match,
        "memory_read_dense": _fake_dense,
        "memory_usage": _fake_usage,
        "memory_best_query": _fake_best_query,
        "memory_gather": _fake_gather,
        "memory_gather_backward": functools.partial(_fake_gather_backward, family=_family),
        "memory_read_dense_backward": functools.partial(_fake_dense_backward, family=_family),
    }
    for _name, _fake in _fakes.items():
        torch.library.register_fake(f"vosops::{_family}{_name}", _fake)
    # Registered on the operators themselves, so that a raw call differentiates too.
    for _name, _gradient, _context in (
        ("memory_match", _match_gradient, _match_context),
        ("memory_gather", functools.partial(_gather_gradient, family=_family), _gather_context),
        ("memory_read_dense", functools.partial(_dense_gradient, family=_family), _dense_context),
    ):
        torch.library.register_autograd(f"vosops::{_family}{_name}", _gradient, setup_context=_context)
