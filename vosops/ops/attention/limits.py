# SPDX-License-Identifier: Apache-2.0
"""What attention's compiled backends cannot serve, beyond device and dtype: one list of reasons."""

from __future__ import annotations

from ..memory_read.limits import LARGEST_TOP_K
from .problem import Heads

_CHANNELS = 128


def reasons_against(backend: str, p: Heads, top_k: int | None) -> list[str]:
    """Reasons of `backend` against a call; top_k None reads densely."""
    if backend == "cuda":
        return ["it has no attention"]
    if backend != "triton":
        return []
    reasons = []
    if top_k is not None and top_k > LARGEST_TOP_K:
        reasons.append(f"top_k is {top_k}, it keeps at most {LARGEST_TOP_K}")
    channels = p.query.shape[2] // p.num_heads
    if channels > _CHANNELS:
        reasons.append(f"query has C/h = {channels} channels a head, it serves at most {_CHANNELS}")
    return reasons
