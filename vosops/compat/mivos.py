# SPDX-License-Identifier: Apache-2.0
"""The propagation of MiVOS (Mask-Propagation): its memory readers, top-k and kernelized ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vosops import KernelPrior, memory_read

from .lazy import like_matmul
from .patching import CodeBase, Target
from .report import Report


def _evaluation(self: Any, mk: Tensor, mv: Tensor, qk: Tensor) -> Tensor:
    """EvalMemoryReader.forward: what every object reads.

    Any number of objects at once; the published top-k and kernel take one.

    Args:
        mk: (objects, Ck, T, H, W) memory keys, of every object its own.
        mv: (objects, Cv, T, H, W) memory values.
        qk: (1, Ck, H, W) query keys.

    Returns:
        (objects, Cv, H, W), with the module's `top_k` (None: all positions) and `km`, the standard deviation
        of the Gaussian in cells (None: no Gaussian).
    """
    prior = None if self.km is None else KernelPrior(sigma=self.km)
    query = qk.expand(mk.shape[0], -1, -1, -1)
    read = memory_read(query, mk, mv[:, None], top_k=self.top_k, prior=prior)
    assert isinstance(read, Tensor)
    return like_matmul(read)[:, 0]


def _training(self: Any, mk: Tensor, mv: Tensor, qk: Tensor, qv: Tensor) -> Tensor:
    """MemoryReader.forward: the dense read (B, Cv, H, W) joined with the query's value qv (B, Cq, H, W)."""
    read = memory_read(qk, mk, mv[:, None])
    assert isinstance(read, Tensor)
    return torch.cat((like_matmul(read)[:, 0], qv), 1)


CODE_BASE = CodeBase(
    name="MiVOS",
    source="github.com/hkchengrex/Mask-Propagation",
    imports="model.eval_network for evaluation, model.network for training",
    targets=(
        Target("model.eval_network", "EvalMemoryReader.forward", _evaluation, ("a05d8a5a3851",)),
        Target("model.network", "MemoryReader.forward", _training, ("386dd2cb4573",)),
    ),
    kept=(("AttentionMemory", "the correspondence demonstration shows the affinity itself"),),
)


def enable() -> Report:
    """Replace the memory readers wherever the code is imported; see `CodeBase.enable`."""
    return CODE_BASE.enable()


def disable() -> None:
    """Put the published code back; see `CodeBase.disable`."""
    CODE_BASE.disable()
