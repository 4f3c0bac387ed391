# SPDX-License-Identifier: Apache-2.0
"""Local attention's operators in Triton: one function per operator of schema.py, with its arguments."""

from __future__ import annotations

from .backward import backward
from .forward import forward

local_attention = forward
local_attention_backward = backward
