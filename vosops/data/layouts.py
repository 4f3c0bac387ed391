# SPDX-License-Identifier: Apache-2.0
"""Where data sets keep their frames and masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .frames import IMAGE_SUFFIXES

# Folders of still images and of their masks, as the data sets are published.
REGION_FOLDERS = (("images", "regions"),)
SALIENCY_FOLDERS = (
    ("images", "masks"),
    ("images", "ground_truth_mask"),  # ECSSD
    ("DUTS-TR-Image", "DUTS-TR-Mask"),
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
)


class LayoutError(ValueError):
    """A folder that is no data set of a known layout; the message says what was looked for."""


@dataclass(frozen=True)
class VideoFolders:
    """Where the sequences of a video set are.

    Attributes:
        images, masks: folders of sequences.
        dense: DAVIS's layout, in which every image has a mask; YouTube-VOS's has masks of some.
    """

    images: Path
    masks: Path
    dense: bool


def static_folders(root: Path, pairs: tuple[tuple[str, str], ...]) -> tuple[Path, Path]:
    """The folders of images and masks under `root`: the first of the pairs that is there.

    Raises:
        LayoutError: none is.
    """
    for images, masks in pairs:
        if (root / images).is_dir() and (root / masks).is_dir():
            return root / images, root / masks
    expected = " or ".join(f"{images}/ and {masks}/" for images, masks in pairs)
    raise LayoutError(f"{root}: has no folders {expected}")


def video_folders(root: Path, *, dense: bool | None = None) -> VideoFolders:
    """The folders of sequences under `root`.

    Args:
        root: holds JPEGImages and Annotations. In DAVIS's layout both have a folder of the resolution (480p
            if there, else the only one) that holds the sequences, in YouTube-VOS's they hold the sequences.
        dense: True for DAVIS's layout, False for YouTube-VOS's, None finds out.

    Raises:
        LayoutError: a folder is missing, or there are several resolutions and none is 480p.
    """
    images, masks = root / "JPEGImages", root / "Annotations"
    for folder in (images, masks):
        if not folder.is_dir():
            raise LayoutError(
                f"{folder}: no such folder, though the layouts of DAVIS and YouTube-VOS have it"
            )
    folders = subfolders(masks)
    if dense is None:
        dense = any(subfolders(folder) for folder in folders)
    if not dense:
        return VideoFolders(images, masks, False)
    names = [folder.name for folder in folders]
    if "480p" not in names and len(names) != 1:
        raise LayoutError(f"{masks}: expected a folder 480p, or one resolution only; found {names[:5]}")
    resolution = "480p" if "480p" in names else names[0]
    return VideoFolders(images / resolution, masks / resolution, True)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path) -> dict[str, Path]:
    """The images in a folder by their stem, in the order of their names."""
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    return {p.stem: p for p in files if p.suffix.lower() in IMAGE_SUFFIXES}


def mask_files(folder: Path) -> dict[str, Path]:
    """The PNGs in a folder by their stem, in the order of their names."""
    return {p.stem: p for p in sorted(folder.glob("*.png")) if not p.name.startswith(".")}
