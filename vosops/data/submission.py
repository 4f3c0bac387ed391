# SPDX-License-Identifier: Apache-2.0
"""Zip files as the evaluation servers of DAVIS and YouTube-VOS take them, checked before they are written."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from .files import replacing
from .layouts import LayoutError, VideoFolders, image_files, mask_files, subfolders, video_folders
from .masks import LabelMap, davis_palette, object_ids, read_labels

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold: the same masks give the same file
_SHOWN = 5


class SubmissionError(ValueError):
    """Results that a server would refuse; the message names the files at fault."""


def write_submission(
    results: str | Path,
    data: str | Path,
    target: str | Path,
    *,
    sequences: Sequence[str] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes the results of a data set as the zip that its evaluation server takes.

    | layout of `data` | in the zip | frames |
    |---|---|---|
    | DAVIS | `<sequence>/<frame>.png`, no folder above | every frame, the first and the last included |
    | YouTube-VOS | `Annotations/<video>/<frame>.png` | those of `data`'s JPEGImages |

    Masks become 8-bit indexed PNGs with the DAVIS palette. The frames are those of `data`, so that results
    of YouTube-VOS's `valid_all_frames` are cut to what is scored by naming `valid` here. The file takes its
    place when it is complete, and is a function of the masks.

    Args:
        results: folder with <sequence>/<frame>.png or <sequence>/masks/<frame>.png, as
            `vosops dataset run` writes it.
        data: the data set, in DAVIS's or YouTube-VOS's layout.
        target: the zip.
        sequences: names; by default all that have masks in `data`.
        on_progress: called with the number of sequences done and of all.

    Returns:
        The number of masks.

    Raises:
        LayoutError: `data` is no data set.
        SubmissionError: a sequence or mask is missing, has another size than its frame, or an object that
            no mask of `data` gives; all missing files are found before anything is written.
        MaskError: a mask that cannot be read.
        WriteError: the zip cannot be written.

    Source: DAVIS's server refuses zips whose sequences are not "directly inside the zip without any
        subfolder" (its message); YouTube-VOS's expects the folder Annotations.
    """
    results, data, target = Path(results), Path(data), Path(target)
    folders = video_folders(data)
    names = [f.name for f in subfolders(folders.masks)] if sequences is None else list(sequences)
    if not names:
        raise LayoutError(f"{folders.masks}: holds no sequences")
    files = _find(results, folders, names)
    prefix = "" if folders.dense else "Annotations/"
    count = 0
    with replacing(target) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for done, (name, masks) in enumerate(files.items(), 1):
            size = _frame_size(next(iter(image_files(folders.images / name).values())))
            given = _given_objects(folders, name)
            for frame, path in masks.items():
                labels = read_labels(path)
                _check(path, labels, size, given)
                entry = zipfile.ZipInfo(f"{prefix}{name}/{frame}.png", _EPOCH)
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, _indexed_png(labels))
                count += 1
            if on_progress is not None:
                on_progress(done, len(files))
    return count


def _find(results: Path, folders: VideoFolders, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """The mask of every frame of every sequence; complains about all that are missing at once."""
    found: dict[str, dict[str, Path]] = {}
    missing = []
    for name in names:
        if not (folders.images / name).is_dir():
            raise LayoutError(f"{folders.images / name}: no such folder")
        folder = results / name / "masks"
        folder = folder if folder.is_dir() else results / name
        masks = mask_files(folder) if folder.is_dir() else {}
        frames = list(image_files(folders.images / name))
        absent = [frame for frame in frames if frame not in masks]
        if not masks:
            missing.append(f"{name}: there are no masks in {folder}")
        elif absent:
            more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
            missing.append(f"{name}: no mask of {', '.join(absent[:_SHOWN])}{more} in {folder}")
        found[name] = {frame: masks[frame] for frame in frames if frame in masks}
    if missing:
        more = f"\nand {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise SubmissionError("\n".join(missing[:_SHOWN]) + more)
    return found


def _given_objects(folders: VideoFolders, name: str) -> set[int]:
    """Ids that the data set's masks show: of the first frame in DAVIS's layout, of any in YouTube-VOS's."""
    masks = list(mask_files(folders.masks / name).values())
    if not masks:
        raise LayoutError(f"{folders.masks / name}: holds no masks")
    return {i for path in (masks[:1] if folders.dense else masks) for i in object_ids(read_labels(path))}


def _frame_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.height, image.width


def _check(path: Path, labels: LabelMap, size: tuple[int, int], given: set[int]) -> None:
    if labels.shape != size:
        raise SubmissionError(
            f"{path}: is {labels.shape[1]}x{labels.shape[0]}, its frame {size[1]}x{size[0]}"
        )
    unknown = sorted(set(object_ids(labels)) - given)
    if unknown:
        raise SubmissionError(f"{path}: shows objects {unknown}, the data set gives {sorted(given)}")


def _indexed_png(labels: LabelMap) -> bytes:
    image = Image.fromarray(labels)
    image.putpalette(davis_palette().tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
