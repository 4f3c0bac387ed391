# SPDX-License-Identifier: Apache-2.0
"""XMem: the network and its session against plain formulas, objects that come and go, training."""

import io

import numpy as np
import pytest
import torch

import vosops
from tests.models.weights import fill
from tests.models.xmem_plain import PlainXMem
from vosops.memory import Bounded, EveryNth, MemoryBank
from vosops.memory.long_term import LongTerm
from vosops.models.encoders import normalize_imagenet
from vosops.models.session import SessionSettings
from vosops.models.xmem import XMem
from vosops.propagate.tracker import Tracker

H, W = 48, 64
SMALL = LongTerm(max_frames=4, min_frames=2, prototypes=5, capacity=12)
# Louder keys and masks: a random network hardly listens to them.
RULE = {"gain": 1.0, "boost": {"key_proj.key_proj": 2.0, "value_encoder.conv1": 3.0}}


@pytest.fixture(scope="module")
def model():
    return fill(XMem(), RULE)


@pytest.fixture(scope="module")
def no_sensory():
    return fill(XMem(key_dim=32, value_dim=96, hidden_dim=0), RULE)


class Clip:
    """Blobs on noise: frames (H, W, 3) uint8, and the mask of every object on the frame it enters."""

    def __init__(self, frames, enters, height=H, width=W):
        generator = np.random.default_rng(0)
        base = generator.integers(0, 256, (height, width, 3))
        self.frames = [
            ((np.roll(base, 2 * t, 1) + generator.integers(0, 40, base.shape)) // 2).astype(np.uint8)
            for t in range(frames)
        ]
        self.enters, self.size = enters, (height, width)

    def labels(self, t):
        """The label map of the objects that enter on frame t, or None."""
        ids = [object_id for object_id, start in self.enters.items() if start == t]
        labels = np.zeros(self.size, np.int64)
        for object_id in ids:
            column = (7 * object_id + 3 * t) % (self.size[1] - 20)
            labels[6 * (object_id % 4) : 6 * (object_id % 4) + 20, column : column + 16] = object_id
        return labels if ids else None

    def track(self, tracker, begin=0, end=None, leaves=()):
        """Probabilities of the frames, with masks given where objects enter and objects removed."""
        results = []
        for t in range(begin, len(self.frames) if end is None else end):
            if t:
                tracker.step(self.frames[t])
            if (labels := self.labels(t)) is not None:
                tracker.add(self.frames[t], labels)
            if gone := [object_id for object_id, last in dict(leaves).items() if last == t]:
                tracker.remove(gone)
            results.append(tracker.probabilities)
        return results

    def plain(self, model, **options):
        """The same by the plain loop; sizes are multiples of 16."""
        images = [torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255 for frame in self.frames]
        masks = {}
        for t in range(len(images)):
            if (labels := self.labels(t)) is not None:
                ids = [i for i, start in self.enters.items() if start == t]
                masks[t] = torch.stack([torch.from_numpy(labels == i) for i in sorted(ids)])[None].float()
        with torch.no_grad():
            images = [normalize_imagenet(image) for image in images]
            return PlainXMem(model.state_dict()).run(images, masks, model.hidden_dim, **options)


def test_without_sensory_memory_it_has_the_published_size():
    state = XMem(hidden_dim=0).state_dict()
    assert len(state) == 402
    assert sum(parameter.numel() for parameter in XMem(hidden_dim=0).parameters()) == 59_783_560


def test_dimensions_come_from_the_weights(no_sensory):
    for dimensions in ((64, 512, 64), (32, 96, 0), (16, 64, 24)):
        with torch.device("meta"):
            state = XMem(*dimensions).state_dict()
            found = XMem.from_state_dict(state).state_dict()
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in state.items()
        }
    with torch.device("meta"):
        assert XMem.from_state_dict({}).hidden_dim == 0
    with pytest.raises(ValueError, match="hidden_dim must be at least 0, got -1"):
        XMem(hidden_dim=-1)


@pytest.mark.parametrize("name", ["model", "no_sensory"])
def test_probabilities_follow_the_published_loop(name, request, cpu_backend):
    """Sensory memory in its order, values, top-k read and decoder; a second and third object on the way."""
    model = request.getfixturevalue(name)
    clip = Clip(11, {1: 0, 2: 3, 3: 8})
    expected = clip.plain(model, memory_every=2, top_k=17)
    tracker = Tracker(model, SessionSettings(memory_every=2, top_k=17))
    for t, (ours, theirs) in enumerate(zip(clip.track(tracker), expected, strict=True)):
        torch.testing.assert_close(ours[None], theirs, rtol=1e-4, atol=5e-5, msg=lambda m, t=t: f"{t}: {m}")
    assert min(p.std() for p in expected[-1][0]) > 1e-3  # the masks do say something


def test_intermediates_follow_the_plain_network(model):
    plain = PlainXMem(model.state_dict())
    image = normalize_imagenet(torch.rand(1, 3, H, W))
    masks = (torch.rand(1, 3, H, W) > 0.5).float()
    with torch.no_grad():
        features = model.encode(image)
        key, shrinkage, selection, maps = plain.encode(image)
        for ours, theirs in zip(
            features, (key, shrinkage, selection, maps[2], maps[1], maps[0]), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        hidden = torch.rand(1, 3, 64, H // 16, W // 16)
        value, deep = model.encode_value(image, masks, features, hidden, deep_update=True)
        assert model.encode_value(image, masks, features, hidden, deep_update=False)[1] is hidden
        read = torch.randn(1, 3, 512, H // 16, W // 16)
        logits, normal = model.decoder(read, features, hidden)
        for number in range(3):
            expected = plain.encode_value(image, maps[2], masks, number)
            torch.testing.assert_close(value[:, number], expected, rtol=1e-4, atol=2e-5)
            expected = plain.gate("value_encoder.hidden_reinforce", expected, hidden[:, number])
            torch.testing.assert_close(deep[:, number], expected, rtol=1e-4, atol=2e-5)
            expected, after = plain.decode(maps, read[:, number], hidden[:, number])
            ours = torch.nn.functional.interpolate(
                logits[:, number][:, None], scale_factor=4, mode="bilinear"
            )
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=5e-5)
            torch.testing.assert_close(normal[:, number], after, rtol=1e-4, atol=2e-5)


def test_backends_agree(model):
    """With compression and eviction: their choices are discrete, so they show any difference."""
    results = []
    for backend in ("reference", "cpu"):
        if reasons := vosops.ops.backends.reasons_against(backend, {}):
            pytest.skip("; ".join(reasons))
        with vosops.use_backend(backend):
            tracker = Tracker(model, SessionSettings(memory_every=1, policy=SMALL))
            results.append(Clip(12, {1: 0, 2: 0, 5: 4}).track(tracker))
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_objects_come_and_go_and_a_state_goes_on_bit_for_bit(no_sensory, model, cpu_backend):
    clip, leaves = Clip(15, {4: 0, 1: 2, 9: 5, 3: 9}), {4: 7, 9: 11}
    settings = SessionSettings(memory_every=1, policy=SMALL)
    tracker = Tracker(model, settings)
    clip.track(tracker, end=8, leaves=leaves)
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    resumed = Tracker(model, settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    expected = clip.track(tracker, begin=8, leaves=leaves)
    for ours, theirs in zip(clip.track(resumed, begin=8, leaves=leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert tracker.object_ids == [1, 3]


def test_another_object_does_not_disturb_memories(model, cpu_backend):
    """The sensory memory of each object follows its id, whatever order the ids are given in."""
    image = model.prepare(torch.rand(1, 3, H, W))
    probabilities = torch.rand(1, 4, H, W).softmax(1)
    sessions = [model.open_session(SessionSettings()) for _ in range(2)]
    with torch.no_grad():
        features = sessions[0].encode(image)
        for session, order in zip(sessions, ([7, 2, 5], [5, 7, 2]), strict=True):
            channels = [0, *(1 + [7, 2, 5].index(i) for i in order)]
            session.remember(0, image, features, probabilities[:, channels], order, given=True)
            session.remove([2])
            segmented = session.segment(features)
            order = session.object_ids
            results = [segmented[:, 1 + order.index(i)] for i in (5, 7)]
            with pytest.raises(ValueError, match=r"object_ids lacks \[7\]"):
                session.remember(1, image, features, segmented, [5], given=False)
            if session is sessions[0]:
                first = results
    for ours, expected in zip(results, first, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    sessions[0].remove([7, 5])
    assert sessions[0].object_ids == []
    assert sessions[0].memory_nbytes == 0


def test_memory_stays_bounded_with_objects_that_come_and_go(no_sensory, cpu_backend):
    clip = Clip(50, {i: 4 * i for i in range(1, 13)} | {50: 0}, 32, 32)
    leaves = {i: 4 * i + 9 for i in range(1, 13)}
    tracker = Tracker(no_sensory, SessionSettings(memory_every=1, policy=SMALL))
    sizes = []
    for t in range(len(clip.frames)):
        clip.track(tracker, t, t + 1, leaves)
        sizes.append(tracker.memory_nbytes)
    assert len(tracker.object_ids) > 1
    assert max(sizes[25:]) <= max(sizes[:25])


def test_policies(no_sensory):
    def memory(**options):
        return no_sensory.open_session(SessionSettings(**options))._memory

    assert memory().settings == LongTerm(10, 5, 128, 10_000)
    assert isinstance(memory(policy=EveryNth(1)), MemoryBank)
    assert memory(policy=Bounded(3)).policy == Bounded(3)
    with pytest.raises(ValueError, match="include_previous must be False"):
        memory(include_previous=True)


def test_without_long_term_memory(model, cpu_backend):
    """--disable_long_term: the same until the first compression, then every frame stays."""
    clip = Clip(6, {1: 0, 2: 2})
    every = SessionSettings(memory_every=1, policy=EveryNth(1))
    bank = clip.track(tracker := Tracker(model, every))
    for ours, expected in zip(bank, clip.track(Tracker(model, SessionSettings(memory_every=1))), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert tracker._session._memory.frames == (0, 1, 2, 3, 4)


def test_bfloat16(model, cpu_backend):
    clip = Clip(6, {1: 0, 2: 2})
    settings = SessionSettings(memory_every=1, policy=SMALL)
    expected = clip.track(Tracker(model, settings))
    for ours, theirs in zip(
        clip.track(Tracker(model, settings, dtype=torch.bfloat16)), expected, strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().mean() < 0.05


@pytest.mark.parametrize("objects", [1, 2])
def test_trains(objects):
    torch.manual_seed(0)
    model = XMem(key_dim=8, value_dim=32, hidden_dim=8).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    masks = torch.zeros(2, objects, 32, 32)
    masks[:, 0, :16], masks[:, -1, 20:] = 1, 1
    logits = model(torch.rand(2, 3, 3, 32, 32), masks)
    assert logits.shape == (2, 2, 1 + objects, 32, 32)
    target = torch.zeros(2, 2, 32, 32, dtype=torch.int64)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1)).backward()
    norms = [name for name, part in model.named_modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in norms:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()), name
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_training_follows_the_session_when_no_top_k_binds(model, cpu_backend):
    """The training loop updates the sensory memory on every frame; with one frame to go it is inference."""
    clip = Clip(2, {1: 0, 2: 0})
    frames = torch.stack([torch.from_numpy(frame).permute(2, 0, 1).float() / 255 for frame in clip.frames])[
        None
    ]
    labels = torch.from_numpy(clip.labels(0))
    masks = torch.stack((labels == 1, labels == 2))[None].float()
    with torch.no_grad():
        # As the given mask is aggregated before it is remembered.
        objects = vosops.soft_aggregate(masks).softmax(1)[:, 1:]
        trained = model(frames, objects)[0, -1].softmax(0)
    tracked = clip.track(Tracker(model, SessionSettings(top_k=0)))[-1]
    torch.testing.assert_close(tracked, trained, rtol=1e-4, atol=1e-5)
