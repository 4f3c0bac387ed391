# SPDX-License-Identifier: Apache-2.0
"""Video object segmentation models built on the operators: `create` or `load` one by name."""

from .checkpoint import CheckpointError
from .registry import MODELS, ModelInfo, create, load
from .session import Session, SessionSettings, VideoModel

__all__ = [
    "MODELS",
    "CheckpointError",
    "ModelInfo",
    "Session",
    "SessionSettings",
    "VideoModel",
    "create",
    "load",
]
