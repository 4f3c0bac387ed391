# SPDX-License-Identifier: Apache-2.0
from .api import memory_gather, memory_match, memory_read
from .problem import Match

__all__ = ["Match", "memory_gather", "memory_match", "memory_read"]
