# SPDX-License-Identifier: Apache-2.0
"""STM's published code: its Memory module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .affinity import Affinity, Operands
from .patching import CodeBase, Target
from .report import Report


def _forward(self: Any, m_in: Tensor, m_out: Tensor, q_in: Tensor, q_out: Tensor) -> tuple[Tensor, Tensor]:
    """Memory.forward: the read joined with the query's value, and the affinity.

    Args:
        m_in: (objects, Ck, T, H, W) memory keys, of every object its own.
        m_out: (objects, Cv, T, H, W) memory values.
        q_in: (objects, Ck, H, W) query keys.
        q_out: (objects, Cq, H, W) query values.

    Returns:
        ((objects, Cv + Cq, H, W), (objects, T*H*W, H*W)); the second is not stored, and computed only if
        something asks for its numbers.
    """
    operands = Operands(m_in.flatten(2), q_in.flatten(2), similarity="dot")
    affinity = Affinity(operands, None, torch.promote_types(m_in.dtype, q_in.dtype))
    read = affinity.read(m_out.flatten(2)[:, None])[:, 0]
    return torch.cat((read.unflatten(2, q_in.shape[-2:]), q_out), 1), affinity


CODE_BASE = CodeBase(
    name="STM",
    source="github.com/seoungwugoh/STM",
    imports="model",
    targets=(Target("model", "Memory.forward", _forward, ("77df53909952",)),),
)


def enable() -> Report:
    """Replace STM's memory read wherever its code is imported; see `CodeBase.enable`."""
    return CODE_BASE.enable()


def disable() -> None:
    """Put STM's published code back; see `CodeBase.disable`."""
    CODE_BASE.disable()
