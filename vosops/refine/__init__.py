# SPDX-License-Identifier: Apache-2.0
"""Refinement of predicted masks against the image: of patches along their boundaries, or of whole frames."""

from .boundary import BoundaryRefiner, PatchSettings
from .frame import FrameRefiner
from .segmenter import RefinedSegmenter, Refiner

__all__ = ["BoundaryRefiner", "FrameRefiner", "PatchSettings", "RefinedSegmenter", "Refiner"]
