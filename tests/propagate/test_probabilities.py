# SPDX-License-Identifier: Apache-2.0
"""Saved probabilities come back within what is promised, and stand in for the run that gave them."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.propagate.stand_in import ColourModel
from vosops.data import WriteError, open_frames
from vosops.data.rendered_clip import render_clip
from vosops.memory import Bounded
from vosops.models import SessionSettings
from vosops.propagate import CopyFirstMask, Tracker
from vosops.propagate.ensemble import EnsembleSegmenter
from vosops.propagate.probabilities import (
    ProbabilitiesError,
    SavedProbabilities,
    SavingSegmenter,
    read_probabilities,
    write_probabilities,
)
from vosops.propagate.run import VideoSegmenter, segment_video

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip():
    return render_clip(frames=8, size=(64, 96))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tracker(stride: int = 4) -> Tracker:
    return Tracker(ColourModel(stride), SessionSettings(policy=Bounded(4)))


def save(folder: Path, clip, stride: int = 4) -> list[torch.Tensor]:
    saving = SavingSegmenter(tracker(stride), folder, {"stride": stride})
    saving.add(clip.frames[0], clip.masks[0])
    return [saving.step(frame) for frame in clip.frames[1:]]


@pytest.mark.parametrize("objects", [1, 3, 40])
def test_rounding_is_within_what_is_promised(tmp_path, objects):
    torch.manual_seed(objects)
    logits = torch.randn(1 + objects, 30, 40) * torch.linspace(0, 12, 40)
    logits[0, :15] = -30  # no background: rounded objects pass 1 together
    probabilities = logits.softmax(0)
    path = tmp_path / "00000.npz"
    write_probabilities(path, probabilities, range(5, 5 + objects))
    found, ids = read_probabilities(path)
    assert ids == list(range(5, 5 + objects))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0), torch.ones(30, 40), rtol=0, atol=1e-5)
    assert found.min() >= 0
    levels = np.load(path)["probabilities"]
    assert np.abs(levels / 255 - probabilities[1:].numpy()).max() <= 1 / 510 + 1e-6
    error = (found - probabilities).abs()
    scaled = levels.astype(int).sum(0) > 255
    assert error[1:][:, ~scaled].max() <= 1 / 510 + 1e-6
    assert error[1:].max() <= (1 + objects) / 510 + 1e-6
    assert error[0].max() <= objects / 510 + 1e-6
    assert scaled.any() == (objects > 1)


def test_file_without_objects_and_files_that_are_none(tmp_path):
    path = tmp_path / "00000.npz"
    write_probabilities(path, torch.ones(1, 4, 6, dtype=torch.bfloat16), [])
    found, ids = read_probabilities(path)
    assert ids == []
    assert torch.equal(found, torch.ones(1, 4, 6))
    write_probabilities(path, torch.full((3, 40, 60), 1 / 3), [1, 2])
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:-30], b"", b"mask", whole[:80] + b"????" + whole[84:]):
        path.write_bytes(damaged)
        with pytest.raises(ProbabilitiesError, match=r"00000\.npz: cannot be read"):
            read_probabilities(path)
    np.savez_compressed(path, masks=np.zeros(3))
    with pytest.raises(ProbabilitiesError, match=r"holds \['masks'\], expected"):
        read_probabilities(path)
    np.savez_compressed(path, object_ids=np.arange(2), probabilities=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ProbabilitiesError, match=r"uint8 \[3, 4, 4\] for 2 ids"):
        read_probabilities(path)
    with pytest.raises(ProbabilitiesError, match=r"00001\.npz: no such file"):
        read_probabilities(tmp_path / "00001.npz")


def test_bad_probabilities_are_refused_before_writing(tmp_path):
    path = tmp_path / "00000.npz"
    good = torch.full((3, 4, 4), 1 / 3)
    for probabilities, ids, error, message in (
        (good.numpy(), [1, 2], TypeError, "floating-point tensor .* got ndarray"),
        (good.byte(), [1, 2], TypeError, "floating-point tensor .* got torch.uint8"),
        (good, [1], ValueError, r"got \[3, 4, 4\] and ids \[1\]"),
        (good, [1, 1], ValueError, "distinct object_ids"),
        (good * torch.nan, [1, 2], ValueError, "must be finite"),
    ):
        with pytest.raises(error, match=message):
            write_probabilities(path, probabilities, ids)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WriteError, match=r"cannot write .*missing"):
        write_probabilities(tmp_path / "missing" / "00000.npz", good, [1, 2])


def test_a_run_is_saved_unchanged_and_read_back(tmp_path, clip):
    plain = tracker()
    plain.add(clip.frames[0], clip.masks[0])
    expected = [plain.step(frame) for frame in clip.frames[1:]]
    found = save(tmp_path / "run", clip)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    names = [f"{t:05d}.npz" for t in range(8)] + ["probabilities.json"]
    assert sorted(content(tmp_path / "run")) == names
    reader: VideoSegmenter = SavedProbabilities(tmp_path / "run")
    assert reader.manifest["settings"] == {"stride": 4}
    assert reader.manifest["size"] == [64, 96]
    reader.add(clip.frames[0], clip.masks[0])
    assert reader.object_ids == [1, 2]
    for frame, probabilities in zip(clip.frames[1:], expected, strict=True):
        again = reader.step(frame)
        assert (again[1:] - probabilities[1:]).abs().max() <= 1 / 510 + 1e-6
        assert (again[0] - probabilities[0]).abs().max() <= 2 / 510 + 1e-6
    with pytest.raises(ProbabilitiesError, match="holds 8 frames, the video goes on"):
        reader.step(clip.frames[0])


def test_an_offline_ensemble_gives_what_the_online_one_gives(tmp_path, clip):
    strides = (2, 4, 8)
    online = EnsembleSegmenter([tracker(stride) for stride in strides], "keypoints")
    for stride in strides:
        save(tmp_path / str(stride), clip, stride)
    offline = EnsembleSegmenter([SavedProbabilities(tmp_path / str(s)) for s in strides], "keypoints")
    for ensemble in (online, offline):
        ensemble.add(clip.frames[0], clip.masks[0])
    assert offline.memory_nbytes == 0
    for frame in clip.frames[1:]:
        a, b = online.step(frame), offline.step(frame)
        # A pixel that rounding gives to another object may hold a keypoint, but not many.
        assert ((a - b).abs() > 3 / 510).float().mean() < 0.02
        assert (a.argmax(0) == b.argmax(0)).float().mean() > 0.98


def test_objects_that_were_added_later_and_objects_that_are_not_asked_for(tmp_path, clip):
    first, late = (np.where(clip.masks[t] == i, i, 0).astype(np.uint8) for t, i in ((0, 1), (3, 2)))
    for name, stepped in (("stepped", True), ("direct", False)):
        saving = SavingSegmenter(tracker(), tmp_path / name)
        saving.add(clip.frames[0], first)
        for frame in clip.frames[1 : 4 if stepped else 3]:
            saving.step(frame)
        saving.add(clip.frames[3], late)
        saving.step(clip.frames[4])
    assert content(tmp_path / "stepped") == content(tmp_path / "direct")
    both, one = SavedProbabilities(tmp_path / "direct"), SavedProbabilities(tmp_path / "direct")
    for reader in (both, one):
        reader.add(clip.frames[0], first)
        for frame in clip.frames[1:3]:
            assert len(reader.step(frame)) == 2
        assert reader.object_ids == [1]
    both.add(clip.frames[3], late)
    one.step(clip.frames[3])
    assert (both.object_ids, one.object_ids) == ([1, 2], [1])
    found = both.step(clip.frames[4])
    assert torch.equal(found, read_probabilities(tmp_path / "direct" / "00004.npz")[0])
    alone = one.step(clip.frames[4])
    torch.testing.assert_close(alone, torch.stack((found[0] + found[2], found[1])))
    assert torch.equal(alone[1], found[1])


def test_removed_objects(tmp_path, clip):
    saving = SavingSegmenter(tracker(), tmp_path)
    saving.add(clip.frames[0], clip.masks[0])
    reader = None
    for t, frame in enumerate(clip.frames[1:5], 1):
        saving.step(frame)
        if t == 2:
            saving.remove([1])
    assert saving.object_ids == [2]
    assert [read_probabilities(tmp_path / f"{t:05d}.npz")[1] for t in range(5)] == [[1, 2]] * 3 + [[2]] * 2
    reader = SavedProbabilities(tmp_path)
    reader.add(clip.frames[0], clip.masks[0])
    with pytest.raises(ValueError, match=r"ids of \[1, 2\], got \[7\]"):
        reader.remove([7])
    reader.remove([2])
    assert reader.step(clip.frames[1]).shape == (2, 64, 96)
    with pytest.raises(TypeError, match="CopyFirstMask cannot remove objects"):
        SavingSegmenter(CopyFirstMask(), tmp_path / "other").remove([1])


def test_another_run_is_refused(tmp_path, clip):
    save(tmp_path, clip)
    before = content(tmp_path)
    for settings, frame, mask in (
        ({"stride": 8}, clip.frames[0], clip.masks[0]),
        ({"stride": 4}, clip.frames[1], clip.masks[0]),
        ({"stride": 4}, clip.frames[0], clip.masks[1]),
    ):
        with pytest.raises(
            ProbabilitiesError, match=r"holds probabilities of another run \((settings|first)"
        ):
            SavingSegmenter(tracker(), tmp_path, settings).add(frame, mask)
    saving = SavingSegmenter(tracker(), tmp_path, {"stride": 4})
    with pytest.raises(ValueError, match="mask must hold at least one object"):
        saving.add(clip.frames[0], clip.masks[0] * 0)
    assert content(tmp_path) == before
    with pytest.raises(TypeError, match="settings must be JSON values"):
        SavingSegmenter(tracker(), tmp_path, {"model": torch.nn.ReLU()})
    reader = SavedProbabilities(tmp_path)
    for frame, mask, message in (
        (
            clip.frames[0][:32],
            clip.masks[0][:32],
            r"size of the probabilities in .*\[64, 96\], got \[32, 96\]",
        ),
        (clip.frames[0], clip.masks[0] + 10, r"holds objects \[1, 2\], the mask has \[10, 11, 12\]"),
        (clip.frames[0], clip.masks[2], "was saved from another mask of object 1"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.add(frame, mask)
    with pytest.raises(RuntimeError, match="step needs objects to follow"):
        reader.step(clip.frames[0])
    with pytest.raises(ProbabilitiesError, match=r"holds no probabilities\.json"):
        SavedProbabilities(tmp_path / "nowhere")
    for text, message in (
        ("{", "is damaged"),
        ("[1]", "is damaged"),
        (json.dumps({**reader.manifest, "format": 2}), "has format 2"),
    ):
        (tmp_path / "probabilities.json").write_text(text)
        with pytest.raises(ProbabilitiesError, match=message):
            SavedProbabilities(tmp_path)


def test_states_are_exact_and_know_their_folder(tmp_path, clip):
    whole = save(tmp_path / "whole", clip)
    saving = SavingSegmenter(tracker(), tmp_path / "run", {"stride": 4})
    saving.add(clip.frames[0], clip.masks[0])
    for frame in clip.frames[1:4]:
        saving.step(frame)
    file = io.BytesIO()
    torch.save(saving.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    saving.step(clip.frames[4])  # written, but not in the state
    (tmp_path / "run" / ".00005.npz.tmp.npz").write_bytes(b"half")
    resumed = SavingSegmenter(tracker(), tmp_path / "run", {"stride": 4})
    resumed.load_state_dict(state)
    for frame, expected in zip(clip.frames[4:], whole[3:], strict=True):
        assert torch.equal(resumed.step(frame), expected)
    assert content(tmp_path / "run") == content(tmp_path / "whole")

    with pytest.raises(ValueError, match="state was saved with settings"):
        SavingSegmenter(tracker(), tmp_path / "run").load_state_dict(state)
    with pytest.raises(ProbabilitiesError, match=r"lacks 00003\.npz"):
        SavingSegmenter(tracker(), tmp_path / "empty", {"stride": 4}).load_state_dict(state)
    reader, other = (SavedProbabilities(tmp_path / "whole") for _ in range(2))
    reader.add(clip.frames[0], clip.masks[0])
    reader.step(clip.frames[1])
    other.load_state_dict(reader.state_dict())
    assert torch.equal(other.step(clip.frames[2]), reader.step(clip.frames[2]))
    save(tmp_path / "second", clip, 8)
    shifted = SavingSegmenter(tracker(), tmp_path / "third")
    shifted.add(clip.frames[1], clip.masks[1])
    with pytest.raises(ValueError, match="of another run"):
        SavedProbabilities(tmp_path / "third").load_state_dict(reader.state_dict())


KILLED = """
import sys
sys.path[:0] = {path!r}
from tests.propagate.test_probabilities import segment_and_save
segment_and_save({folder!r}, delay=0.05)
"""


class Slow(SavingSegmenter):
    """Waits before each frame, so that there is time to be killed."""

    delay = 0.0

    def step(self, frame):
        time.sleep(self.delay)
        return super().step(frame)


def segment_and_save(folder: Path | str, delay: float = 0.0, resume: bool = False) -> None:
    folder = Path(folder)
    clip = render_clip(frames=12, size=(64, 96))
    segmenter = Slow(tracker(), folder / "probabilities")
    segmenter.delay = delay
    source = open_frames(folder.parent / "clip")
    segment_video(
        segmenter, source, clip.masks[0], folder / "run", resume=resume, write_overlay=False, save_every=4
    )


def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    clip = render_clip(frames=12, size=(64, 96))
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{number:05d}.png")
    segment_and_save(tmp_path / "whole")
    killed = tmp_path / "killed"
    script = KILLED.format(path=[str(Path.cwd()), *sys.path], folder=str(killed))
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 120
        while not (killed / "probabilities" / "00006.npz").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (killed / "probabilities" / "00011.npz").exists()
    segment_and_save(killed, resume=True)
    assert content(killed) == content(tmp_path / "whole")


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory in use is read from /proc")
def test_twenty_models_over_five_hundred_frames_stream_in_bounded_memory(tmp_path):
    """What 450 frames leave behind is less than the results of ten of them."""
    size, frames, members, ids = (64, 96), 500, 20, [1, 2]
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[8:30, 8:40], mask[34:60, 50:90] = ids
    saving = SavingSegmenter(CopyFirstMask(), tmp_path)
    saving.add(picture, mask)
    for _ in range(1, frames):
        saving.step(picture)
    # All members read one folder: twenty readers of 500 files each, without writing 10,000.
    ensemble = EnsembleSegmenter([SavedProbabilities(tmp_path) for _ in range(members)])
    ensemble.add(picture, mask)
    for number in range(1, frames):
        found = ensemble.step(picture)
        if number == 49:
            begun = resident_bytes()
    expected = torch.stack([torch.from_numpy(mask == i).float() for i in (0, *ids)])
    torch.testing.assert_close(found, expected)
    assert resident_bytes() - begun < 10 * members * found.nbytes
