# SPDX-License-Identifier: Apache-2.0
"""Sequences of data sets: what is given, in which order, and how processes share them."""

import numpy as np
import pytest

from vosops.data import MaskError, open_frames, write_mask
from vosops.data.layouts import LayoutError
from vosops.recipes.sequences import Later, find_sequences, share

from .clips import SIZE, labels, picture, write_davis, write_youtube


def test_davis_gives_the_first_mask_longest_first(tmp_path):
    write_davis(tmp_path, {"a": 3, "b": 5, "c": 3})
    found, folders = find_sequences(tmp_path)
    assert [sequence.name for sequence in found] == ["b", "a", "c"]
    assert folders.dense
    longest = found[0]
    assert longest.names == tuple(f"{number:05d}" for number in range(5))
    assert (longest.given, longest.start, longest.scored) == (("00000",), 0, True)
    given, palette = longest.read_given()
    assert list(given) == [0]
    assert np.array_equal(given[0], labels(0))
    assert palette.shape == (256, 3)


def test_a_list_of_the_set_and_names_choose(tmp_path):
    write_davis(tmp_path, {"a": 3, "b": 5, "c": 3})
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("c\nb\n")
    assert [sequence.name for sequence in find_sequences(tmp_path)[0]] == ["b", "c"]
    assert [sequence.name for sequence in find_sequences(tmp_path, ["a"])[0]] == ["a"]


def test_only_a_sequence_with_all_masks_is_scored(tmp_path):
    write_davis(tmp_path, {"a": 4})
    (tmp_path / "Annotations/480p/a/00002.png").unlink()
    (sequence,) = find_sequences(tmp_path)[0]
    assert not sequence.scored


def test_youtube_gives_objects_where_they_are_seen_first(tmp_path):
    write_youtube(tmp_path, given={2: (1,), 4: (1, 2), 6: (2,)})
    (sequence,) = find_sequences(tmp_path)[0]
    assert (sequence.start, sequence.scored) == (2, False)
    assert sequence.given == ("00010", "00020", "00030")
    given, _ = sequence.read_given()
    assert list(given) == [0, 2]  # counted from the first mask; the third brings nothing new
    assert np.array_equal(given[0], np.where(labels(2) == 1, 1, 0))
    assert np.array_equal(given[2], np.where(labels(4) == 2, 2, 0))
    write_mask(sequence.masks / "00010.png", np.where(labels(2) == 1, 1, 255).astype(np.uint8))
    assert np.array_equal(sequence.read_given()[0][0], given[0])  # void is background


def test_later_begins_later(tmp_path):
    write_youtube(tmp_path)
    whole = open_frames(tmp_path / "JPEGImages/0a49f5265b")
    later = Later(whole, 3)
    assert (later.length, later.size) == (5, SIZE)
    names, frames = zip(*later, strict=True)
    assert names == ("00015", "00020", "00025", "00030", "00035")
    assert np.array_equal(frames[0], picture(3))
    assert next(later.frames(2))[0] == "00025"
    assert later.fingerprint(2) == whole.fingerprint(5)


def test_processes_share_by_frames(tmp_path):
    write_davis(tmp_path, {"a": 3, "b": 9, "c": 4, "d": 4, "e": 5})
    found, _ = find_sequences(tmp_path)
    parts = [[sequence.name for sequence in share(found, rank, 3)] for rank in range(3)]
    assert parts == [["b"], ["e", "a"], ["c", "d"]]
    assert share(found, 0, 1) == found


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(LayoutError, match="no such folder"):
        find_sequences(tmp_path)
    write_davis(tmp_path, {"a": 3, "b": 3})
    with pytest.raises(LayoutError, match=r"480p/cat: no such folder"):
        find_sequences(tmp_path, ["cat"])
    with pytest.raises(LayoutError, match="must be named once"):
        find_sequences(tmp_path, ["a", "a"])
    with pytest.raises(LayoutError, match="no sequence to segment"):
        find_sequences(tmp_path, [])
    (tmp_path / "Annotations/480p/a/00000.png").unlink()
    with pytest.raises(LayoutError, match=r"a: has no mask 00000\.png to begin with"):
        find_sequences(tmp_path, ["a"])
    (tmp_path / "JPEGImages/480p/b/00001.png").unlink()
    with pytest.raises(LayoutError, match=r"b: 00001\.png is the mask of a frame that"):
        find_sequences(tmp_path, ["b"])


def test_masks_that_do_not_fit(tmp_path):
    write_youtube(tmp_path, given={0: (1,), 4: (1, 2)})
    (sequence,) = find_sequences(tmp_path)[0]
    write_mask(sequence.masks / "00020.png", labels(4)[:40])
    with pytest.raises(MaskError, match=r"00020\.png: the mask is \[40, 112\], the frame \[72, 112\]"):
        sequence.read_given()
    write_mask(sequence.masks / "00000.png", 0 * labels(0))
    with pytest.raises(MaskError, match="is empty"):
        sequence.read_given()
