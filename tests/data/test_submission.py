# SPDX-License-Identifier: Apache-2.0
"""Submission zips, read back by the rules of the two servers."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from vosops.data import WriteError, davis_palette, write_mask
from vosops.data.layouts import LayoutError
from vosops.data.submission import SubmissionError, write_submission

SIZE = (20, 30)
CLIPS = {"bear": 4, "dog": 3}


def labels(number, ids=(1, 2)):
    mask = np.zeros(SIZE, np.uint8)
    for place, object_id in enumerate(ids):
        mask[2 + number : 10 + number, 2 + 12 * place : 10 + 12 * place] = object_id
    return mask


def write_set(root, layout, *, step=1, given=(0,)):
    """Frames of both clips with masks on the frames `given`, and results of every frame beside."""
    for name, count in CLIPS.items():
        inside = f"480p/{name}" if layout == "davis" else name
        images, masks = root / "data/JPEGImages" / inside, root / "data/Annotations" / inside
        out = root / "results" / name / "masks"
        for folder in (images, masks, out):
            folder.mkdir(parents=True)
        for number in range(count):
            frame = f"{number * step:05d}"
            Image.new("RGB", SIZE[::-1]).save(images / f"{frame}.jpg")
            if number in given:
                write_mask(masks / f"{frame}.png", labels(number))
            write_mask(out / f"{frame}.png", labels(number))
    return root / "data", root / "results"


@pytest.mark.parametrize("layout", ["davis", "youtube"])
def test_reads_back_as_the_server_reads_it(tmp_path, layout):
    data, results = write_set(tmp_path, layout, step=5)
    seen = []
    count = write_submission(results, data, tmp_path / "a.zip", on_progress=lambda *at: seen.append(at))
    assert count == sum(CLIPS.values())
    assert seen == [(1, 2), (2, 2)]
    prefix = "" if layout == "davis" else "Annotations/"
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(
            f"{prefix}{name}/{5 * number:05d}.png" for name, count in CLIPS.items() for number in range(count)
        )
        for name, count in CLIPS.items():
            for number in range(count):
                image = Image.open(io.BytesIO(archive.read(f"{prefix}{name}/{5 * number:05d}.png")))
                assert image.mode == "P"
                assert np.array_equal(np.asarray(image), labels(number))
                assert np.array_equal(np.reshape(image.getpalette()[:9], (3, 3)), davis_palette()[:3])
    write_submission(results, data, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_frames_of_the_data_set_alone_go_in(tmp_path):
    """Results of all frames, a data set with every second one; one sequence is asked for."""
    data, results = write_set(tmp_path, "youtube", step=2)
    write_mask(results / "bear/masks/00001.png", labels(0))
    assert write_submission(results, data, tmp_path / "a.zip", sequences=["bear"]) == CLIPS["bear"]
    assert "Annotations/bear/00001.png" not in zipfile.ZipFile(tmp_path / "a.zip").namelist()


def test_plain_folders_of_masks_do_too(tmp_path):
    data, results = write_set(tmp_path, "davis")
    for name in CLIPS:
        for file in (results / name / "masks").iterdir():
            file.rename(results / name / file.name)
        (results / name / "masks").rmdir()
    assert write_submission(results, data, tmp_path / "a.zip") == sum(CLIPS.values())


def test_an_object_that_enters_later_is_known_in_youtube_vos_only(tmp_path):
    data, results = write_set(tmp_path / "y", "youtube", given=(0, 2))
    write_mask(data / "Annotations/bear/00002.png", labels(2, (1, 2, 7)))
    write_mask(results / "bear/masks/00003.png", labels(3, (1, 7)))
    write_submission(results, data, tmp_path / "a.zip")
    data, results = write_set(tmp_path / "d", "davis", given=(0, 1, 2, 3))
    write_mask(data / "Annotations/480p/bear/00002.png", labels(2, (1, 2, 7)))
    write_mask(results / "bear/masks/00003.png", labels(3, (1, 7)))
    with pytest.raises(SubmissionError, match=r"bear/masks/00003\.png: shows objects \[7\], .* \[1, 2\]"):
        write_submission(results, data, tmp_path / "b.zip")
    assert not list(tmp_path.glob("*b.zip*"))


def test_what_is_missing_is_named(tmp_path):
    data, results = write_set(tmp_path, "davis")
    (results / "bear/masks/00001.png").unlink()
    for file in (results / "dog/masks").iterdir():
        file.unlink()
    message = r"bear: no mask of 00001 in .*\ndog: there are no masks in .*dog"
    with pytest.raises(SubmissionError, match=message):
        write_submission(results, data, tmp_path / "a.zip")
    write_mask(results / "bear/masks/00001.png", labels(1)[:10])
    with pytest.raises(SubmissionError, match=r"00001\.png: is 30x10, its frame 30x20"):
        write_submission(results, data, tmp_path / "a.zip", sequences=["bear"])
    with pytest.raises(LayoutError, match="cat: no such folder"):
        write_submission(results, data, tmp_path / "a.zip", sequences=["cat"])
    with pytest.raises(LayoutError, match="no such folder"):
        write_submission(results, tmp_path, tmp_path / "a.zip")
    write_mask(results / "bear/masks/00001.png", labels(1))
    with pytest.raises(WriteError, match="nowhere"):
        write_submission(results, data, tmp_path / "nowhere/a.zip", sequences=["bear"])
    assert not (tmp_path / "a.zip").exists()
