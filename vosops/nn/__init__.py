# SPDX-License-Identifier: Apache-2.0
"""The parts of AOT and DeAOT on the operators, with the parameter names of the published checkpoints."""

from .attention import LongTermAttention, MultiHeadAttention, ShortTermAttention
from .gated import (
    GatedPropagation,
    GatedPropagationBlock,
    GatedPropagationModule,
    LocalGatedPropagation,
    SelfGatedPropagation,
)
from .identity import IdentityBank, sine_position
from .lstt import LSTT, LSTTBlock, LSTTBlockV2, Memory, Read

__all__ = [
    "LSTT",
    "GatedPropagation",
    "GatedPropagationBlock",
    "GatedPropagationModule",
    "IdentityBank",
    "LSTTBlock",
    "LSTTBlockV2",
    "LocalGatedPropagation",
    "LongTermAttention",
    "Memory",
    "MultiHeadAttention",
    "Read",
    "SelfGatedPropagation",
    "ShortTermAttention",
    "sine_position",
]
