# SPDX-License-Identifier: Apache-2.0
"""Segmenting a video from its first mask."""

from .augment import AugmentedSegmenter
from .baselines import CopyFirstMask, WarpPreviousMask
from .label_propagator import LabelPropagator, PropagationSettings
from .tracker import Tracker

__all__ = [
    "AugmentedSegmenter",
    "CopyFirstMask",
    "LabelPropagator",
    "PropagationSettings",
    "Tracker",
    "WarpPreviousMask",
]
