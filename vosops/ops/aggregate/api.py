# SPDX-License-Identifier: Apache-2.0
"""Soft aggregation of independent object probabilities."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..checks import check_rank, check_tensor
from . import native, reference


def soft_aggregate(probabilities: Tensor) -> Tensor:
    """Merge independent object probabilities into logits of background and objects.

    The background is prod_o (1 - p_o); every probability is clamped to [1e-7, 1 - 1e-7] and turned into
    log(p / (1 - p)). The softmax of the result over dimension 1 is the merged probability.

    Args:
        probabilities: (B, O, H, W), or any (B, O, ...), in [0, 1].

    Returns:
        logits (B, O + 1, H, W), background first, in the dtype of `probabilities` (bfloat16 and float16
        are computed in float32, where 1 - 1e-7 is not 1).

    Raises:
        TypeError, ValueError: `probabilities` is no floating-point tensor of at least two dimensions.
        BackendError: a forced backend cannot serve the call.

    Note:
        Cost: one pass over the input; differentiable (no gradient where the clamp is active).

    Source: STM (Oh et al., ICCV 2019), eq. 4, from Wug Oh et al., CVPR 2018.

    Example:
        >>> merged = vosops.soft_aggregate(torch.sigmoid(object_logits)).softmax(1)
    """
    check_tensor("probabilities", probabilities, layout="(B, O, H, W)")
    check_rank("probabilities", probabilities, 2, "(B, O, H, W)")
    backend = backends.choose("soft_aggregate", {"probabilities": probabilities}, _limits)
    if backend == "reference":
        return reference.soft_aggregate(probabilities)
    return native.soft_aggregate(probabilities, "triton_" if backend == "triton" else "")


def _limits(backend: str) -> list[str]:
    return ["it has no soft_aggregate"] if backend == "cuda" else []
