# SPDX-License-Identifier: Apache-2.0
"""Dense optical flow between two frames, and the maps it carries along."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
FloatMap = NDArray[np.float32]

# DIS works on patches of 8 pixels over a pyramid; below this it cannot build a level.
_SMALLEST = 32


def dense_flow(source: Frame, target: Frame) -> FloatMap:
    """Where every pixel of `source` goes in `target`: Dense Inverse Search flow (OpenCV, medium preset).

    Args:
        source, target: (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 2) float32 displacement (x, y) in pixels. Frames with a side below 32 pixels are enlarged
        for the search.

    Note:
        Cost: about 45 ms for 854x480 on one core. Source: Kroeger et al., ECCV 2016.
    """
    height, width = source.shape[:2]
    factor = max(1.0, _SMALLEST / min(height, width))
    grays = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (source, target)]
    if factor > 1:
        size = (max(_SMALLEST, round(width * factor)), max(_SMALLEST, round(height * factor)))
        grays = [cv2.resize(gray, size, interpolation=cv2.INTER_LINEAR) for gray in grays]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = np.asarray(search.calc(grays[0], grays[1], None), np.float32)  # type: ignore[call-overload]
    if factor > 1:
        scale = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
        flow = cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32) * scale
    return flow


def warp_back(image: FloatMap, flow: FloatMap) -> FloatMap:
    """The previous frame's map seen from the present one: image[x + flow(x)], bilinear.

    Args:
        image: (H, W) or (H, W, C) float32 of the previous frame.
        flow: (H, W, 2) of `dense_flow` from the present frame to the previous one.

    Returns:
        The shape of `image`; beyond the border the nearest pixel counts.
    """
    height, width = flow.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    warped = cv2.remap(
        image, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(warped, np.float32).reshape(image.shape)
