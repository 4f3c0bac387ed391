# SPDX-License-Identifier: Apache-2.0
"""Reading frames and masks, writing masks, overlays and contact sheets."""

from .files import WriteError
from .frames import FrameError, FrameSource, open_frames
from .masks import MaskError, davis_palette, ids_from_colours, object_ids, read_labels, read_mask, write_mask
from .writers import evenly_spaced, overlay, video_writer, write_contact_sheet

__all__ = [
    "FrameError",
    "FrameSource",
    "MaskError",
    "WriteError",
    "davis_palette",
    "evenly_spaced",
    "ids_from_colours",
    "object_ids",
    "open_frames",
    "overlay",
    "read_labels",
    "read_mask",
    "video_writer",
    "write_contact_sheet",
    "write_mask",
]
