# SPDX-License-Identifier: Apache-2.0
"""Folders of masks: the official numbers, layouts, CSV tables, and what is wrong with a folder."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from vosops.evaluation import EvaluationError, evaluate_folders, write_csv


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(path)


def labels(shift=0, objects=2):
    result = np.zeros((40, 60), dtype=np.uint8)
    result[5:15, 5 + shift : 15 + shift] = 1
    if objects == 2:
        result[25:33, 30:38] = 2
    return result


@pytest.fixture
def folders(tmp_path):
    """Two sequences of five frames: `a`, whose object 1 is found a pixel a frame too far right, and `b`."""
    for index in range(5):
        for name, objects in (("a", 2), ("b", 1)):
            write(tmp_path / "gt" / name / f"{index:05d}.png", labels(0, objects))
            write(
                tmp_path / "results" / name / f"{index:05d}.png", labels(index if name == "a" else 0, objects)
            )
    return tmp_path / "results", tmp_path / "gt"


@pytest.mark.parametrize("block", ["STM16_vs_GT", "OSVOS17_union_vs_GT", "OSVOS17_vs_STM17_per_object"])
def test_every_scored_frame_and_statistic_equals_the_official_code(data_root, tmp_path, block):
    expected = json.loads((data_root / "Reference" / "expected.json").read_text())[block]
    per_object = block == "OSVOS17_vs_STM17_per_object"
    report = evaluate_folders(
        data_root / "Reference" / block.split("_")[0] / "480p",
        data_root / "Reference" / "STM17" / "480p" if per_object else data_root,
        sequences=list(expected) if per_object else None,
        single_object="union" in block,
    )
    # A DAVIS root is scored in the order of its ImageSets/2017/val.txt.
    assert [score.name for score in report.sequences] == list(expected)
    for score in report.sequences:
        scores = expected[score.name]
        assert [int(frame) for frame in score.frames] == scores["frames"][1:-1]
        close = {"rtol": 0, "atol": 1e-9}
        np.testing.assert_allclose(score.j, np.atleast_2d(scores["J"])[:, 1:-1], **close)
        np.testing.assert_allclose(score.f, np.atleast_2d(scores["F"])[:, 1:-1], **close)
        np.testing.assert_allclose(score.j_statistics, np.atleast_2d(scores["stats"]["J"]), **close)
        np.testing.assert_allclose(score.f_statistics, np.atleast_2d(scores["stats"]["F"]), **close)
    if block == "STM16_vs_GT":
        written = write_csv(report, tmp_path)
        for path, kind in zip(written, ("global", "per-sequence"), strict=False):
            official = data_root / "Reference" / f"official_STM16_{kind}.csv"
            assert path.read_text().splitlines() == official.read_text().splitlines()


def test_means_are_over_objects_not_sequences(folders):
    report = evaluate_folders(*folders)
    j = [100 - 10 * shift for shift in (1, 2, 3)]
    first = np.mean([overlap / (200 - overlap) for overlap in j])
    assert report.j.mean == pytest.approx((first + 1 + 1) / 3)
    assert report.jf_mean == pytest.approx((report.j.mean + report.f.mean) / 2)


def test_csv_tables(folders, tmp_path):
    paths = write_csv(evaluate_folders(*folders), tmp_path / "new" / "csv")
    tables = [list(csv.reader(path.open())) for path in paths]
    assert [path.name for path in paths] == [
        "global_results.csv",
        "per-sequence_results.csv",
        "per-frame_results.csv",
    ]
    assert tables[0][0] == ["J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay"]
    assert len(tables[0]) == 2
    assert [row[0] for row in tables[1]] == ["Sequence", "a_1", "a_2", "b_1"]
    assert tables[1][2] == ["a_2", "1.000", "1.000"]
    assert tables[2][0] == ["Sequence", "Frame", "J", "F"]
    assert len(tables[2]) == 1 + 3 * 3
    assert tables[2][1][:2] == ["a_1", "00001"]
    assert float(tables[2][1][2]) == 90 / 110


def test_layouts_agree(folders, tmp_path):
    results, gt = folders
    expected = evaluate_folders(results, gt)
    root = tmp_path / "davis"
    shutil.copytree(gt, root / "Annotations" / "480p")
    assert evaluate_folders(results, root).global_row() == expected.global_row()
    single = evaluate_folders(results / "a", gt / "a")
    assert single.sequences[0].name == "a"
    np.testing.assert_array_equal(single.sequences[0].j, expected.sequences[0].j)
    np.testing.assert_array_equal(evaluate_folders(results, gt / "a").sequences[0].j, expected.sequences[0].j)


def test_a_davis_root_is_scored_on_its_val_set(folders, tmp_path):
    results, gt = folders
    root = tmp_path / "davis"
    shutil.copytree(gt, root / "Annotations" / "480p")
    listed = root / "ImageSets" / "2017" / "val.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("b\n")
    assert [score.name for score in evaluate_folders(results, root).sequences] == ["b"]
    assert [score.name for score in evaluate_folders(results, root, sequences=["b", "a"]).sequences] == [
        "b",
        "a",
    ]


def test_unscored_results_need_not_exist_and_more_may(folders):
    results, gt = folders
    (results / "a" / "00000.png").unlink()
    (results / "a" / "00004.png").unlink()
    shutil.copytree(results / "b", results / "c")
    shutil.copy(results / "b" / "00001.png", results / "b" / "00009.png")
    seen = []
    report = evaluate_folders(results, gt, on_sequence=lambda score: seen.append(score.name))
    assert seen == [score.name for score in report.sequences] == ["a", "b"]


def fails(folders, message, **options):
    with pytest.raises(EvaluationError, match=message) as caught:
        evaluate_folders(*folders, **options)
    return str(caught.value)


def test_missing_frames_are_listed(folders):
    for index in (1, 3):
        (folders[0] / "a" / f"{index:05d}.png").unlink()
    (folders[0] / "b" / "00002.png").unlink()
    message = fails(folders, "a: no mask for 2 of 3 scored frames: 00001, 00003")
    assert "b: no mask for 1 of 3 scored frames: 00002" in message


def test_the_folder_above_the_masks_is_answered_with_a_hint(folders, tmp_path):
    shutil.copytree(folders[0] / "a", tmp_path / "out" / "masks")
    (tmp_path / "out" / "contact_sheet.png").touch()
    fails((tmp_path / "out", folders[1] / "a"), "no mask for 3 of 3 scored .*; did you mean .*out.masks")
    assert evaluate_folders(tmp_path / "out" / "masks", folders[1] / "a").sequences[0].name == "a"


def test_missing_sequences_are_listed(folders):
    shutil.rmtree(folders[0] / "b")
    fails(folders, "results: no folder for 1 of 2 sequences: b$")


def test_empty_results(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    fails((tmp_path / "empty", folders[1]), "no folder for 2 of 2 sequences: a, b; there are no PNGs in")


def test_ground_truth_without_masks(folders, tmp_path):
    (tmp_path / "empty" / "a").mkdir(parents=True)
    fails((folders[0], tmp_path / "empty"), "empty: has no PNGs; expected a folder of sequences")


def test_folders_must_be_there(folders, tmp_path):
    fails((tmp_path / "no", folders[1]), "RESULTS must be a folder, .*no is not one")
    fails((folders[0], tmp_path / "no"), "GROUND_TRUTH must be a folder, .*no is not one")


def test_unknown_sequences(folders):
    fails(folders, "gt: has no ground truth for dog; it has a, b", sequences=["a", "dog"])
    fails(folders, "sequences must name at least one sequence", sequences=[])


def test_too_few_frames(folders):
    for index in (2, 3, 4):
        (folders[1] / "a" / f"{index:05d}.png").unlink()
    fails(folders, "a: has 2 mask PNGs; at least 3 are needed")


def test_size_mismatch_is_found_before_scoring(folders):
    write(folders[0] / "b" / "00003.png", labels(objects=1)[:20])
    message = r"b.00003.png: is 60x20, its ground truth 60x40 \(WxH\)"
    fails(folders, message, on_sequence=lambda score: pytest.fail(f"scored {score.name} first"))


def test_colour_results(folders):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folders[0] / "a" / "00001.png")
    fails(folders, "a.00001.png: is an image of mode RGB, expected an 8-bit indexed or grey PNG of label ids")


def test_antialiased_results(folders):
    grey = np.zeros((40, 60), np.uint8)
    grey[5:15] = np.linspace(0, 254, 60).astype(np.uint8)
    Image.fromarray(grey).save(folders[0] / "a" / "00001.png")
    fails(folders, "a.00001.png: holds 60 different values, so it has grey levels .* nearest neighbour")
    fails(folders, "has grey levels", single_object=True)


def test_zero_and_255_results(folders):
    Image.fromarray(labels(objects=1) * np.uint8(255)).save(folders[0] / "b" / "00001.png")
    fails(folders, "b.00001.png: holds only 0 and 255, and 255 means void")


def test_zero_and_255_ground_truth(folders):
    Image.fromarray(labels(objects=1) * np.uint8(255)).save(folders[1] / "b" / "00000.png")
    fails(folders, "the first ground-truth mask has no object; .* 255 means void")


def test_more_labels_than_objects(folders):
    write(folders[0] / "b" / "00002.png", labels(objects=2))
    fails(
        folders, "b.00002.png: has label 2, but the first frame of the ground truth has 1 object; .*--union"
    )
    assert evaluate_folders(*folders, single_object=True).sequences[1].num_objects == 1


def test_broken_files(folders):
    path = folders[0] / "a" / "00002.png"
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    fails(folders, "a.00002.png: cannot be read as an image")
    path.write_bytes(whole[: len(whole) - 30])
    fails(folders, "a.00002.png: cannot be read")
