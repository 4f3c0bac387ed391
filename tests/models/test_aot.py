# SPDX-License-Identifier: Apache-2.0
"""AOT's session beyond the golden files: groups, reference frames, bounds, sizes, training, block V2."""

import numpy as np
import pytest
import torch

import vosops
from tests.models.weights import Golden, fill
from vosops.memory import Bounded, ByteBudget
from vosops.models import SessionSettings, create
from vosops.models.aot import AOT, DeAOT
from vosops.models.aot_session import merge_groups
from vosops.propagate import Tracker

CONFIG = {"gain": 0.9, "boost": {"patch_wise_id_bank": 8.0}}


@pytest.fixture(scope="module")
def aott():
    return fill(create("aott"), CONFIG)


@pytest.fixture(scope="module")
def clip():
    golden = Golden("AOTT_12_objects")
    frames = golden.arrays["frames"][:, :64, :96]
    return [frames[t % len(frames)] for t in (0, 1, 2, 3, 2, 1, 0, 1, 2, 3)]


def grid_mask(objects, size=(64, 96), first=1):
    """Objects as columns of tiles, ids from `first` on."""
    mask = np.zeros(size, int)
    for i in range(objects):
        row, column = divmod(i, 6)
        mask[row * 15 + 2 : row * 15 + 15, column * 16 + 1 : column * 16 + 15] = first + i
    return mask


def test_groups_of_ten_share_the_encoder(aott, clip):
    calls = []
    handle = aott.encoder.register_forward_hook(lambda *_: calls.append(1))
    tracker = Tracker(aott)
    tracker.add(clip[0], grid_mask(23))
    for frame in clip[1:4]:
        probabilities = tracker.step(frame)
    handle.remove()
    assert len(calls) == 4
    assert probabilities.shape == (24, 64, 96)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(64, 96), atol=1e-5, rtol=0)
    assert [group.given for group in tracker._session._groups] == [10, 10, 3]


def test_a_group_alone_is_as_if_the_others_were_not_there(aott, clip):
    """Groups never see each other: eleven objects give the first ten's logits of ten objects."""

    def logits(objects):
        seen = []
        handle = aott.decoder.register_forward_hook(lambda m, i, out: seen.append(out))
        tracker = Tracker(aott)
        tracker.add(clip[0], np.where(grid_mask(11) <= objects, grid_mask(11), 0))
        tracker.step(clip[1])
        handle.remove()
        return seen[0]

    assert torch.equal(logits(10), logits(11))


def test_an_object_that_comes_later_fills_the_group_and_identities_are_not_used_twice(aott, clip):
    tracker = Tracker(aott, SessionSettings(memory_every=2))
    tracker.add(clip[0], grid_mask(9))
    tracker.step(clip[1])
    tracker.remove([4])
    late = np.zeros((64, 96), int)
    late[50:60, 10:40], late[50:60, 50:80] = 40, 41
    tracker.add(clip[1], late)
    tracker.step(clip[2])
    groups = tracker._session._groups
    assert groups[0].identities == {1: 1, 2: 2, 3: 3, 5: 5, 6: 6, 7: 7, 8: 8, 9: 9, 40: 10}
    assert groups[1].identities == {41: 1}
    assert tracker.object_ids == [1, 2, 3, 5, 6, 7, 8, 9, 40, 41]
    assert [len(group.long[0]) for group in groups] == [2, 1]
    tracker.remove([41])
    assert len(tracker._session._groups) == 1
    assert tracker.step(clip[3]).shape == (10, 64, 96)


def test_reference_frames_outlive_the_others(aott, clip):
    tracker = Tracker(aott, SessionSettings(memory_every=1, policy=Bounded(4)))
    tracker.add(clip[0], grid_mask(2))
    for t, frame in enumerate(clip[1:], 1):
        tracker.step(frame)
        if t == 2:
            tracker.add(frame, grid_mask(1, first=7))
    frames = tracker._session._groups[0].long[0].frames
    assert len(frames) == 4
    assert {0, 2} < set(frames)
    assert max(frames) == 8


def test_a_byte_budget_holds_over_groups_and_blocks(clip):
    model = fill(create("aots"), CONFIG)
    budget = 2 * 2 * 3 * (4 * 6) * 512 * 4  # three frames for two groups of two blocks
    tracker = Tracker(model, SessionSettings(memory_every=1, policy=ByteBudget(budget)))
    tracker.add(clip[0], grid_mask(12))
    for frame in clip[1:]:
        tracker.step(frame)
        banks = [bank for group in tracker._session._groups for bank in group.long]
        assert sum(bank.nbytes for bank in banks) <= budget
    # 64 x 96 is seen as 65 x 97: 5 x 7 cells, so fewer frames fit than on 4 x 6 cells.
    assert {len(bank) for bank in banks} == {2}


@pytest.mark.parametrize(("name", "every"), [("aotb", None), ("aotl", 5), ("deaotl", 5), ("deaotb", None)])
def test_long_term_memory_as_published(name, every, clip):
    tracker = Tracker(create(name))
    tracker.add(clip[0], grid_mask(2))
    for t in range(12):
        tracker.step(clip[t % 10])
    frames = tracker._session._groups[0].long[0].frames
    assert frames == ((0,) if every is None else (0, 5, 10))


def test_no_second_matrix(aott, clip):
    """top_k 0 is the dense read; a top_k of all tokens gives the same."""
    results = []
    for top_k in (0, 10**6, 40):
        tracker = Tracker(aott, SessionSettings(memory_every=1, top_k=top_k))
        tracker.add(clip[0], grid_mask(3))
        results.append(torch.stack([tracker.step(frame) for frame in clip[1:4]]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0][1:], results[2][1:])


@pytest.mark.parametrize(
    ("height", "width"), [(480, 854), (64, 96), (65, 97), (1080, 1920), (17, 20), (720, 1280)]
)
def test_sizes_of_the_published_evaluation(height, width, aott):
    """np.around of (side - 1) / 16, as published; masks come back at the frame's size."""
    expected = tuple(max(int(np.around((side - 1) / 16)), 1) * 16 + 1 for side in (height, width))
    assert aott.network_size((height, width)) == expected
    capped = create("aott", long_edge=1040)
    if (height, width) == (720, 1280):
        assert capped.network_size((height, width)) == (577, 1041)
    swin = {(480, 854): (480, 848), (64, 96): (64, 96)}
    if (height, width) in swin:
        with torch.device("meta"):
            unaligned = create("swinb_aotl")
        assert unaligned.network_size((height, width)) == swin[height, width]


def test_logits_come_straight_at_the_frames_size(aott, clip):
    """As torch's own bilinear resizing of the logits at stride 4, unused identities left out."""
    frame = clip[0][:50, :77]
    seen = []
    handle = aott.decoder.register_forward_hook(lambda m, i, out: seen.append(out))
    tracker = Tracker(aott)
    tracker.add(frame, grid_mask(3, (50, 77)))
    ours = tracker.step(clip[1][:50, :77])
    handle.remove()
    assert seen[0].shape[-2:] == (13, 21)  # of 49 x 81
    expected = torch.nn.functional.interpolate(seen[0][:, :4], (50, 77), mode="bilinear", align_corners=True)
    torch.testing.assert_close(ours, expected.softmax(1)[0], atol=1e-6, rtol=0)


def test_groups_merge_as_published():
    torch.manual_seed(0)
    first, second = torch.randn(1, 11, 4, 5), torch.randn(1, 3, 4, 5)
    a, b = first.softmax(1), second.softmax(1)
    merged = torch.cat((a[:, :1] * b[:, :1], a[:, 1:], b[:, 1:]), 1).clamp(1e-5, 1 - 1e-5)
    expected = (merged / (1 - merged)).log().softmax(1)
    torch.testing.assert_close(merge_groups([first, second]), expected)
    assert torch.equal(merge_groups([first]), a)


@pytest.mark.parametrize("name", ["aott", "deaott"])
def test_training_reaches_every_weight(name):
    torch.manual_seed(0)
    model = create(name, layers=2, memory_every=1).train()
    frames = torch.rand(2, 4, 3, 49, 65)
    masks = torch.zeros(2, 2, 49, 65)
    masks[:, 0, 8:30, 8:30], masks[:, 1, 20:45, 34:60] = 1, 1
    logits = model(frames, masks)
    assert logits.shape == (2, 3, 3, 49, 65)
    logits.square().mean().backward()
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == set()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_training_is_the_tracker_without_late_frames(aott, clip):
    """The clip segmented by `forward` equals the tracker's frames, as one clip of a batch and alone."""
    frames = np.stack([frame[:49, :81] for frame in clip[:4]])
    mask = grid_mask(3, (49, 81))
    tracker = Tracker(aott)
    tracker.add(frames[0], mask)
    expected = torch.stack([tracker.step(frame) for frame in frames[1:]])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255
    masks = torch.stack([torch.from_numpy(mask == i) for i in (1, 2, 3)])[None].float()
    with torch.no_grad():
        logits = aott(pixels.expand(2, -1, -1, -1, -1), masks.expand(2, -1, -1, -1))
    for row in logits:
        torch.testing.assert_close(row.softmax(1), expected, atol=2e-5, rtol=0)


def test_too_many_objects_for_training():
    with torch.device("meta"):
        model = create("aott")
    with pytest.raises(ValueError, match="first_mask must have at most 10 objects, got 11"):
        model(torch.zeros(1, 2, 3, 33, 33), torch.zeros(1, 11, 33, 33))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"block": 3}, "block must be 1 or 2, got 3"),
        ({"memory_every": 0}, "memory_every must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"long_edge": 3}, "long_edge must be at least 32, got 3"),
        ({"encoder": "vgg"}, "name must be mobilenetv2, .* or timm:NAME, got 'vgg'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AOT(**options)


def test_short_term_memory_cannot_be_switched_off(aott):
    with pytest.raises(ValueError, match="include_previous must not be False"):
        Tracker(aott, SessionSettings(include_previous=False))


@pytest.mark.parametrize("encoder", ["timm:resnext26ts", "timm:efficientnet_b0"])
def test_the_improved_aot_takes_encoders_of_timm(encoder, clip):
    torch.manual_seed(0)
    model = create("aotl_v2", encoder=encoder, layers=1)
    calls = []
    original = vosops.nn.attention.attention

    def spy(*args, **options):
        calls.append(options.get("top_k"))
        return original(*args, **options)

    tracker = Tracker(model)
    tracker.add(clip[0], grid_mask(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vosops.nn.attention, "attention", spy)
        probabilities = tracker.step(clip[1])
    assert probabilities.shape == (3, 64, 96)
    assert 32 in calls  # the long-term read keeps the 32 best
    assert isinstance(model.id_norm, torch.nn.LayerNorm)


def test_identities_reach_the_keys_of_block_2_only(clip):
    for block, differ in ((1, False), (2, True)):
        torch.manual_seed(0)
        model = AOT(block=block).eval()
        keys = []
        for objects in (1, 2):
            tracker = Tracker(model)
            tracker.add(clip[0], grid_mask(objects))
            tracker.step(clip[1])
            keys.append(tracker._session._groups[0].long[0].key.clone())
        assert torch.equal(*keys) is not differ


@pytest.mark.parametrize("kind", [AOT, DeAOT])
def test_autocast_and_backends_agree(kind, clip):
    torch.manual_seed(0)
    model = kind().eval()

    def run(backend=None, dtype=torch.float32):
        tracker = Tracker(model, SessionSettings(memory_every=1), dtype=dtype)
        with vosops.use_backend(backend) if backend else vosops.use_backend("reference"):
            tracker.add(clip[0], grid_mask(2))
            return torch.stack([tracker.step(frame) for frame in clip[1:4]])

    expected = run()
    torch.testing.assert_close(run(dtype=torch.bfloat16), expected, atol=0.02, rtol=0)
    if not vosops.ops.backends.reasons_against("cpu", {}):
        torch.testing.assert_close(run("cpu"), expected, atol=1e-5, rtol=0)
