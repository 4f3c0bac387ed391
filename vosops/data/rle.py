# SPDX-License-Identifier: Apache-2.0
"""COCO's ways of writing a mask: run lengths, run lengths in text, polygons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.draw import polygon as draw_polygon

Mask = NDArray[np.bool_]  # [H, W]


def decode_segmentation(segmentation: Any, height: int, width: int) -> Mask:
    """A mask of COCO's JSON.

    Args:
        segmentation: {"size": [H, W], "counts": [..] or "text"}, or a list of polygons [x0, y0, x1, y1, ...]
            in pixels; a pixel belongs to a polygon that holds its centre.
        height, width: of the frame, pixels.

    Returns:
        (H, W) bool. Cost: O(H W).

    Raises:
        ValueError: another size than the frame's, run lengths that do not add up, or neither form.

    Source: the formats of the COCO API (Lin et al., 2014), as YouTube-VIS and OVIS use them.
    """
    if isinstance(segmentation, dict):
        size, counts = list(segmentation.get("size", ())), segmentation.get("counts")
        if size != [height, width]:
            raise ValueError(f"its size is {size}, the frame's [H, W] is {[height, width]}")
        if isinstance(counts, str):
            counts = run_lengths(counts)
        if not isinstance(counts, list):
            raise ValueError(f"counts must be a list or a text, got {type(counts).__name__}")
        return _from_runs(counts, height, width)
    if isinstance(segmentation, list) and all(isinstance(part, list) for part in segmentation):
        return _from_polygons(segmentation, height, width)
    raise ValueError(f"expected run lengths or polygons, got {type(segmentation).__name__}")


def run_lengths(text: str) -> list[int]:
    """The run lengths behind COCO's text.

    Each number is written in groups of five bits, lowest first, as characters from '0' on; bit 5 says that
    another group follows, bit 4 of the last one is the sign. From the fourth on, numbers are differences to
    the one before the previous.

    Raises:
        ValueError: a character outside of the code, or a number that does not end.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"counts hold the character {character!r}, which is no run length")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("counts end within a number")
    return runs


def _from_runs(runs: Sequence[int], height: int, width: int) -> Mask:
    lengths = np.asarray(runs, np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"its run lengths add up to {lengths.sum()}, the frame has {height * width} pixels")
    values = np.arange(len(lengths)) % 2 == 1
    return np.repeat(values, lengths).reshape(width, height).T  # runs go down the columns


def _from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> Mask:
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must have at least three points x, y, got {len(polygon)} numbers")
        # A pixel's centre lies half a pixel from its corner, where COCO's coordinates begin.
        x, y = np.reshape(polygon, (-1, 2)).T - 0.5
        mask[draw_polygon(y, x, (height, width))] = True  # type: ignore[no-untyped-call]
    return mask
