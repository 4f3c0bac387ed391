# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the operators: each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: object, *, layout: str, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """`tensor` if it is one, of a dtype in `dtypes`; `layout` describes its shape in the message."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {expected}; got {tensor.dtype}")
    return tensor


def check_rank(name: str, tensor: Tensor, minimum: int, layout: str) -> None:
    if tensor.dim() < minimum:
        raise ValueError(
            f"{name} must have at least {minimum} dimensions {layout}, got shape {list(tensor.shape)}"
        )


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], layout: str) -> None:
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name} must have shape {layout} = {list(shape)}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, like: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but {like} is on {device}: move one of them")
