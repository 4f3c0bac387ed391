# SPDX-License-Identifier: Apache-2.0
"""YouTube-VIS, OVIS and VSPW as `convert` takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .convert import ConvertError, SourceVideo
from .layouts import image_files, mask_files, subfolders
from .masks import VOID, LabelMap
from .rle import decode_segmentation

_IMAGE_FOLDERS = ("JPEGImages", "train/JPEGImages", "train", ".")


def youtube_vis_videos(source: Path) -> list[SourceVideo]:
    """The videos of YouTube-VIS (2019, 2021, 2022) or OVIS.

    Instances become the ids 1, 2, ... of their video in the order of the annotations. Where two overlap the
    smaller one is in front; crowds are void.

    Args:
        source: the JSON with videos, annotations and categories, or a folder with exactly one. The frames lie
            beside it in JPEGImages, train/JPEGImages, train, or right there.

    Raises:
        ConvertError: no such JSON, no frames, more than 254 instances in a video; names it.

    Note:
        Reads the whole JSON: several times its size in memory.
    """
    path = source if source.is_file() else _only_json(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        videos, annotations = content["videos"], content["annotations"] or []
        categories = {c["id"]: str(c["name"]) for c in content.get("categories", [])}
        instances: dict[Any, list[dict[str, Any]]] = {video["id"]: [] for video in videos}
        for annotation in annotations:
            instances[annotation["video_id"]].append(annotation)
        if not videos:
            raise ConvertError(f"{path}: names no video")
        root = _image_root(path, videos[0]["file_names"][0])
        return [
            _InstanceVideo(
                name=Path(video["file_names"][0]).parent.name or str(video["id"]),
                frames=[root / name for name in video["file_names"]],
                path=path,
                size=(video["height"], video["width"]),
                instances=instances[video["id"]],
                names=categories,
            )
            for video in videos
        ]
    except (KeyError, TypeError, IndexError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConvertError(
            f"{path}: is not the JSON of YouTube-VIS or OVIS, with videos, file_names and annotations "
            f"({type(error).__name__}: {error})"
        ) from error


def vspw_videos(source: Path) -> list[SourceVideo]:
    """The videos of VSPW, or of another set in its layout: `data/<video>/origin`, `data/<video>/mask`.

    Grey and indexed masks are VSPW's classes: ids stay as they are, 0 and 254 ("others", unlabelled) become
    void. RGB masks are panoptic ids (R + 256 G + 65536 B, as COCO writes them), numbered 1, 2, ... in the
    order in which the video shows them; 0 becomes void. Frames without a mask are left out.

    Args:
        source: holds `data`, or is that folder.

    Raises:
        ConvertError: no video in this layout, or one whose masks have no frames; names it.
    """
    root = source / "data" if (source / "data").is_dir() else source
    if not root.is_dir():
        raise ConvertError(f"{source}: no such folder")
    videos: list[SourceVideo] = []
    for folder in subfolders(root):
        if not (folder / "mask").is_dir():
            continue
        if not (folder / "origin").is_dir():
            raise ConvertError(f"{folder}: has masks, but no frames: there is no folder origin")
        images, masks = image_files(folder / "origin"), mask_files(folder / "mask")
        missing = [name for name in masks if name not in images]
        if missing:
            raise ConvertError(f"{masks[missing[0]]}: has no frame in {folder / 'origin'}")
        if masks:
            videos.append(_MaskVideo(folder.name, [images[name] for name in masks], list(masks.values())))
    if not videos:
        raise ConvertError(f"{root}: holds no video in VSPW's layout (<video>/origin, <video>/mask)")
    return videos


@dataclass
class _InstanceVideo(SourceVideo):
    name: str
    frames: Sequence[Path]
    path: Path
    size: tuple[int, int]
    instances: list[dict[str, Any]]
    names: dict[Any, str]

    def __post_init__(self) -> None:
        if len(self.instances) >= VOID:
            count = len(self.instances)
            raise ConvertError(f"{self.path}: {self.name} has {count} instances, 254 fit into a mask")

    def categories(self) -> dict[int, str]:
        return {
            number: self.names.get(instance.get("category_id"), "object")
            for number, instance in enumerate(self.instances, 1)
        }

    def labels(self, index: int) -> LabelMap:
        labels = np.zeros(self.size, np.uint8)
        masks = []
        for number, instance in enumerate(self.instances, 1):
            segmentation = instance["segmentations"][index]
            if segmentation is None:
                continue
            try:
                mask = decode_segmentation(segmentation, *self.size)
            except ValueError as error:
                raise ConvertError(
                    f"{self.path}: {self.name}, frame {self.frames[index].stem}, "
                    f"annotation {instance.get('id')}: {error}"
                ) from error
            masks.append((int(mask.sum()), VOID if instance.get("iscrowd") else number, mask))
        for _, number, mask in sorted(masks, key=lambda entry: -entry[0]):
            labels[mask] = number
        return labels


@dataclass
class _MaskVideo(SourceVideo):
    name: str
    frames: Sequence[Path]
    masks: list[Path]
    _numbers: dict[int, int] | None = field(default=None, repr=False)

    def labels(self, index: int) -> LabelMap:
        pixels = _read(self.masks[index])
        if pixels.ndim == 2:
            return np.where((pixels == 0) | (pixels >= 254), VOID, pixels).astype(np.uint8)
        found, places = np.unique(_panoptic(pixels), return_inverse=True)
        numbers = self._numbering()
        values = np.array([numbers[int(number)] for number in found], np.uint8)
        return np.asarray(values[places.reshape(pixels.shape[:2])])

    def _numbering(self) -> dict[int, int]:
        """Panoptic id -> id, from all of the video's masks: a call that goes on numbers as the first did."""
        if self._numbers is None:
            numbers = {0: VOID}
            for path in self.masks:
                for number in np.unique(_panoptic(_read(path))):
                    numbers.setdefault(int(number), len(numbers))
            if len(numbers) > VOID:
                raise ConvertError(
                    f"{self.masks[0].parent}: has {len(numbers) - 1} segments, 254 fit into a mask"
                )
            self._numbers = numbers
        return self._numbers


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "L", "RGB"):
                return np.asarray(image)
            mode = image.mode
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConvertError(f"{path}: cannot be decoded ({error})") from error
    raise ConvertError(f"{path}: has mode {mode}, expected a grey, indexed or RGB PNG")


def _panoptic(pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
    return np.asarray(pixels.astype(np.int64) @ np.array([1, 256, 65536]))


def _only_json(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder or JSON file")
    found = sorted(folder.glob("*.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5]) or "none"
        raise ConvertError(
            f"{folder}: expected exactly one JSON of annotations, found {names}; pass the file"
        )
    return found[0]


def _image_root(path: Path, first: str) -> Path:
    for name in _IMAGE_FOLDERS:
        if (path.parent / name / first).is_file():
            return path.parent / name
    raise ConvertError(
        f"{path}: its first frame {first} is in none of the folders {', '.join(_IMAGE_FOLDERS)} beside it"
    )
