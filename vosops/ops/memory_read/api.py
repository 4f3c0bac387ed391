# SPDX-License-Identifier: Apache-2.0
"""The public functions of the memory read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends
from ..priors import CenterPrior, MaskPrior, Prior
from . import limits, reference
from .native import Kernels
from .problem import (
    Match,
    Scores,
    build_scores,
    check_match,
    check_prior,
    check_top_k,
    check_value,
    kernel_precision,
    mask_log_prior,
)

_COMPILED = Kernels("")
_IMPLEMENTATIONS: dict[str, Any] = {
    "cpu": _COMPILED,
    "cuda": _COMPILED,
    "triton": Kernels("triton_"),
    "reference": reference,
}


def memory_read(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    memory_value: Tensor,  # [B, O, Cv, *m]
    *,
    similarity: Literal["dot", "l2"] = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    top_k: int | None = None,
    prior: Prior | None = None,
    memory_mask: Tensor | None = None,  # [B, *m]
    return_usage: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Space-time memory read: every query takes the softmax-weighted mean of the memory values it matches.

    The score of query i and memory position j, times `scale`, is

    - "dot": <q_i, k_j> (STM, KMN);
    - "l2": 2 <q_i, k_j> - |k_j|^2, the negative squared distance without its term constant in j (STCN);
      times r_j with `shrinkage`;
    - "l2" with `selection`: -r_j sum_c e_ic (k_jc - q_ic)^2 (XMem, Cutie).

    `prior` adds a Gaussian around a centre, `top_k` keeps the best scores of each query, a softmax over
    what is kept (its maximum subtracted) weighs the values.

    Args:
        query_key: (B, Ck, *q) keys of the queries, any number of spatial dimensions.
        memory_key: (B, Ck, *m) keys of the memory, e.g. *m = (T, H, W). Any strides; position-major
            (channels last), as `MemoryBank` stores it, is the fast layout.
        memory_value: (B, O, Cv, *m) values of O objects that share the keys. Any strides.
        similarity: "dot" or "l2".
        scale: factor on the similarity; 1/sqrt(Ck) by default.
        shrinkage: (B, 1, *m) r_j of XMem; only with "l2".
        selection: (B, Ck, *q) e_i of XMem; only with "l2".
        top_k: memory positions kept per query; None keeps all, more than M means all. Among equal scores
            the lowest index wins, except on the reference backend.
        prior: KernelPrior, MaskPrior or CenterPrior; needs *q = (H, W).
        memory_mask: (B, *m) bool; a False position never matches. A query that can match nothing reads 0.
        return_usage: also return the usage.

    Returns:
        The read (B, O, Cv, *q), contiguous, in the promoted dtype of query_key and memory_value. With
        return_usage also usage (B, *m) = sum_i w_ij, float32, not differentiable.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        BackendError: a forced backend cannot serve the call.

    Note:
        dtypes float32, bfloat16, float16 (float64 on the reference backend), freely mixed; scores and
        sums are accumulated in float32 at least. Autocast changes nothing: affinities stay in float32.
        Cost: 2 B Q M Ck operations for the scores (twice that with selection), plus 2 B Q k O Cv for the
        read with top_k, 2 B Q M O Cv without. Extra memory O(Q k) or O(Q O Cv), never O(Q M).
        A score of -inf never matches. NaN in a query makes that query NaN, NaN in a memory key that is
        not masked makes every query of its batch entry NaN, as a softmax does.

    Sources: STM (Oh et al., ICCV 2019, eq. 1), KMN (Seong et al., ECCV 2020, eq. 5-6), STCN (Cheng et
    al., NeurIPS 2021, eq. 4), XMem (Cheng and Schwing, ECCV 2022, eq. 2-3).

    Example:
        >>> query_key, memory_key = torch.randn(1, 64, 30, 54), torch.randn(1, 64, 10, 30, 54)
        >>> memory_value = torch.randn(1, 3, 512, 10, 30, 54)
        >>> vosops.memory_read(query_key, memory_key, memory_value, similarity="l2", top_k=20).shape
        torch.Size([1, 3, 512, 30, 54])
    """
    p = build_scores(query_key, memory_key, similarity, scale, shrinkage, selection, memory_mask)
    check_value(memory_value, p.memory_key.shape[0], memory_key.shape[2:], query_key.device)
    kept = None if top_k is None else check_top_k(top_k)
    if kept is not None and kept >= p.memory:
        kept = None  # all of them: the dense read, which keeps no list
    if prior is not None:
        p = check_prior(p, prior)
    tensors = {**p.tensors(), "memory_value": memory_value}
    implementation = _implementation("memory_read", tensors, kept, prior)
    dtype = torch.promote_types(query_key.dtype, memory_value.dtype)
    usage = None
    with _full_precision(query_key.device):
        if prior is not None:
            p = _with_prior(p, prior, implementation)
        if kept is None:
            read, usage = implementation.read(p, memory_value, dtype, return_usage)
        else:
            indices, weights = implementation.match(p, kept)
            read = implementation.gather(indices, weights, memory_value, dtype)
            usage = _usage(indices, weights, p) if return_usage else None
    read = read.unflatten(-1, query_key.shape[2:])
    return read if usage is None else (read, usage.unflatten(-1, memory_key.shape[2:]))


def memory_match(
    query_key: Tensor,  # [B, Ck, *q]
    memory_key: Tensor,  # [B, Ck, *m]
    *,
    top_k: int,
    similarity: Literal["dot", "l2"] = "dot",
    scale: float | None = None,
    shrinkage: Tensor | None = None,  # [B, 1, *m]
    selection: Tensor | None = None,  # [B, Ck, *q]
    prior: Prior | None = None,
    memory_mask: Tensor | None = None,  # [B, *m]
) -> Match:
    """The matching half of `memory_read`: which memory positions each query keeps, and their weights.

    For models that read several value banks with one match (XMem's groups, Cutie's buckets).

    Args: as in `memory_read`.

    Returns:
        Match(indices (B, Q, k), weights (B, Q, k), query_shape), k = min(top_k, M), best first. The
        weights are differentiable with respect to the keys, shrinkage and selection.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        BackendError: a forced backend cannot serve the call.

    Note:
        Cost: 2 B Q M Ck operations (twice that with selection). Extra memory O(Q k).

    Example:
        >>> match = vosops.memory_match(query_key, memory_key, top_k=30, similarity="l2")
        >>> reads = [vosops.memory_gather(match, value) for value in banks]
    """
    p = build_scores(query_key, memory_key, similarity, scale, shrinkage, selection, memory_mask)
    kept = check_top_k(top_k)
    if prior is not None:
        p = check_prior(p, prior)
    implementation = _implementation("memory_match", p.tensors(), kept, prior)
    with _full_precision(query_key.device):
        if prior is not None:
            p = _with_prior(p, prior, implementation)
        indices, weights = implementation.match(p, kept)
    return Match(indices, weights, tuple(query_key.shape[2:]))


def memory_gather(match: Match, memory_value: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The reading half of `memory_read`: sum_j w_ij v_jo over the kept positions of every query.

    Args:
        match: of `memory_match`.
        memory_value: (B, O, Cv, *m), any strides; the same M positions that were matched.
        dtype: of the result; memory_value's by default.

    Returns:
        (B, O, Cv, *q), contiguous. Differentiable with respect to the weights and the values.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        RuntimeError: an index of the match lies past the memory; on a GPU its query reads NaN instead.
        BackendError: a forced backend cannot serve the call.

    Note:
        Cost: 2 B Q k O Cv operations. Extra memory: a tile of transposed values where channels are not
        innermost.
    """
    check_match(match)
    batch, device = match.indices.shape[0], match.indices.device
    check_value(memory_value, batch, None, device)
    tensors = {"match.weights": match.weights, "memory_value": memory_value}
    implementation = _implementation("memory_gather", tensors, 0, None)
    with _full_precision(device):
        read = implementation.gather(match.indices, match.weights, memory_value, dtype or memory_value.dtype)
    return read.unflatten(-1, match.query_shape)


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: affinities stay in float32. Outside of autocast nothing, for torch.export."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _implementation(operator: str, tensors: dict[str, Tensor], top_k: int | None, prior: Prior | None) -> Any:
    def reasons(backend: str) -> list[str]:
        return limits.reasons_against(backend, tensors, top_k, prior)

    return _IMPLEMENTATIONS[backends.choose(operator, tensors, reasons)]


def _with_prior(p: Scores, prior: Prior, implementation: Any) -> Scores:
    """The scores with the prior's centres and precisions, which are constants for autograd."""
    precision = kernel_precision(p, prior)  # [B, M]
    if isinstance(prior, CenterPrior):
        centers = prior.centers.flatten(1, -2).float().expand(*precision.shape, 2).contiguous()
        return replace(p, centers=centers, precision=precision)
    with torch.no_grad():
        width = p.query_key.shape[-1]
        log_prior = gain = None
        if isinstance(prior, MaskPrior):
            log_prior = mask_log_prior(prior, p.cells(precision))
            gain = prior.strength * prior.memory_object_mask.flatten(1).float()
        best = implementation.best_query(p, log_prior, gain)  # [B, M]
        centers = torch.stack((best.div(width, rounding_mode="floor"), best.remainder(width)), -1).float()
    return replace(p, centers=centers, precision=precision)


def _usage(indices: Tensor, weights: Tensor, p: Scores) -> Tensor:
    """usage_j = sum_i w_ij of the kept positions.  # [B, M]"""
    batch, memory = p.memory_key.shape[0], p.memory
    rows = indices.clamp(min=0) + torch.arange(batch, device=indices.device)[:, None, None] * memory
    # index_add has a deterministic form on every device, scatter_add has not.
    usage = weights.new_zeros(batch * memory).index_add(0, rows.flatten(), weights.detach().flatten())
    return usage.view(batch, memory)
