# SPDX-License-Identifier: Apache-2.0
"""STCN against numbers of the public reference implementation: features, values, reads, every frame."""

import numpy as np
import pytest
import torch

from tests.models.weights import Golden, fill
from vosops.models import SessionSettings
from vosops.models.stcn import STCN
from vosops.propagate import Tracker


@pytest.fixture(scope="module")
def model():
    return fill(STCN(), Golden("STCN").config)


@pytest.fixture(scope="module", params=["STCN", "STCN_new_object"])
def run(request, model):
    """The published loop through the tracker: what the network computed, and the results per frame."""
    golden = Golden(request.param)
    frames, official = golden.arrays["frames"], golden.config["official"]
    new = {frame: int(i) for i, frame in official["new_objects"].items()}
    logits, reads, memory = [], [], []

    def note(module, inputs, output):
        reads.append(inputs[0])
        logits.append(output)

    handle = model.decoder.register_forward_hook(note)
    tracker = Tracker(model, SessionSettings(memory_every=official["mem_every"]))
    tracker.add(frames[0], golden.arrays["mask0"])
    results = []
    for t in range(1, len(frames)):
        tracker.step(frames[t])
        memory.append(len(tracker._session._bank))
        if t in new:
            tracker.add(frames[t], golden.arrays["new_mask"])
        results.append(tracker.probabilities)
    handle.remove()
    assert tracker.object_ids == list(range(1, official["num_objects"] + 1))
    return golden, logits, reads, results, memory


def prepared(model, golden, frame):
    pixels = torch.from_numpy(golden.arrays["frames"][frame]).permute(2, 0, 1)[None].float() / 255
    return model.prepare(pixels)


def test_features_and_values(model, run):
    golden = run[0]
    with torch.no_grad():
        image = prepared(model, golden, 0)
        features = model.encode(image)
        golden.check("f16_frame0_s1x32", features.f16[:, ::32])
        golden.check("f8_frame0_s1x64", features.f8[:, ::64, ::2, ::2])
        golden.check("f4_frame0_s1x32", features.f4[:, ::32, ::4, ::4])
        golden.check("key_frame0", features.key)
        golden.check("f16_thin_frame1_s1x16", model.encode(prepared(model, golden, 1)).thin[:, ::16])
        given = golden.arrays["mask0"]
        masks = torch.stack([torch.from_numpy(given == i) for i in np.unique(given) if i])[None].float()
        value = model.encode_value(image, model.prepare_mask(masks), features)
        golden.check("value_frame0_s1x16", value[0, :, ::16])


def test_every_frame(run):
    golden, logits, reads, results, _ = run
    expected = golden["prob_half"]
    atol = golden.config["noise"]["prob_half"]["atol"]
    for t, probabilities in enumerate(results):
        ours = probabilities[:, ::2, ::2]
        # The channel of an object that is not there yet is 0.
        theirs = expected[t, : len(ours)]
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4, msg=f"frame {t + 1}")
        labels = probabilities.argmax(0).numpy().astype(np.uint8)
        assert (labels != golden.arrays["labels"][t + 1]).sum() <= 2, f"frame {t + 1}"
    golden.check("prob_last", results[-1])
    golden.check("read_last_s1x16", reads[-1][0, :, ::16])
    if "logits4" in golden.arrays:
        golden.check("logits4", torch.cat(logits))


def test_memory_grows_as_published(run):
    golden, _, reads, _, memory = run
    positions = golden.config["run"]["memory_positions"]
    frame = reads[0][0, 0, 0].numel()
    if golden.config["official"]["new_objects"]:
        # Counted there in the new object's bank, which lacks the two frames from before it came.
        assert memory == [1, 1, 2, 3, 3, 4]
        assert (memory[-1] - 2) * frame == positions
    else:
        assert memory == [1, 1, 2, 2, 3, 3, 4]
        assert memory[-1] * frame == positions
