# SPDX-License-Identifier: Apache-2.0
"""What one attention call asks for, checked: the operands of the score s_ij of every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_device, check_shape, check_tensor

_QUERY, _KEY, _VALUE = "(B, Q, C)", "(B, M, C)", "(B, M, Cv)"


@dataclass(frozen=True)
class Heads:
    """Operands of s_ij = scale <q_i, g_j k_j>, or of 2 s_ij - |g_j k_j|^2 with `distance`, for every head."""

    query: Tensor  # [B, Q, C]
    key: Tensor  # [B, M, C]
    identity_gate: Tensor | None  # [B, M, 1] or [B, M, h]
    num_heads: int
    distance: bool
    scale: float

    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int, bool, float]:
        """The operators' leading arguments."""
        return self.query, self.key, self.identity_gate, self.num_heads, self.distance, self.scale

    @property
    def memory(self) -> int:
        return self.key.shape[1]


def split_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """A view with the heads before the positions.  # [B, N, h * C] -> [B, h, N, C]"""
    return tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def check_heads(
    query: Tensor,
    key: Tensor,
    num_heads: int,
    scale: float | None,
    identity_gate: Tensor | None,
    distance: bool,
) -> Heads:
    """Check the operands of the score; raises TypeError or ValueError, naming the argument."""
    _check_tokens("query", query, _QUERY)
    _check_tokens("key", key, _KEY)
    check_device("key", key, "query", query.device)
    batch, _, channels = query.shape
    if key.shape[0] != batch:
        raise ValueError(f"key must have the batch of query, {batch}, got {key.shape[0]}")
    if key.shape[2] != channels:
        raise ValueError(f"key must have the channels of query, C = {channels}, got {key.shape[2]}")
    if channels == 0:
        raise ValueError("query must have at least one channel, got C = 0")
    if key.shape[1] == 0:
        raise ValueError(f"key is empty: it must hold at least one position, got shape {list(key.shape)}")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an integer, got {type(num_heads).__name__}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the channels of query, C = {channels}, got {num_heads}")
    if scale is None:
        scale = (channels // num_heads) ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if identity_gate is not None:
        layout = "(B, M, 1) or (B, M, h)"
        check_tensor("identity_gate", identity_gate, layout=layout)
        width = 1 if identity_gate.shape[-1:] == (1,) else num_heads
        check_shape("identity_gate", identity_gate, (batch, key.shape[1], width), layout)
        check_device("identity_gate", identity_gate, "query", query.device)
    return Heads(query, key, identity_gate, num_heads, bool(distance), float(scale))


def check_values(
    p: Heads, value: Tensor | Sequence[Tensor], identity: Tensor | None
) -> tuple[tuple[Tensor, ...], bool]:
    """The value tensors of one match, and whether the caller gave several; all checked, `identity` too."""
    several = not isinstance(value, Tensor)
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values:
        raise ValueError("value must be a tensor or at least one of them, got an empty tuple")
    batch, memory = p.key.shape[:2]
    for index, tensor in enumerate(values):
        name = f"value[{index}]" if several else "value"
        _check_tokens(name, tensor, _VALUE)
        check_shape(name, tensor, (batch, memory, tensor.shape[2]), _VALUE)
        check_device(name, tensor, "query", p.query.device)
        if tensor.shape[2] % p.num_heads:
            raise ValueError(
                f"{name} must have channels that num_heads = {p.num_heads} divides, "
                f"got Cv = {tensor.shape[2]}"
            )
    if identity is not None:
        if several:
            raise ValueError(
                "identity is added to one value tensor, got a tuple of values: "
                "give the identities as a value of their own"
            )
        check_tensor("identity", identity, layout=_VALUE)
        check_shape("identity", identity, values[0].shape, "(B, M, Cv), as value")
        check_device("identity", identity, "query", p.query.device)
    return values, several


def _check_tokens(name: str, tensor: Tensor, layout: str) -> None:
    check_tensor(name, tensor, layout=layout)
    if tensor.dim() != 3:
        raise ValueError(f"{name} must have 3 dimensions {layout}, got shape {list(tensor.shape)}")


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """What sums of these are accumulated in: float32 at least."""
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide
