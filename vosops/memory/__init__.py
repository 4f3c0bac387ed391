# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: which frames are kept, with keys and values in the layout the operators read."""

from .bank import MemoryBank, MemoryGroup
from .long_term import LongTerm, LongTermMemory
from .policies import Balanced, Bounded, ByteBudget, EveryNth, Policy, SharedPolicy, ThinningPolicy

__all__ = [
    "Balanced",
    "Bounded",
    "ByteBudget",
    "EveryNth",
    "LongTerm",
    "LongTermMemory",
    "MemoryBank",
    "MemoryGroup",
    "Policy",
    "SharedPolicy",
    "ThinningPolicy",
]
