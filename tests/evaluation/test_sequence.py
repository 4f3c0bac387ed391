# SPDX-License-Identifier: Apache-2.0
"""The semi-supervised protocol: which frames and objects count, void, statistics."""

import weakref

import numpy as np
import pytest

from vosops.evaluation import evaluate_sequence, statistics


def label_map(*boxes, size=(40, 60)):
    """Boxes (label, top, left, height, width), later ones in front."""
    labels = np.zeros(size, dtype=np.uint8)
    for label, top, left, height, width in boxes:
        labels[top : top + height, left : left + width] = label
    return labels


ONE = label_map((1, 5, 5, 10, 10))
TWO = label_map((1, 5, 5, 10, 10), (2, 20, 30, 8, 8))


def test_first_and_last_frame_are_not_scored():
    wrong = np.zeros_like(ONE)
    score = evaluate_sequence([ONE] * 5, [wrong, ONE, ONE, ONE, wrong], name="clip")
    assert score.frames == ("00001", "00002", "00003")
    assert score.j.tolist() == [[1.0] * 3]
    assert score.f.tolist() == [[1.0] * 3]
    assert (score.j_mean, score.f_mean, score.jf_mean) == (1.0, 1.0, 1.0)


def test_objects_are_scored_one_by_one():
    swapped = label_map((2, 5, 5, 10, 10), (1, 20, 30, 8, 8))
    shifted = label_map((1, 5, 10, 10, 10), (2, 20, 30, 8, 8))
    score = evaluate_sequence([TWO] * 4, [TWO, swapped, shifted, TWO], name="pair")
    assert score.object_names == ["pair_1", "pair_2"]
    assert score.j.tolist() == [[0.0, 50 / 150], [0.0, 1.0]]


def test_single_object_scores_the_union():
    swapped = label_map((2, 5, 5, 10, 10), (1, 20, 30, 8, 8))
    score = evaluate_sequence([TWO] * 3, [TWO, swapped, TWO], single_object=True)
    assert score.num_objects == 1
    assert score.j.tolist() == [[1.0]]


def test_the_first_frame_gives_the_number_of_objects():
    # Object 1 is not in the first frame: empty in both everywhere, so perfect, as the benchmark counts it.
    only_two = label_map((2, 20, 30, 8, 8))
    score = evaluate_sequence([only_two] * 3, [only_two] * 3)
    assert score.j.tolist() == [[1.0], [1.0]]
    with pytest.raises(ValueError, match=r"frame 00001: prediction has label 2, .* has 1 object$"):
        evaluate_sequence([ONE] * 3, [TWO] * 3)


def test_a_missing_object_is_padded_with_empty_masks():
    score = evaluate_sequence([TWO] * 3, [ONE] * 3)
    assert score.j.tolist() == [[1.0], [0.0]]


def test_void_is_background_in_both():
    void = ONE.copy()
    void[30:, :] = 255
    marked = ONE.copy()
    marked[35:, :] = 1
    assert evaluate_sequence([void] * 3, [ONE] * 3).j.tolist() == [[1.0]]
    assert evaluate_sequence([ONE] * 3, [void] * 3).j.tolist() == [[1.0]]
    # Predicting into void costs: the semi-supervised protocol does not mask it out.
    assert evaluate_sequence([void] * 3, [marked] * 3).j.tolist() == [[100 / 400]]
    assert evaluate_sequence([void] * 3, [ONE] * 3, single_object=True).j.tolist() == [[1.0]]


def test_frames_stream():
    """At most two frames of each side are alive, whatever the length."""
    alive = []

    def stream():
        for _ in range(30):
            frame = TWO.copy()
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(reference() is not None for reference in alive) <= 6

    assert evaluate_sequence(stream(), stream()).j.shape == (2, 28)


@pytest.mark.parametrize(
    ("gt", "prediction", "message"),
    [
        ([ONE] * 2, [ONE] * 2, "has 2 frames; at least 3 are needed"),
        ([], [], "has 0 frames"),
        ([ONE] * 4, [ONE] * 3, "predicted_label_maps ends before frame 00003"),
        ([ONE] * 3, [ONE] * 4, "gt_label_maps ends before frame 00003"),
        ([ONE * 0] * 3, [ONE] * 3, "ground truth of the first frame has no object"),
        ([ONE] * 3, [ONE[:, :30]] * 3, "must have the size of the ground truth, 60x40, got 30x40"),
        ([ONE[0]] * 3, [ONE] * 3, r"ground truth must be a label map \(H, W\), got shape \(60,\)"),
        ([-ONE.astype(np.int8)] * 3, [ONE] * 3, "must hold labels 0 to 255, got -1"),
    ],
)
def test_bad_sequences_are_named(gt, prediction, message):
    with pytest.raises(ValueError, match=message):
        evaluate_sequence(gt, prediction)


def test_float_maps_are_refused():
    with pytest.raises(TypeError, match="frame 00001: prediction must hold integer labels, got float64"):
        evaluate_sequence([ONE] * 3, [ONE * 1.0] * 3)


def test_frame_names_must_fit():
    with pytest.raises(ValueError, match="frames must name the 3 frames of clip, got 2 names"):
        evaluate_sequence([ONE] * 3, [ONE] * 3, name="clip", frames=["a", "b"])


def test_statistics():
    values = [0.9] * 10 + [0.5] * 20 + [0.1] * 10
    mean, recall, decay = statistics(values)
    assert mean == pytest.approx(0.5)
    assert recall == 0.25  # a score of exactly 0.5 does not count
    # Quarters of 40 frames end at 1, 11, 20, 30 and 40 (1-based) and include both ends.
    assert decay == pytest.approx(np.mean(values[:11]) - np.mean(values[29:]))
    assert statistics([0.7]) == (0.7, 1.0, 0.0)


def test_decay_holds_beyond_256_frames():
    assert statistics(np.linspace(1, 0, 401)).decay == pytest.approx(0.75)


@pytest.mark.parametrize("values", [[], [[0.5]]])
def test_statistics_needs_scores(values):
    with pytest.raises(ValueError, match=r"values must be the scores \(T,\)"):
        statistics(values)
