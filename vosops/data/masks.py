# SPDX-License-Identifier: Apache-2.0
"""Masks as object ids: reading what annotators give, writing indexed PNG, the DAVIS palette."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .files import write_file

LabelMap = NDArray[np.uint8]  # [H, W] object ids
Palette = NDArray[np.uint8]  # [256, 3] RGB

VOID = 255


class MaskError(ValueError):
    """A mask that does not hold object ids; the message says how to convert it."""


def davis_palette() -> Palette:
    """The DAVIS (PASCAL VOC) palette, (256, 3) uint8 RGB.

    Bits 0, 1, 2 of an id give the top bit of red, green and blue, the next three bits the second, and so on.
    Source: the colour map of the PASCAL VOC development kit, which DAVIS 2017 uses.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = (ids >> (3 * level + channel)) & 1
            palette[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return palette


def object_ids(labels: NDArray[Any]) -> list[int]:
    """The ids in a label map (H, W), ascending, without background (0) and void (255)."""
    return [int(label) for label in np.unique(labels) if label not in (0, VOID)]


def read_mask(path: str | Path, size: tuple[int, int] | None = None) -> tuple[LabelMap, Palette]:
    """Reads an indexed PNG or a grey PNG of ids.

    Ids are kept as they are, consecutive or not. 0 is background, 255 void ("do not care"): void is kept in
    the label map, is no object, and counts as background where a video is segmented from the mask.

    Args:
        path: the PNG.
        size: (H, W) that the mask must have, the frame's.

    Returns:
        The label map (H, W) uint8 and the palette (256, 3) uint8: the mask's own, completed by DAVIS colours.

    Raises:
        MaskError: no PNG, colours instead of ids, an anti-aliased mask, ids above 255, another size, no
            object. Each message says what was found and how to mend it.
    """
    path = Path(path)
    image = _open(path)
    if image.mode not in ("P", "L", "1", "I;16", "I"):
        colours = len(np.unique(np.asarray(image.convert("RGBA")).reshape(-1, 4), axis=0))
        raise MaskError(
            f"{path}: is a {image.mode} image with {colours} colours, a mask holds object ids. "
            f"Convert it: {_convert_command(path)}"
        )
    palette = davis_palette()
    if image.mode == "P":
        own = np.asarray(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
        palette[: len(own)] = own
    pixels = np.asarray(image)
    if pixels.max(initial=0) > 255:
        raise MaskError(f"{path}: has the id {pixels.max()}; ids go from 1 to 254. Renumber them")
    labels = pixels.astype(np.uint8)
    if size is not None and labels.shape != tuple(size):
        raise MaskError(
            f"{path}: the mask is {labels.shape[1]}x{labels.shape[0]}, the frame {size[1]}x{size[0]}. "
            "Annotate the frame itself, or resize the mask by nearest neighbour"
        )
    _check_ids(path, labels)
    return labels, palette


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        if image.format != "PNG":
            raise MaskError(
                f"{path}: is {image.format}; a mask is an indexed or grey PNG (lossy formats change ids)"
            )
        image.load()
    except FileNotFoundError as error:
        raise MaskError(f"{path}: no such mask") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MaskError(f"{path}: cannot be read as an image ({error})") from error
    return image


def _check_ids(path: Path, labels: LabelMap) -> None:
    ids = object_ids(labels)
    if not ids:
        if (labels == VOID).any():
            raise MaskError(
                f"{path}: has only 0 and 255, and 255 is void, not an object. If it marks the object: "
                f"{_threshold_command(path)}"
            )
        raise MaskError(f"{path}: is empty: no pixel has an object id (1 to 254)")
    thin = _ids_without_interior(labels, ids)
    if len(ids) >= 4 and len(thin) > len(ids) // 2:
        raise MaskError(
            f"{path}: has {len(ids)} ids, {len(thin)} of them only on edges: a smoothed (anti-aliased) mask. "
            "Export it without smoothing, resize by nearest neighbour; a grey mask of one object can "
            f"be cut at half: {_threshold_command(path)}"
        )


def _ids_without_interior(labels: LabelMap, ids: list[int]) -> list[int]:
    """Ids that nowhere fill 3x3 pixels: what smoothing leaves along edges."""
    box = np.ones((3, 3), np.uint8)
    interior = cv2.erode(labels, box) == cv2.dilate(labels, box)
    return sorted(set(ids) - set(object_ids(labels[interior])))


def write_mask(path: str | Path, labels: LabelMap, palette: Palette | None = None) -> None:
    """Writes a label map (H, W) uint8 as indexed PNG, atomically: the file is whole or absent.

    Args:
        palette: (256, 3) uint8 RGB; the DAVIS palette by default.

    Raises:
        TypeError, ValueError: a wrong dtype or shape.
        WriteError: the file cannot be written; names it.
    """
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise TypeError(f"labels must be (H, W) uint8, got {labels.dtype} {list(labels.shape)}")
    palette = davis_palette() if palette is None else palette
    if palette.shape != (256, 3) or palette.dtype != np.uint8:
        raise ValueError(f"palette must be (256, 3) uint8, got {palette.dtype} {list(palette.shape)}")
    image = Image.fromarray(labels)
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    write_file(Path(path), lambda file: file.write(buffer.getvalue()))


def read_labels(path: str | Path) -> LabelMap:
    """Reads back what `write_mask` wrote, (H, W) uint8; unlike a given mask it may be without objects.

    Raises:
        MaskError: the file is missing, damaged or no indexed or grey PNG.
    """
    image = _open(Path(path))
    if image.mode not in ("P", "L"):
        raise MaskError(f"{path}: is a {image.mode} image, expected an indexed or grey PNG of ids")
    return np.asarray(image)


def ids_from_colours(source: str | Path, target: str | Path) -> dict[tuple[int, int, int], int]:
    """Converts a mask painted in exact colours to an indexed PNG of ids.

    Black and fully transparent pixels become 0. A colour of the DAVIS palette keeps its id there if all
    colours are in it; otherwise colours are numbered 1, 2, ... from dark to bright. The colours become the
    palette.

    Args:
        source: an RGB, RGBA or grey-alpha PNG of few colours.
        target: the PNG to write.

    Returns:
        The id of each colour.

    Raises:
        MaskError: more than 64 colours (a photograph, or smoothed edges), or half-transparent pixels.
        WriteError: the target cannot be written.
    """
    rgba = np.asarray(_open(Path(source)).convert("RGBA"))
    alpha = rgba[..., 3]
    if ((alpha > 0) & (alpha < 255)).any():
        raise MaskError(f"{source}: has half-transparent pixels. Export it without smoothing (anti-aliasing)")
    rgb = np.where(alpha[..., None] == 0, 0, rgba[..., :3]).astype(np.uint8)
    found, index = np.unique(rgb.reshape(-1, 3), axis=0, return_inverse=True)
    if len(found) > 64:
        raise MaskError(
            f"{source}: has {len(found)} colours; a mask has one colour per object, without smoothing"
        )
    colours = [(int(r), int(g), int(b)) for r, g, b in found]
    davis = {(int(r), int(g), int(b)): id_ for id_, (r, g, b) in enumerate(davis_palette())}
    palette = davis_palette()
    if all(colour in davis and davis[colour] != VOID for colour in colours):
        ids = {colour: davis[colour] for colour in colours}
    else:
        objects = sorted((c for c in colours if c != (0, 0, 0)), key=lambda c: (sum(c), c))
        ids = {colour: number for number, colour in enumerate(objects, 1)} | {(0, 0, 0): 0}
        for colour, number in ids.items():
            palette[number] = colour
    labels = np.array([ids[colour] for colour in colours], np.uint8)[index.reshape(rgb.shape[:2])]
    write_mask(target, labels, palette)
    return {colour: ids[colour] for colour in colours}


def _convert_command(path: Path) -> str:
    return (
        f'python -c "from vosops.data import ids_from_colours; '
        f"ids_from_colours('{path}', '{path.stem}_ids.png')\""
    )


def _threshold_command(path: Path) -> str:
    return (
        f"python -c \"from PIL import Image; Image.open('{path}').convert('L')"
        f".point(lambda v: v > 127).save('{path.stem}_ids.png')\""
    )
