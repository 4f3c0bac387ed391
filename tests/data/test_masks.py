# SPDX-License-Identifier: Apache-2.0
"""Masks are object ids: what is none is refused with the way to convert it."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vosops.data import (
    MaskError,
    WriteError,
    davis_palette,
    ids_from_colours,
    object_ids,
    read_labels,
    read_mask,
    write_mask,
)

DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))


@pytest.fixture
def labels():
    labels = np.zeros((40, 60), np.uint8)
    labels[5:20, 5:25] = 3
    labels[22:35, 30:50] = 17
    return labels


def save(array, path, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)
    return path


def test_davis_palette_by_its_published_colours():
    palette = davis_palette()
    assert palette[:9].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 0, 128],
        [0, 128, 128],
        [128, 128, 128],
        [64, 0, 0],
    ]
    assert palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(palette, axis=0)) == 256


def test_written_mask_reads_back_with_ids_and_palette(tmp_path, labels):
    palette = davis_palette()
    palette[17] = (1, 2, 3)
    write_mask(tmp_path / "mask.png", labels, palette)
    again, colours = read_mask(tmp_path / "mask.png", size=(40, 60))
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_array_equal(colours, palette)
    assert object_ids(again) == [3, 17]
    assert Image.open(tmp_path / "mask.png").mode == "P"
    assert [p.name for p in tmp_path.iterdir()] == ["mask.png"]


def test_grey_mask_gets_the_davis_palette(tmp_path, labels):
    again, palette = read_mask(save(labels, tmp_path / "mask.png"))
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_array_equal(palette, davis_palette())


def test_short_palette_is_completed(tmp_path, labels):
    image = Image.fromarray((labels == 3).astype(np.uint8))
    image.putpalette([9, 9, 9, 200, 100, 50])
    image.save(tmp_path / "mask.png", bits=1)
    _, palette = read_mask(tmp_path / "mask.png")
    assert palette[:2].tolist() == [[9, 9, 9], [200, 100, 50]]
    assert palette[3].tolist() == [128, 128, 0]


def test_void_stays_in_the_mask_and_is_no_object(tmp_path, labels):
    labels[0, :] = 255
    again, _ = read_mask(save(labels, tmp_path / "mask.png"))
    assert (again[0] == 255).all()
    assert object_ids(again) == [3, 17]


def test_black_and_white_and_sixteen_bit_masks(tmp_path, labels):
    Image.fromarray(labels == 3).save(tmp_path / "bits.png")
    assert object_ids(read_mask(tmp_path / "bits.png")[0]) == [1]
    save(labels.astype(np.uint16), tmp_path / "wide.png")
    assert object_ids(read_mask(tmp_path / "wide.png")[0]) == [3, 17]
    save(labels.astype(np.uint16) * 100, tmp_path / "high.png")
    with pytest.raises(MaskError, match=r"has the id 1700; ids go from 1 to 254\. Renumber them"):
        read_mask(tmp_path / "high.png")


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_mask_is_refused_and_the_given_command_converts_it(tmp_path, labels, mode):
    Image.fromarray(davis_palette()[labels]).convert(mode).save(tmp_path / "mask.png")
    with pytest.raises(
        MaskError, match=rf"is a {mode} image with 3 colours, a mask holds object ids"
    ) as raised:
        read_mask(tmp_path / "mask.png")
    if mode == "RGB":  # each run of the command takes seconds to import torch
        run_command(str(raised.value).split("Convert it: ")[1], tmp_path)
    else:
        ids_from_colours(tmp_path / "mask.png", tmp_path / "mask_ids.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask_ids.png")[0], labels)


def run_command(command, folder):
    assert command.startswith("python -c ")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = command.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=folder, env=environment)


def test_other_colours_are_numbered_from_dark_to_bright(tmp_path, labels):
    colours = np.zeros((256, 3), np.uint8)
    colours[3], colours[17] = (250, 240, 0), (10, 20, 30)
    save(colours[labels], tmp_path / "mask.png")
    ids = ids_from_colours(tmp_path / "mask.png", tmp_path / "ids.png")
    assert ids == {(0, 0, 0): 0, (10, 20, 30): 1, (250, 240, 0): 2}
    again, palette = read_mask(tmp_path / "ids.png")
    np.testing.assert_array_equal(again, np.select([labels == 17, labels == 3], [1, 2]))
    assert palette[2].tolist() == [250, 240, 0]


def test_smoothed_colours_and_alpha_are_refused(tmp_path, labels):
    smooth = cv2.GaussianBlur(davis_palette()[labels] * 1, (0, 0), 3)
    with pytest.raises(MaskError, match=r"has \d+ colours; a mask has one colour per object"):
        ids_from_colours(save(smooth, tmp_path / "smooth.png"), tmp_path / "ids.png")
    rgba = np.dstack([davis_palette()[labels], np.full(labels.shape, 128, np.uint8)])
    with pytest.raises(MaskError, match="half-transparent pixels"):
        ids_from_colours(save(rgba, tmp_path / "alpha.png"), tmp_path / "ids.png")


def test_anti_aliased_mask_says_how_many_ids_and_the_given_command_mends_it(tmp_path):
    disk = cv2.circle(np.zeros((60, 80), np.uint8), (40, 30), 20, 255, -1)
    save(cv2.GaussianBlur(disk, (5, 5), 0), tmp_path / "mask.png")
    with pytest.raises(
        MaskError, match=r"has \d+ ids, \d+ of them only on edges.*nearest neighbour"
    ) as raised:
        read_mask(tmp_path / "mask.png")
    run_command(str(raised.value).split("cut at half: ")[1], tmp_path)
    again, _ = read_mask(tmp_path / "mask_ids.png")
    assert (again != (disk > 0)).sum() <= 4  # the four outermost pixels of the disk


def test_thin_objects_are_no_smoothing(tmp_path):
    labels = np.zeros((40, 60), np.uint8)
    for number in range(3):
        labels[5 + 10 * number, :] = number + 1
    assert object_ids(read_mask(save(labels, tmp_path / "mask.png"))[0]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"is empty: no pixel has an object id \(1 to 254\)"),
        (255, "has only 0 and 255, and 255 is void, not an object. If it marks the object: python -c"),
    ],
)
def test_mask_without_objects(tmp_path, value, message):
    labels = np.zeros((40, 60), np.uint8)
    labels[10:20] = value
    with pytest.raises(MaskError, match=message) as raised:
        read_mask(save(labels, tmp_path / "mask.png"))
    if value:
        run_command(str(raised.value).split("object: ")[1], tmp_path)
        np.testing.assert_array_equal(read_mask(tmp_path / "mask_ids.png")[0], labels // 255)


def test_other_size_than_the_frame(tmp_path, labels):
    with pytest.raises(MaskError, match="the mask is 60x40, the frame 64x36"):
        read_mask(save(labels, tmp_path / "mask.png"), size=(36, 64))


def test_files_that_are_no_mask(tmp_path, labels):
    with pytest.raises(MaskError, match=r"nothing\.png: no such mask"):
        read_mask(tmp_path / "nothing.png")
    Image.fromarray(labels).save(tmp_path / "mask.jpg")
    with pytest.raises(MaskError, match=r"mask\.jpg: is JPEG; a mask is an indexed or grey PNG"):
        read_mask(tmp_path / "mask.jpg")
    content = save(labels, tmp_path / "mask.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:60])
    with pytest.raises(MaskError, match=r"cut\.png: cannot be read as an image"):
        read_mask(tmp_path / "cut.png")


def test_write_mask_checks_its_arguments(tmp_path, labels):
    with pytest.raises(TypeError, match=r"labels must be \(H, W\) uint8, got int64 \[40, 60\]"):
        write_mask(tmp_path / "mask.png", labels.astype(np.int64))
    with pytest.raises(ValueError, match=r"palette must be \(256, 3\) uint8, got uint8 \[2, 3\]"):
        write_mask(tmp_path / "mask.png", labels, davis_palette()[:2])


def test_failed_write_names_the_file_and_keeps_the_old_one(tmp_path, labels):
    path = tmp_path / "mask.png"
    write_mask(path, labels)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*mask\.png: File too large"):
            write_mask(path, labels)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_empty_masks_read_back_as_labels(tmp_path, labels):
    write_mask(tmp_path / "mask.png", labels * 0)
    assert not read_labels(tmp_path / "mask.png").any()
    Image.fromarray(davis_palette()[labels]).save(tmp_path / "colour.png")
    with pytest.raises(MaskError, match="is a RGB image, expected an indexed or grey PNG"):
        read_labels(tmp_path / "colour.png")


@pytest.mark.skipif(not (DATA / "Annotations").is_dir(), reason="needs real clips: VOSOPS_DATA")
def test_every_real_mask_is_read():
    masks = [*DATA.glob("Annotations*/480p/*/00000.png"), *DATA.glob("camvid/Annotations/360p/*/*07959.png")]
    assert len(masks) == 14
    for path in masks:
        labels, palette = read_mask(path)
        assert object_ids(labels)
        np.testing.assert_array_equal(palette[:4], davis_palette()[:4])
