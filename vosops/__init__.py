# SPDX-License-Identifier: Apache-2.0
"""Fused memory-matching operators for video object segmentation."""

from typing import TYPE_CHECKING, Any

from vosops.ops.aggregate import soft_aggregate
from vosops.ops.attention import attention
from vosops.ops.backends import BackendError, backend_report, use_backend
from vosops.ops.identity import identity_embedding
from vosops.ops.local_attention import local_attention
from vosops.ops.memory_read import Match, memory_gather, memory_match, memory_read
from vosops.ops.priors import CenterPrior, KernelPrior, MaskPrior

if TYPE_CHECKING:
    from vosops import compat
    from vosops.compat import accelerate

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CenterPrior",
    "KernelPrior",
    "MaskPrior",
    "Match",
    "accelerate",
    "attention",
    "backend_report",
    "compat",
    "identity_embedding",
    "local_attention",
    "memory_gather",
    "memory_match",
    "memory_read",
    "soft_aggregate",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # Only who replaces published code pays for importing what does it.
    if name in ("accelerate", "compat"):
        import importlib

        compat = importlib.import_module("vosops.compat")
        return compat if name == "compat" else compat.accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
