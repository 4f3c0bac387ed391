# SPDX-License-Identifier: Apache-2.0
"""MemoryBank against a plain list of frames read with vosops.memory_read."""

import io

import pytest
import torch

import vosops
from vosops.memory import Bounded, ByteBudget, EveryNth, MemoryBank

B, CK, CV, H, W = 2, 6, 5, 3, 4
POLICIES = [EveryNth(1), EveryNth(4), Bounded(5), Bounded(4, EveryNth(2)), ByteBudget(12_000)]


class Video:
    """Frames with random keys and values; objects and the frames on which they enter and leave."""

    def __init__(self, enters, leaves=(), frames=20, shrinkage=False):
        generator = torch.Generator().manual_seed(0)
        self.enters, self.leaves, self.frames = dict(enters), dict(leaves), frames
        self.keys = torch.randn(frames, B, CK, H, W, generator=generator)
        self.values = {i: torch.randn(frames, B, CV, H, W, generator=generator) for i in self.enters}
        self.query = torch.randn(B, CK, H, W, generator=generator)
        self.shrinkage = torch.rand(frames, B, 1, H, W, generator=generator) + 0.5 if shrinkage else None

    def present(self, frame):
        ids = [i for i, start in self.enters.items() if start <= frame < self.leaves.get(i, self.frames)]
        return ids[::-1] if frame % 2 else ids  # the order of append must not matter

    def append(self, bank, frame):
        for object_id, end in self.leaves.items():
            if end == frame:
                bank.remove([object_id])
        ids = self.present(frame)
        value = torch.stack([self.values[i][frame] for i in ids], 1)
        shrinkage = None if self.shrinkage is None else self.shrinkage[frame]
        bank.append(frame, self.keys[frame], value, ids, shrinkage)

    def expected(self, bank, **options):
        """The read of every object over the frames that the bank holds and the object has seen."""
        reads = []
        for object_id in bank.object_ids:
            frames = [frame for frame in bank.frames if frame >= self.enters[object_id]]
            key, value = self.keys[frames], self.values[object_id][frames]
            if self.shrinkage is not None:
                options["shrinkage"] = self.shrinkage[frames].permute(1, 2, 0, 3, 4)
            reads.append(
                vosops.memory_read(
                    self.query, key.permute(1, 2, 0, 3, 4), value.permute(1, 2, 0, 3, 4)[:, None], **options
                )
            )
        return torch.cat(reads, 1)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("options", [{}, {"similarity": "l2", "top_k": 7}], ids=["dense", "topk"])
def test_read_of_objects_that_come_and_go(policy, options):
    video = Video({3: 0, 11: 0, 7: 6, 2: 6, 200: 13}, leaves={11: 9, 2: 16})
    bank = MemoryBank(policy)
    for frame in range(video.frames):
        video.append(bank, frame)
        assert sorted(bank.object_ids) == sorted(video.present(frame))
        read = bank.read(video.query, **options)
        torch.testing.assert_close(read, video.expected(bank, **options), rtol=1e-5, atol=1e-6)


def test_order_of_ids_is_the_order_of_entering():
    video = Video({9: 0, 4: 0, 1: 2})
    bank = MemoryBank(EveryNth(5))
    for frame in range(4):
        video.append(bank, frame)
    assert bank.object_ids == [9, 4, 1]
    assert [group.object_ids for group in bank.groups] == [(9, 4), (1,)]


def test_shrinkage_selection_and_usage():
    video = Video({1: 0, 5: 7}, shrinkage=True)
    bank = MemoryBank(Bounded(4))
    for frame in range(12):
        video.append(bank, frame)
    options = {"similarity": "l2", "top_k": 9, "selection": torch.rand(B, CK, H, W)}
    read, usage = bank.read(video.query, **options, return_usage=True)
    torch.testing.assert_close(read, video.expected(bank, **options), rtol=1e-5, atol=1e-6)
    assert usage.shape == (B, 4, H, W)
    assert usage.sum().item() == pytest.approx(2 * B * H * W, rel=1e-5)  # two groups


def test_views_are_position_major_and_not_copies():
    video = Video({1: 0, 2: 0})
    bank = MemoryBank(EveryNth(1))
    for frame in range(7):
        video.append(bank, frame)
    (group,) = bank.groups
    assert group.key.shape == (B, CK, 7, H, W)
    assert group.value.shape == (B, 2, CV, 7, H, W)
    assert group.key.stride()[1:] == (1, H * W * CK, W * CK, CK)
    assert group.value.stride()[1:] == (CV, 1, H * W * 2 * CV, W * 2 * CV, 2 * CV)
    assert group.memory_mask is None
    assert group.key.data_ptr() == bank.key.data_ptr() == bank.groups[0].key.data_ptr()
    assert torch.equal(group.key, video.keys[:7].permute(1, 2, 0, 3, 4))


def test_priors_and_masks_follow_the_slots():
    video = Video({1: 0, 5: 7})
    bank = MemoryBank(Bounded(4))
    for frame in range(11):
        video.append(bank, frame)
    assert bank.frames != tuple(sorted(bank.frames))
    cells = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1).float()
    drift = torch.tensor([float(frame) / 10 for frame in bank.frames])
    centers = (cells[None] + drift[:, None, None, None])[None]  # [1, T, H, W, 2]
    sigma = 1 + torch.rand(1, len(bank), H, W)
    mask = torch.rand(B, len(bank), H, W) > 0.3
    read = bank.read(video.query, prior=vosops.CenterPrior(centers, sigma), memory_mask=mask)
    for position, start in enumerate((0, 7)):
        slots = [slot for slot, frame in enumerate(bank.frames) if frame >= start]
        frames = [bank.frames[slot] for slot in slots]
        expected = vosops.memory_read(
            video.query,
            video.keys[frames].permute(1, 2, 0, 3, 4),
            video.values[(1, 5)[position]][frames].permute(1, 2, 0, 3, 4)[:, None],
            prior=vosops.CenterPrior(centers[:, slots], sigma[:, slots]),
            memory_mask=mask[:, slots],
        )
        torch.testing.assert_close(read[:, position : position + 1], expected, rtol=1e-5, atol=1e-6)
    object_mask = torch.rand(B, len(bank), H, W)
    prior = vosops.MaskPrior(torch.rand(B, H, W), object_mask)
    assert bank.read(video.query, prior=prior).shape == (B, 2, CV, H, W)
    with pytest.raises(ValueError, match="sigma_growth needs slots in time order"):
        bank.read(video.query, prior=vosops.KernelPrior(sigma_growth=0.5))
    with pytest.raises(ValueError, match=r"prior\.centers must have shape \(B, T, H, W, 2\)"):
        bank.read(video.query, prior=vosops.CenterPrior(centers[:, 1:]))
    with pytest.raises(ValueError, match=r"memory_mask must have shape \(B, T, H, W\)"):
        bank.read(video.query, memory_mask=mask[:, 1:])


@pytest.mark.parametrize("late", [None, 300])
def test_1000_appends_copy_linear_bytes(late):
    bank, given = MemoryBank(EveryNth(1)), 0
    for frame in range(1000):
        ids = [1] if late is None or frame < late else [1, 2]
        key, value = torch.zeros(1, 4, 2, 2), torch.zeros(1, len(ids), 8, 2, 2)
        bank.append(frame, key, value, ids)
        given += key.nbytes + value.nbytes
        assert bank.nbytes <= 1.5 * given + 4 * (key.nbytes + value.nbytes)
    assert given <= bank.bytes_copied <= 4 * given


def test_a_limited_memory_never_copies_what_it_holds():
    bank, given = MemoryBank(Bounded(6)), 0
    for frame in range(50):
        key, value = torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 8, 2, 2)
        bank.append(frame, key, value, [1])
        given += key.nbytes + value.nbytes
    assert bank.bytes_copied == given


def test_storage_dtypes():
    video = Video({1: 0})
    wide, narrow = MemoryBank(EveryNth(1)), MemoryBank(EveryNth(1), key_dtype=torch.bfloat16)
    half = MemoryBank(EveryNth(1), key_dtype=torch.bfloat16, value_dtype=torch.bfloat16)
    for frame in range(3):
        for bank in (wide, narrow, half):
            video.append(bank, frame)
    assert (narrow.key.dtype, narrow.groups[0].value.dtype) == (torch.bfloat16, torch.float32)
    assert half.nbytes * 2 == wide.nbytes
    assert half.read(video.query).dtype == torch.float32
    torch.testing.assert_close(half.read(video.query), wide.read(video.query), rtol=0.05, atol=0.05)


def test_removal_frees_storage():
    video = Video({1: 0, 2: 0, 3: 4})
    bank = MemoryBank(EveryNth(1))
    for frame in range(8):
        video.append(bank, frame)
    position = B * H * W * 4
    before = bank.nbytes
    bank.remove([2])
    assert bank.nbytes <= before - 8 * CV * position
    torch.testing.assert_close(bank.read(video.query), video.expected(bank), rtol=1e-5, atol=1e-6)
    bank.remove([1])  # with it go the frames that object 3 has not seen
    assert bank.frames == (4, 5, 6, 7)
    assert bank.nbytes == 4 * (CK + CV) * position
    torch.testing.assert_close(bank.read(video.query), video.expected(bank), rtol=1e-5, atol=1e-6)
    bank.remove([3])
    assert (len(bank), bank.nbytes, bank.object_ids, bank.groups) == (0, 0, [], [])
    bank.append(0, torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 1, 2, 2), [8])  # as new
    assert bank.frames == (0,)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("shrinkage", [False, True])
def test_state_dict_goes_on_exactly(policy, shrinkage):
    video = Video({3: 0, 7: 6, 200: 8}, leaves={7: 17}, shrinkage=shrinkage)
    bank = MemoryBank(policy)
    for frame in range(11):
        video.append(bank, frame)
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other = MemoryBank(policy)
    other.load_state_dict(torch.load(file, weights_only=True))
    similarity = "l2" if shrinkage else "dot"
    for frame in range(11, video.frames):
        assert other.frames == bank.frames
        assert torch.equal(
            other.read(video.query, similarity=similarity), bank.read(video.query, similarity=similarity)
        )
        for each in (bank, other):
            video.append(each, frame)


def test_state_dict_of_an_empty_memory_and_of_another_kind():
    bank = MemoryBank(Bounded(4))
    Video({1: 0}).append(bank, 0)
    with pytest.raises(
        ValueError, match=r"state was saved with policy Bounded\(frames=4.*this memory has EveryNth"
    ):
        MemoryBank(EveryNth(5)).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match=r"key_dtype torch\.float32, this memory has torch\.bfloat16"):
        MemoryBank(Bounded(4), key_dtype=torch.bfloat16).load_state_dict(bank.state_dict())
    bank.load_state_dict(MemoryBank(Bounded(4)).state_dict())
    assert len(bank) == 0
    with pytest.raises(KeyError):
        bank.load_state_dict({})


def test_gradients_reach_the_query_only_and_inputs_are_left_alone():
    video = Video({1: 0})
    key, query = video.keys[0].clone().requires_grad_(), video.query.clone().requires_grad_()
    value = video.values[1][0][:, None].clone().requires_grad_()
    bank = MemoryBank(EveryNth(1))
    bank.append(0, key, value, [1])
    assert not bank.key.requires_grad
    bank.read(query).square().sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0
    (key.sum() + value.sum()).backward()  # their own graph still works
    assert torch.equal(key.grad, torch.ones_like(key))
    with torch.no_grad():
        bank.append(1, key, value, [1])
    assert not bank.read(video.query).requires_grad


@pytest.mark.parametrize("top_k", [None, 4])
def test_backward_after_the_storage_was_overwritten_is_an_error(top_k):
    video = Video({1: 0})
    bank = MemoryBank(Bounded(3))
    for frame in range(4):
        video.append(bank, frame)
    read = bank.read(video.query.clone().requires_grad_(), top_k=top_k)
    video.append(bank, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.sum().backward()


def test_inference_mode_and_back():
    video = Video({1: 0, 2: 2})
    bank = MemoryBank(Bounded(3))
    with torch.inference_mode():
        for frame in range(5):
            video.append(bank, frame)
    video.append(bank, 5)
    torch.testing.assert_close(bank.read(video.query), video.expected(bank), rtol=1e-5, atol=1e-6)


def test_nan_in_unused_storage_reaches_no_read():
    # conftest fills uninitialised tensors with NaN.
    video = Video({1: 0, 2: 8}, frames=14)
    bank, masks = MemoryBank(Bounded(5)), 0
    for frame in range(video.frames):
        video.append(bank, frame)
        masks += sum(group.memory_mask is not None for group in bank.groups)
        assert bank.read(video.query).isfinite().all()
    assert masks > 0


# --------------------------------------------------------------------------------------- bad input
def filled():
    bank = MemoryBank(EveryNth(5))
    bank.append(3, torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 5, 2, 3), [1, 4])
    return bank


KEY, VALUE = torch.zeros(1, 4, 2, 3), torch.zeros(1, 2, 5, 2, 3)
BAD = [
    ((3, KEY, VALUE, [1, 4]), r"frame_index must be above the newest frame, 3, got 3"),
    ((2, KEY, VALUE, [1, 4]), r"frame_index must be above the newest frame, 3, got 2"),
    ((4.0, KEY, VALUE, [1, 4]), r"frame_index must be an integer, got float"),
    ((4, KEY[:, :, :1], VALUE, [1, 4]), r"key must have shape .* = \[1, 4, 2, 3\], got \[1, 4, 1, 3\]"),
    ((4, KEY[:, :3], VALUE, [1, 4]), r"key must have shape .* = \[1, 4, 2, 3\], got \[1, 3, 2, 3\]"),
    ((4, KEY.expand(2, -1, -1, -1), VALUE, [1, 4]), r"key must have shape .*got \[2, 4, 2, 3\]"),
    ((4, KEY[0], VALUE, [1, 4]), r"key must have shape \(B, Ck, H, W\)"),
    ((4, KEY, VALUE[0], [1, 4]), r"value must have shape \(B, O, Cv, H, W\)"),
    (
        (4, KEY, VALUE[:, :, :4], [1, 4]),
        r"value must have shape .*, got \[1, 2, 4, 2, 3\]",
    ),
    ((4, KEY, VALUE, [1, 4, 6]), r"value must have shape .*= \[1, 3, 5, 2, 3\], got \[1, 2, 5, 2, 3\]"),
    ((4, KEY.int(), VALUE, [1, 4]), r"key must have dtype .*; got torch\.int32"),
    ((4, KEY, VALUE.bool(), [1, 4]), r"value must have dtype .*; got torch\.bool"),
    ((4, KEY.numpy(), VALUE, [1, 4]), r"key must be a tensor \(B, Ck, H, W\), got ndarray"),
    ((4, KEY, VALUE[:, :1], [1]), r"object_ids lacks \[4\], which are present"),
    ((4, KEY, VALUE, [1, 1]), r"object_ids must be distinct, got \[1, 1\]"),
    ((4, KEY, VALUE, [0, 1]), r"object_ids must be at least 1 \(0 is the background\), got 0"),
    ((4, KEY, VALUE, [1, 2.5]), r"object_ids must be integers, got 2\.5"),
    ((4, KEY, VALUE[:, :0], []), r"object_ids must name at least one object"),
    ((4, KEY.to("meta"), VALUE, [1, 4]), r"key is on meta, but the memory is on cpu"),
    ((4, KEY, VALUE.to("meta"), [1, 4]), r"value is on meta, but key is on cpu"),
    ((4, KEY, VALUE, [1, 4], KEY[:, :1]), r"shrinkage: the frames before came with none"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_append(arguments, message):
    bank = filled()
    with pytest.raises((TypeError, ValueError), match=message):
        bank.append(*arguments)
    assert bank.frames == (3,)
    bank.append(4, KEY, VALUE, [4, 1])


def test_bad_first_append():
    bank = MemoryBank(EveryNth(5))
    with pytest.raises(ValueError, match="none of them 0"):
        bank.append(0, KEY[..., :0], VALUE[..., :0], [1, 4])
    with pytest.raises(ValueError, match=r"value must have shape .*, got \[1, 2, 5, 2, 2\]"):
        bank.append(0, KEY, VALUE[..., :2], [1, 4])
    with pytest.raises(ValueError, match=r"shrinkage must have shape \(B, 1, H, W\)"):
        bank.append(0, KEY, VALUE, [1, 4], KEY)
    assert len(bank) == 0
    with pytest.raises(RuntimeError, match="the memory is empty"):
        bank.read(KEY)
    with pytest.raises(RuntimeError, match="the memory is empty"):
        _ = bank.key


def test_budget_for_less_than_two_frames():
    bank = MemoryBank(ByteBudget(2 * 6 * (4 + 5) * 4))
    bank.append(0, KEY, VALUE[:, :1], [1])
    bank.append(1, KEY, VALUE[:, :1], [1])
    with pytest.raises(ValueError, match=r"holds 1 frames of 336 bytes \(objects: 2\); a memory needs two"):
        bank.append(2, KEY, VALUE, [1, 4])
    assert bank.frames == (0, 1)
    bank.append(2, KEY, VALUE[:, :1], [1])


def test_bad_removal_and_construction():
    bank = filled()
    with pytest.raises(ValueError, match=r"object_ids: \[9\] are not in the memory, which holds \[1, 4\]"):
        bank.remove([4, 9])
    assert bank.object_ids == [1, 4]
    with pytest.raises(TypeError, match="policy must be a policy such as"):
        MemoryBank(5)
    with pytest.raises(TypeError, match="policy must be a policy such as"):
        MemoryBank(EveryNth)
    with pytest.raises(TypeError, match=r"key_dtype must be one of .*; got torch\.int8"):
        MemoryBank(EveryNth(5), key_dtype=torch.int8)


def test_bad_query_is_named():
    bank = filled()
    with pytest.raises(ValueError, match="memory_key must have the channels of query_key"):
        bank.read(torch.zeros(1, 3, 2, 3))
