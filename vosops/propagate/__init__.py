# SPDX-License-Identifier: Apache-2.0
"""Segmenting a video from its first mask."""

from .augment import AugmentedSegmenter, estimate_memory
from .baselines import CopyFirstMask, WarpPreviousMask
from .ensemble import EnsembleSegmenter
from .label_propagator import LabelPropagator, PropagationSettings
from .probabilities import SavedProbabilities, SavingSegmenter
from .tracker import Tracker
from .zoom import ZoomSegmenter

__all__ = [
    "AugmentedSegmenter",
    "CopyFirstMask",
    "EnsembleSegmenter",
    "LabelPropagator",
    "PropagationSettings",
    "SavedProbabilities",
    "SavingSegmenter",
    "Tracker",
    "WarpPreviousMask",
    "ZoomSegmenter",
    "estimate_memory",
]
