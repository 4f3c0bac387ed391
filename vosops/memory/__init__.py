# SPDX-License-Identifier: Apache-2.0
"""The memory of a video: which frames are kept, with keys and values in the layout the operators read."""

from .bank import MemoryBank, MemoryGroup
from .policies import Bounded, ByteBudget, EveryNth, Policy

__all__ = ["Bounded", "ByteBudget", "EveryNth", "MemoryBank", "MemoryGroup", "Policy"]
