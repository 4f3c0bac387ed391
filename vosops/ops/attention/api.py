# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention over a memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..memory_read.problem import check_top_k
from . import limits, native, reference
from .problem import check_heads, check_values

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "cpu": partial(native.attend, ""),
    "triton": partial(native.attend, "triton_"),
    "reference": reference.attend,
}


def attention(
    query: Tensor,  # [B, Q, C]
    key: Tensor,  # [B, M, C]
    value: Tensor | Sequence[Tensor],  # [B, M, Cv], or several
    *,
    num_heads: int,
    scale: float | None = None,
    identity: Tensor | None = None,  # [B, M, Cv]
    identity_gate: Tensor | None = None,  # [B, M, 1] or [B, M, h]
    top_k: int | None = None,
    distance: bool = False,
    return_usage: bool = False,
) -> Any:
    """Multi-head attention of AOT's transformer blocks: self-attention and long-term attention.

    For every head, with K' = key * identity_gate and V' = value + identity, neither of which is ever stored:
    s_ij = scale <q_i, k'_j>, or 2 scale <q_i, k'_j> - |k'_j|^2 with `distance`; a softmax over j of all
    scores, or of the `top_k` largest, its maximum subtracted, weighs the values.

    Args:
        query: (B, Q, C). Any strides, here and below: a caller that holds (N, B, C), as AOT does, passes
            `x.transpose(0, 1)`, and nothing is copied.
        key: (B, M, C).
        value: (B, M, Cv), or a tuple of such tensors, of any widths, that are read with one match (DeAOT's
            visual and identity values). Cv may differ from C.
        num_heads: h; divides C and Cv. Head n has channels [n C/h, (n + 1) C/h), and those of Cv likewise.
        scale: of the inner product; 1/sqrt(C/h) by default. The norm of `distance` is not scaled.
        identity: (B, M, Cv) identity embedding that is added to `value`; not with a tuple of values.
        identity_gate: (B, M, 1), or (B, M, h) one per head, factor on the keys.
        top_k: memory positions kept per query and head; None keeps all, more than M means all. Among equal
            scores the lowest index wins.
        distance: score by the negative squared distance, without its term constant in j.
        return_usage: also return the attention mass of every memory position.

    Returns:
        The read (B, Q, Cv), or a tuple of reads for a tuple of values, in the promoted dtype of query and
        value. With return_usage (read, usage): usage (B, M) = sum of the weights over heads and queries,
        float32, not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        BackendError: a forced backend cannot serve the call.

    Note:
        dtypes float32, bfloat16, float16 (float64 on the reference backend), freely mixed; scores and
        sums are accumulated in float32 at least. Autocast changes nothing.
        Cost: 2 B Q M C operations for the scores, plus 2 B h Q k Cv/h for the read with top_k, 2 B Q M Cv
        without; usage without top_k computes the scores again. Extra memory O(h Q k) or O(Q Cv), never
        O(Q M), on the cpu and triton backends; the reference stores h Q M. The gradient for a tuple of
        values without top_k concatenates them.
        Differentiable with respect to query, key, value, identity and identity_gate.
        NaN in a query makes that query's head NaN, NaN in a key makes all queries of its head NaN.

    Sources: AOT (Yang et al., NeurIPS 2021), eq. 2-4; DeAOT (Yang and Yang, NeurIPS 2022), gated propagation;
    the 5th place solution of the 4th LSVOS challenge (LSTT and LSTT block V2), eq. 2-3: V' and K'.

    Example:
        >>> query, key, value = (torch.randn(1, n, 256) for n in (1674, 5022, 5022))
        >>> vosops.attention(query, key, value, num_heads=8, top_k=32).shape
        torch.Size([1, 1674, 256])
    """
    p = check_heads(query, key, num_heads, scale, identity_gate, distance)
    values, several = check_values(p, value, identity)
    kept = None if top_k is None else check_top_k(top_k)
    if kept is not None and kept >= p.memory:
        kept = None  # all of them: the dense read, which keeps no list
    tensors = {"query": query, "key": key}
    tensors |= {f"value[{i}]" if several else "value": tensor for i, tensor in enumerate(values)}
    tensors |= {"identity": identity} if identity is not None else {}
    tensors |= {"identity_gate": identity_gate} if identity_gate is not None else {}
    attend = _IMPLEMENTATIONS[
        backends.choose("attention", tensors, lambda backend: limits.reasons_against(backend, p, kept))
    ]
    autocast = torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
        reads, usage = attend(p, values, identity, kept, return_usage)
    typed = tuple(
        read.to(torch.promote_types(query.dtype, tensor.dtype))
        for read, tensor in zip(reads, values, strict=True)
    )
    result = typed if several else typed[0]
    return (result, usage) if return_usage else result
