# SPDX-License-Identifier: Apache-2.0
"""Refiners around segmenters, and SCM's refiner for the masks of any model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vosops.data import open_frames
from vosops.models import CheckpointError
from vosops.models.refine import MaskRefiner
from vosops.propagate import CopyFirstMask, LabelPropagator
from vosops.propagate.run import RunError, VideoSegmenter, segment_video
from vosops.refine import BoundaryRefiner, FrameRefiner, PatchSettings, RefinedSegmenter
from vosops.refine.segmenter import combine

from .stand_in import Bright, Same, certain, disk, picture

SETTINGS = PatchSettings(size=24, margin=4)


@pytest.fixture(scope="module")
def network() -> MaskRefiner:
    torch.manual_seed(0)
    return MaskRefiner()


def _clip(frames: int = 5) -> tuple[list[np.ndarray], np.ndarray]:
    masks = [disk(64, 96, 32, 30 + 4 * t, 14) for t in range(frames)]
    return [picture(mask) for mask in masks], masks[0] * 5


def test_refining_leaves_the_memory_alone() -> None:
    frames, mask = _clip()
    plain, inner = LabelPropagator(), LabelPropagator()
    refined: VideoSegmenter = RefinedSegmenter(inner, BoundaryRefiner(Bright(), SETTINGS))
    plain.add(frames[0], mask)
    refined.add(frames[0], mask)
    refiner = BoundaryRefiner(Bright(), SETTINGS)
    for frame in frames[1:]:
        before = plain.step(frame)
        assert torch.equal(refined.step(frame), refiner(frame, before))
    assert refined.object_ids == [5]
    _assert_same(inner.state_dict(), plain.state_dict())


def _assert_same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            _assert_same(one[name], other[name])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            _assert_same(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_run_that_stops_goes_on_byte_for_byte(tmp_path: Path) -> None:
    frames, mask = _clip(6)
    folder = tmp_path / "frames"
    folder.mkdir()
    from PIL import Image

    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{number:05d}.png")

    def run(out: str, resume: bool, refiner: BoundaryRefiner, fail_at: int | None = None) -> list[bytes]:
        segmenter = RefinedSegmenter(LabelPropagator(), refiner)
        step, seen = segmenter.step, []

        def failing(frame: np.ndarray) -> torch.Tensor:
            seen.append(1)
            if len(seen) == fail_at:
                raise OSError("the disk is gone")
            return step(frame)

        segmenter.step = failing  # type: ignore[method-assign]
        source = open_frames(folder)
        segment_video(
            segmenter, source, mask, tmp_path / out, resume=resume, write_overlay=False, save_every=2
        )
        return [file.read_bytes() for file in sorted((tmp_path / out / "masks").iterdir())]

    refiner = BoundaryRefiner(Bright(), SETTINGS)
    whole = run("whole", False, refiner)
    with pytest.raises(RunError, match="the disk is gone"):
        run("cut", False, refiner, fail_at=4)
    assert run("cut", True, refiner) == whole


def test_a_state_of_another_refiner_is_refused() -> None:
    frames, mask = _clip()
    network = Bright()
    first = RefinedSegmenter(LabelPropagator(), BoundaryRefiner(network, SETTINGS))
    first.add(frames[0], mask)
    first.step(frames[1])
    state = first.state_dict()
    second = RefinedSegmenter(LabelPropagator(), BoundaryRefiner(network, SETTINGS))
    second.load_state_dict(state)
    assert torch.equal(second.step(frames[2]), first.step(frames[2]))
    for other in (
        BoundaryRefiner(network, PatchSettings(size=32, margin=4)),
        BoundaryRefiner(Same(), SETTINGS),
    ):
        with pytest.raises(ValueError, match="state was saved with refiner"):
            RefinedSegmenter(LabelPropagator(), other).load_state_dict(state)


def test_objects_are_removed_where_segmenters_can() -> None:
    refiner = BoundaryRefiner(Bright(), SETTINGS)
    with pytest.raises(TypeError, match="CopyFirstMask cannot remove objects"):
        RefinedSegmenter(CopyFirstMask(), refiner).remove([1])
    with pytest.raises(TypeError, match="segmenter must be a VideoSegmenter, got int"):
        RefinedSegmenter(3, refiner)
    with pytest.raises(TypeError, match="refiner must be a Refiner, got str"):
        RefinedSegmenter(CopyFirstMask(), "boundary")


def test_combining_keeps_one_object_and_shares_among_several() -> None:
    one = torch.rand(1, 6, 7)
    torch.testing.assert_close(combine(one), torch.cat((1 - one, one)))
    several = combine(torch.tensor([[0.9, 0.0, 1.0], [0.5, 0.0, 1.0]]))
    torch.testing.assert_close(several.sum(0), torch.ones(3))
    torch.testing.assert_close(several[1, 0] / several[2, 0], torch.tensor(0.9 / 0.5))
    assert several[0].tolist() == pytest.approx([0.05 / 1.45, 1.0, 0.0])


# SCM's refiner ---------------------------------------------------------------------------------------------


def test_a_frame_refiner_that_corrects_nothing_changes_nothing(network: MaskRefiner) -> None:
    truth = disk(48, 70, 24, 30, 12)
    before = certain(truth)
    refiner = FrameRefiner(network)
    torch.testing.assert_close(refiner(picture(truth), before), before, rtol=0, atol=0.05)
    weight = network.correct.weight.detach().clone()
    torch.nn.init.zeros_(network.correct.weight)
    torch.testing.assert_close(refiner(picture(truth), before), before, rtol=0, atol=2e-4)
    with torch.no_grad():
        network.correct.weight.copy_(weight)


def test_a_frame_refiner_is_the_network_per_object(network: MaskRefiner) -> None:
    masks = disk(48, 70, 24, 20, 12), disk(48, 70, 24, 50, 10)
    before, frame = certain(*masks), picture(*masks)
    found = FrameRefiner(network)(frame, before)
    image = torch.from_numpy(frame).permute(2, 0, 1)[None] / 255
    logits = before[1:, None].clamp(1e-4, 1 - 1e-4).logit()
    with torch.no_grad():
        expected = combine(network(image, logits)[:, 0].sigmoid())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.ones(48, 70))
    alone = torch.ones(1, 48, 70)
    assert FrameRefiner(network)(frame, alone) is alone
    with pytest.raises(TypeError, match="network must be a MaskRefiner, got Linear"):
        FrameRefiner(torch.nn.Linear(1, 1))


def test_a_checkpoint_of_scm_gives_its_refiner(network: MaskRefiner, tmp_path: Path) -> None:
    own = {name: value.contiguous() for name, value in network.state_dict().items()}
    inside = {f"refine.{name}": value for name, value in own.items()} | {"Encoder_Q.mean": torch.zeros(3)}
    save_file(own, tmp_path / "own.safetensors")
    save_file(inside, tmp_path / "scm.safetensors")
    save_file({"Encoder_Q.mean": torch.zeros(3)}, tmp_path / "stm.safetensors")
    expected = FrameRefiner(network).settings
    for name in ("own", "scm"):
        assert FrameRefiner.load(tmp_path / f"{name}.safetensors").settings == expected
    with pytest.raises(CheckpointError, match="stm.safetensors does not fit mask_refiner"):
        FrameRefiner.load(tmp_path / "stm.safetensors")
