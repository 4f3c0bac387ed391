# SPDX-License-Identifier: Apache-2.0
"""soft_aggregate's torch.library operators: schemas, fake kernels and gradient. Torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("vosops", "FRAGMENT")
_library.define("soft_aggregate(Tensor probabilities) -> Tensor")
_library.define("soft_aggregate_backward(Tensor grad, Tensor probabilities) -> Tensor")


@torch.library.register_fake("vosops::soft_aggregate")
def _(probabilities: Tensor) -> Tensor:
    flat = probabilities.flatten(2)
    return flat.new_empty((flat.shape[0], flat.shape[1] + 1, flat.shape[2]), dtype=torch.float32)


@torch.library.register_fake("vosops::soft_aggregate_backward")
def _(grad: Tensor, probabilities: Tensor) -> Tensor:
    return probabilities.flatten(2).new_empty(probabilities.flatten(2).shape, dtype=torch.float32)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    (probabilities,) = ctx.saved_tensors
    result: Tensor = torch.ops.vosops.soft_aggregate_backward(grad.contiguous(), probabilities)
    return result.view(probabilities.shape).to(probabilities.dtype)


torch.library.register_autograd("vosops::soft_aggregate", _gradient, setup_context=_context)
