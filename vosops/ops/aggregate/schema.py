# SPDX-License-Identifier: Apache-2.0
"""soft_aggregate's torch.library operators: schemas, fake kernels and gradient. Torch only.

Two families share them (`..families`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES, operator, register_triton


def _fake_forward(probabilities: Tensor) -> Tensor:
    flat = probabilities.flatten(2)
    return flat.new_empty((flat.shape[0], flat.shape[1] + 1, flat.shape[2]), dtype=torch.float32)


def _fake_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    return probabilities.flatten(2).new_empty(probabilities.flatten(2).shape, dtype=torch.float32)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor, family: str) -> Tensor:
    (probabilities,) = ctx.saved_tensors
    result: Tensor = operator(family, "soft_aggregate_backward")(grad.contiguous(), probabilities)
    return result.view(probabilities.shape).to(probabilities.dtype)


_library = torch.library.Library("vosops", "FRAGMENT")
for _family in FAMILIES:
    for _name, _signature, _fake in (
        ("soft_aggregate", "(Tensor probabilities) -> Tensor", _fake_forward),
        ("soft_aggregate_backward", "(Tensor grad, Tensor probabilities) -> Tensor", _fake_backward),
    ):
        _library.define(f"{_family}{_name}{_signature}")
        torch.library.register_fake(f"vosops::{_family}{_name}", _fake)
        if _family:
            register_triton(_library, _name, __package__)
    torch.library.register_autograd(
        f"vosops::{_family}soft_aggregate",
        functools.partial(_gradient, family=_family),
        setup_context=_context,
    )
