# SPDX-License-Identifier: Apache-2.0
"""J and F on masks whose scores can be worked out by hand, and the numbers of the official code."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from vosops.evaluation import boundary_map, contour_accuracy, region_similarity


def square(top, left, side, size=(100, 100)):
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


EMPTY = np.zeros((100, 100), dtype=bool)


def test_two_empty_masks_score_one():
    assert region_similarity(EMPTY, EMPTY) == 1.0
    assert contour_accuracy(EMPTY, EMPTY) == 1.0


@pytest.mark.parametrize("pair", [(EMPTY, square(40, 40, 20)), (square(40, 40, 20), EMPTY)])
def test_one_empty_mask_scores_zero(pair):
    assert region_similarity(*pair) == 0.0
    assert contour_accuracy(*pair) == 0.0


def test_equal_masks_score_one():
    assert region_similarity(square(3, 4, 20), square(3, 4, 20)) == 1.0
    assert contour_accuracy(square(3, 4, 20), square(3, 4, 20)) == 1.0


@pytest.mark.parametrize("shift", [1, 2, 5, 20, 30])
def test_region_similarity_of_a_shifted_square(shift):
    overlap = 20 * max(20 - shift, 0)
    assert region_similarity(square(30, 30, 20), square(30, 30 + shift, 20)) == overlap / (800 - overlap)


def test_contour_within_tolerance_is_perfect_and_beyond_is_not():
    # 100x100: the radius is ceil(0.008 * 141.4) = 2 pixels.
    gt = square(30, 30, 20)
    assert contour_accuracy(gt, square(30, 32, 20)) == 1.0
    assert contour_accuracy(gt, square(30, 33, 20)) < 1.0
    assert contour_accuracy(gt, square(30, 33, 20), tolerance=3) == 1.0


def test_contour_accuracy_of_parallel_edges():
    # Half planes: each boundary is one row.
    gt = np.zeros((100, 100), dtype=bool)
    gt[50:] = True
    prediction = gt.copy()
    prediction[20:24] = True
    # Boundary rows of the prediction: 19, 23 and 49, of which only 49 is matched; all of the truth's is.
    precision, recall = 1 / 3, 1.0
    assert contour_accuracy(gt, prediction) == pytest.approx(2 * precision * recall / (precision + recall))


def test_the_tolerance_is_a_disk():
    gt, inside, outside = (np.zeros((100, 100), dtype=bool) for _ in range(3))
    gt[:51, :51] = True  # its corner's boundary ends at (50, 50)
    for mask, reach in ((inside, 2), (outside, 3)):
        mask[: 51 + reach, : 51 + reach] = True
    # The corner of `inside` is (2, 2) away, outside the disk of radius 2; all of `outside` is.
    length = np.count_nonzero(boundary_map(inside))
    assert 0 < 1 - contour_accuracy(gt, inside) < 4 / length
    assert contour_accuracy(gt, outside) == 0.0


def test_the_frame_edge_is_no_boundary():
    assert not boundary_map(np.ones((20, 30), dtype=bool)).any()
    left_half = np.zeros((4, 6), dtype=bool)
    left_half[:, :3] = True
    expected = np.zeros_like(left_half)
    expected[:, 2] = True
    np.testing.assert_array_equal(boundary_map(left_half), expected)


def test_a_frame_filling_mask_has_no_contour_but_a_region():
    full = np.ones((50, 60), dtype=bool)
    assert contour_accuracy(full, full) == 1.0
    assert contour_accuracy(full, np.zeros_like(full)) == 1.0
    assert region_similarity(full, np.zeros_like(full)) == 0.0


def brute_force_contour(gt, prediction, radius):
    """F from the distances between all pairs of boundary pixels of the whole frames."""
    edges = []
    for mask in (gt, prediction):
        padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
        differs = [
            padded[y : y + mask.shape[0], x : x + mask.shape[1]] != mask for y, x in ((0, 1), (1, 0), (1, 1))
        ]
        edges.append(np.argwhere(np.any(differs, axis=0)))
    if not (len(edges[0]) and len(edges[1])):
        return float(len(edges[0]) == len(edges[1]))
    near = ((edges[0][:, None] - edges[1][None]) ** 2).sum(-1) <= radius**2
    recall, precision = near.any(1).mean(), near.any(0).mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(arrays(np.bool_, (2, 13, 17)), st.integers(1, 4))
def test_contour_accuracy_equals_brute_force(masks, radius):
    expected = brute_force_contour(masks[0], masks[1], radius)
    assert contour_accuracy(masks[0], masks[1], tolerance=radius) == pytest.approx(expected, abs=1e-12)


def test_leading_dimensions_are_scored_one_by_one():
    gt = np.stack([square(10, 10, 20), square(50, 50, 30), EMPTY])
    prediction = np.stack([square(12, 10, 20), square(40, 40, 30), EMPTY])
    for measure in (region_similarity, contour_accuracy):
        scores = measure(gt[None], prediction[None])
        assert scores.shape == (1, 3)
        assert scores[0].tolist() == [measure(*pair) for pair in zip(gt, prediction, strict=True)]


def test_integer_masks_and_strided_views_are_fine():
    gt, prediction = square(10, 20, 30), square(12, 20, 30)
    expected = contour_accuracy(gt.T, prediction.T)
    assert contour_accuracy(gt.astype(np.int64).T, prediction.astype(np.uint8).T) == expected


@pytest.mark.parametrize("measure", [region_similarity, contour_accuracy])
@pytest.mark.parametrize(
    ("gt", "prediction", "error", "message"),
    [
        (
            EMPTY,
            EMPTY[:50],
            ValueError,
            r"prediction must have the shape of gt, \(100, 100\), got \(50, 100\)",
        ),
        (EMPTY[0], EMPTY[0], ValueError, r"gt must have the shape \(\*n, H, W\)"),
        (EMPTY[:0], EMPTY[:0], ValueError, r"gt must have the shape .* with H, W > 0, got \(0, 100\)"),
        (EMPTY * 2.0, EMPTY, TypeError, "gt must be bool or integers 0 and 1, got float64"),
        (EMPTY, EMPTY + np.uint8(3), ValueError, "prediction must be a binary mask, got values 3 to 3"),
    ],
)
def test_bad_masks_are_named(measure, gt, prediction, error, message):
    with pytest.raises(error, match=message):
        measure(gt, prediction)


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), float("inf")])
def test_bad_tolerance_is_named(tolerance):
    with pytest.raises(ValueError, match="tolerance must be a positive number"):
        contour_accuracy(EMPTY, EMPTY, tolerance=tolerance)


def test_a_480p_frame_takes_well_under_20_ms():
    rng = np.random.default_rng(0)
    gt = square(100, 200, 300, size=(480, 854))
    prediction = gt ^ (rng.random(gt.shape) < 0.001)  # specks all over: no small bounding box to hide in
    times = []
    for _ in range(5):
        start = time.perf_counter()
        region_similarity(gt, prediction)
        contour_accuracy(gt, prediction)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.020


@pytest.mark.parametrize("block", ["STM16_vs_GT", "OSVOS17_union_vs_GT", "OSVOS17_vs_STM17_per_object"])
def test_every_frame_equals_the_official_code(data_root, block):
    expected = json.loads((data_root / "Reference" / "expected.json").read_text())[block]
    results = f"Reference/{block.split('_')[0]}/480p"
    ground_truth = "Reference/STM17/480p" if "per_object" in block else "Annotations/480p"
    for name, scores in expected.items():
        j, f = np.atleast_2d(scores["J"]), np.atleast_2d(scores["F"])
        # Every seventh frame and both ends here; test_folders.py covers each scored frame.
        picked = [0, *range(1, len(scores["frames"]) - 1, 7), len(scores["frames"]) - 1]
        for index in picked:
            path = f"{name}/{scores['frames'][index]:05d}.png"
            gt = np.asarray(Image.open(data_root / ground_truth / path))
            prediction = np.asarray(Image.open(data_root / results / path))
            for label in range(1, len(j) + 1):
                pair = (
                    (gt == label, prediction == label) if "per_object" in block else (gt > 0, prediction > 0)
                )
                assert region_similarity(*pair) == pytest.approx(j[label - 1, index], abs=1e-9)
                assert contour_accuracy(*pair) == pytest.approx(f[label - 1, index], abs=1e-9)
