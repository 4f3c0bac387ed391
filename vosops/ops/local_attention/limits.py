# SPDX-License-Identifier: Apache-2.0
"""What the backends of local attention do not serve."""

from __future__ import annotations

import torch

from .problem import Window

_KEY_CHANNELS = 128  # of a head, in the CUDA C++ kernels
_VALUE_CHANNELS = 1024
_WINDOW = 15
_HEADS = 65535  # of all batch entries: a dimension of the launch


def reasons_against(backend: str, p: Window) -> list[str]:
    """Every reason of the operator's own why `backend` cannot serve the call; empty if it can."""
    if backend != "cuda":
        return []
    reasons = []
    dtypes = {x.dtype for x in (p.query, p.key, p.value)}
    if len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16}:
        got = ", ".join(str(x.dtype).removeprefix("torch.") for x in (p.query, p.key, p.value))
        reasons.append(f"query, key and value must all be bfloat16 or all float16, got {got}")
    for name, tensor, most in (("query", p.query, _KEY_CHANNELS), ("value", p.value, _VALUE_CHANNELS)):
        channels = tensor.shape[1] // p.num_heads
        if channels % 8 or channels > most:
            reasons.append(
                f"a head of {name} must have a multiple of 8 channels, at most {most}, got {channels}"
            )
    if p.window > _WINDOW:
        reasons.append(f"window must be at most {_WINDOW}, got {p.window}")
    if p.dilation != 1:
        reasons.append(f"dilation must be 1, got {p.dilation}")
    if p.query.shape[0] * p.num_heads > _HEADS:
        reasons.append(f"batch times num_heads must be at most {_HEADS}")
    if p.query[:, :1].numel() >= 2**31:
        reasons.append("batch times height times width must be below 2^31")
    return reasons
