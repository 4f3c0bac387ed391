# SPDX-License-Identifier: Apache-2.0
"""Fused memory-matching operators for video object segmentation."""

from vosops.ops.aggregate import soft_aggregate
from vosops.ops.attention import attention
from vosops.ops.backends import BackendError, backend_report, use_backend
from vosops.ops.identity import identity_embedding
from vosops.ops.local_attention import local_attention
from vosops.ops.memory_read import Match, memory_gather, memory_match, memory_read
from vosops.ops.priors import CenterPrior, KernelPrior, MaskPrior

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CenterPrior",
    "KernelPrior",
    "MaskPrior",
    "Match",
    "attention",
    "backend_report",
    "identity_embedding",
    "local_attention",
    "memory_gather",
    "memory_match",
    "memory_read",
    "soft_aggregate",
    "use_backend",
]
