# SPDX-License-Identifier: Apache-2.0
"""LongTermMemory against XMem's rules written out on lists of positions, in float64."""

import io

import pytest
import torch

import vosops
from vosops.memory import Bounded, MemoryBank
from vosops.memory.long_term import LongTerm, LongTermMemory

CK, CV, H, W, TOP_K = 6, 5, 3, 4, 5
SMALL = LongTerm(max_frames=5, min_frames=3, prototypes=7, capacity=30)


class Video:
    """Keys and values of every frame, and the objects present, their ids in an order that changes."""

    def __init__(self, enters, leaves=(), dtype=torch.float64):
        self.enters, self.leaves, self.dtype = dict(enters), dict(leaves), dtype

    def frame(self, t):
        generator = torch.Generator().manual_seed(10_000 + t)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)

        key, shrinkage = draw(1, CK, H, W), draw(1, 1, H, W).square() / 5 + 1
        selection = torch.sigmoid(draw(1, CK, H, W))
        values = {object_id: draw(1, 1, CV, H, W) for object_id in sorted(self.enters)}
        present = [i for i, start in self.enters.items() if start <= t < self.leaves.get(i, 10**9)]
        ids = present[::-1] if t % 2 else present
        return key, torch.cat([values[i] for i in ids], 1), ids, shrinkage, selection

    def queries(self, t):
        """So many that every position is matched now and then: which of those never used stay is open."""
        generator = torch.Generator().manual_seed(t)
        shape = (1, CK, 15, 16)
        query = torch.randn(shape, generator=generator, dtype=torch.float64)
        return query.to(self.dtype), torch.rand(shape, generator=generator, dtype=torch.float64).to(
            self.dtype
        )

    def left(self, t):
        return [object_id for object_id, end in self.leaves.items() if end == t]


class PlainMemory:
    """The rules of the docstring, position by position: dictionaries, dense float64 scores, full sorts."""

    def __init__(self, settings):
        self.settings = settings
        self.work, self.long = [], []  # positions, oldest first; in self.work H*W of a frame in a row
        self.entries = {}  # object id -> the frame on which it entered

    @property
    def positions(self):
        return self.long + self.work

    def append(self, t, key, value, ids, shrinkage, selection):
        for object_id in ids:
            self.entries.setdefault(object_id, t)
        for cell in range(H * W):
            self.work.append(
                {
                    "frame": t,
                    "key": key.flatten(2)[0, :, cell],
                    "selection": selection.flatten(2)[0, :, cell],
                    "shrinkage": shrinkage.flatten(2)[0, 0, cell],
                    "values": {i: value.flatten(3)[0, n, :, cell] for n, i in enumerate(ids)},
                    "use": 0.0,
                    "life": 1e-7,
                }
            )
        if len({p["frame"] for p in self.work}) == self.settings.max_frames:
            self.compress()

    def weights(self, query, selection, positions, top_k=None):
        """Softmax weights [Q, M] of the XMem similarity, of the top_k scores of each query only."""
        keys = torch.stack([p["key"] for p in positions])
        shrinkage = torch.stack([p["shrinkage"] for p in positions])
        distance = (selection[:, None] * (query[:, None] - keys[None]).square()).sum(-1)
        scores = -shrinkage * distance / CK**0.5
        if top_k is not None and top_k < len(positions):
            lowest = scores.sort(1, descending=True).values[:, top_k - 1 : top_k]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        return scores.softmax(1)

    def read(self, query_key, selection, top_k=None):
        query, e = query_key[0].flatten(1).T, selection[0].flatten(1).T
        oldest, reads = min(self.entries.values()), []
        for object_id, start in self.entries.items():
            matched = [p for p in self.positions if p["frame"] >= start]
            weights = self.weights(query, e, matched, top_k)
            reads.append((weights @ torch.stack([p["values"][object_id] for p in matched])).T)
            if object_id == next(iter(self.entries)):
                assert start == oldest
                for position, use in zip(matched, weights.sum(0).tolist(), strict=True):
                    position["use"] += use
                    position["life"] += 1
        return torch.stack(reads).reshape(1, len(reads), CV, *query_key.shape[2:])

    def remove(self, ids):
        for object_id in ids:
            del self.entries[object_id]
        oldest = min(self.entries.values(), default=10**9)
        self.work = [p for p in self.work if p["frame"] >= oldest]
        self.long = [p for p in self.long if p["frame"] >= oldest]

    def compress(self):
        settings = self.settings
        frames = sorted({p["frame"] for p in self.work})
        middle = frames[1 : len(frames) - (settings.min_frames - 1)]
        entered = [frame for frame in middle if frame in self.entries.values()]
        spared = entered[max(0, len(entered) - (settings.max_frames - settings.min_frames) // 2) :]
        candidates = [p for p in self.work if p["frame"] in middle and p["frame"] not in spared]
        ranked = sorted(candidates, key=lambda p: p["use"] / p["life"], reverse=True)
        chosen = ranked[: settings.prototypes]
        prototypes = []
        for p in chosen:
            query, e = p["key"][None], p["selection"][None]
            weights = self.weights(query, e, candidates)[0]
            shrinkage = (weights * torch.stack([c["shrinkage"] for c in candidates])).sum()
            values = {}
            for object_id, start in self.entries.items():
                seen = [c for c in candidates if c["frame"] >= start]
                if p["frame"] >= start:
                    weights = self.weights(query, e, seen)[0]
                    values[object_id] = weights @ torch.stack([c["values"][object_id] for c in seen])
            prototypes.append(
                p | {"shrinkage": shrinkage, "values": values, "use": 0.0, "life": 1e-7, "selection": None}
            )
        self.long.sort(key=lambda p: p["use"] / p["life"])
        self.long = self.long[max(0, len(self.long) + len(prototypes) - settings.capacity) :] + prototypes
        self.work = [p for p in self.work if all(p is not c for c in candidates)]


SCENES = {
    "one object": ({1: 0}, {}),
    "entering": ({4: 0, 9: 0, 2: 3, 7: 4, 30: 25, 1: 26, 3: 27, 5: 28}, {}),
    "coming and going": ({4: 0, 9: 0, 2: 3, 7: 20, 8: 20, 30: 41}, {9: 12, 4: 30, 8: 33, 2: 47}),
}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("top_k", [TOP_K, None])
@pytest.mark.parametrize("settings", [SMALL, LongTerm(3, 2, 5, 12)], ids=str)
def test_follows_the_rules_position_by_position(scene, top_k, settings):
    video = Video(*SCENES[scene])
    memory, plain = LongTermMemory(settings), PlainMemory(settings)
    evicting = False
    with vosops.use_backend("reference"):
        for t in range(70):
            if left := video.left(t):
                memory.remove(left)
                plain.remove(left)
            frame = video.frame(t)
            evicting |= memory.long_term_positions == settings.capacity
            memory.append(t, *frame)
            plain.append(t, *frame)
            assert len(memory) == len(plain.positions)
            assert memory.object_ids == list(plain.entries)
            assert memory.frames == tuple(sorted({p["frame"] for p in plain.work}))
            query = video.queries(t)
            read, expected = memory.read(*query, top_k=top_k), plain.read(*query, top_k)
            torch.testing.assert_close(read, expected, rtol=1e-6, atol=1e-7)
            usage = torch.tensor([p["use"] / p["life"] for p in plain.positions], dtype=torch.float64)
            torch.testing.assert_close(memory.usage.sort().values, usage.sort().values, rtol=1e-5, atol=1e-6)
    assert evicting


def test_before_the_first_compression_it_is_a_bank_of_every_frame(cpu_backend):
    video = Video({1: 0, 2: 0, 5: 3}, dtype=torch.float32)
    memory, bank = LongTermMemory(), MemoryBank(Bounded(20))
    for t in range(9):
        key, value, ids, shrinkage, selection = video.frame(t)
        memory.append(t, key, value, ids, shrinkage, selection)
        bank.append(t, key, value, ids, shrinkage)
        read = memory.read(key, selection, top_k=7)
        torch.testing.assert_close(read, bank.read(key, similarity="l2", selection=selection, top_k=7))


def test_backends_agree():
    reads = {}
    for backend in ("reference", "cpu"):
        reasons = vosops.ops.backends.reasons_against(backend, {})
        if reasons:
            pytest.skip("; ".join(reasons))
        with vosops.use_backend(backend):
            video, memory = Video(*SCENES["entering"], dtype=torch.float32), LongTermMemory(SMALL)
            reads[backend] = []
            for t in range(60):
                frame = video.frame(t)
                memory.append(t, *frame)
                reads[backend].append(memory.read(*video.queries(t), top_k=TOP_K))
    for ours, expected in zip(reads["cpu"], reads["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_bounded_over_thousands_of_frames(cpu_backend):
    """Objects enter every 100 frames and leave 400 later: memory and its storage stop growing."""
    enters = {1: 0} | {n: 100 * n for n in range(2, 20)}
    video = Video(enters, {n: 100 * n + 400 for n in range(2, 20)}, dtype=torch.float32)
    memory, sizes = LongTermMemory(SMALL), []
    pool = [video.frame(t) for t in range(40)]
    for t in range(2000):
        if left := video.left(t):
            memory.remove(left)
        ids = [1] + [n for n in range(2, 20) if 100 * n <= t < 100 * n + 400]
        key, value, _, shrinkage, selection = pool[t % len(pool)]
        values = value[:, :1].expand(-1, len(ids), -1, -1, -1)
        memory.append(t, key, values, ids, shrinkage, selection)
        assert bool(memory.read(key, selection, top_k=TOP_K).isfinite().all())
        sizes.append((len(memory), memory.nbytes))
    bound = SMALL.capacity + SMALL.max_frames * H * W
    assert max(positions for positions, _ in sizes) <= bound
    assert max(nbytes for _, nbytes in sizes) <= 4 * bound * (2 * CK + 6 + 5 * CV)
    assert {nbytes for _, nbytes in sizes[700:1000]} >= {nbytes for _, nbytes in sizes[1000:1900]}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_state_goes_on_bit_for_bit(mode, cpu_backend):
    video = Video(*SCENES["coming and going"], dtype=torch.float32)
    memory = LongTermMemory(SMALL)
    memories = [memory]
    with mode():
        for t in range(60):
            if left := video.left(t):
                for each in memories:
                    each.remove(left)
            frame = video.frame(t)
            for each in memories:
                each.append(t, *frame)
            read = memory.read(*frame[::4], top_k=TOP_K)
            for resumed in memories[1:]:
                torch.testing.assert_close(resumed.read(*frame[::4], top_k=TOP_K), read, rtol=0, atol=0)
                torch.testing.assert_close(resumed.usage, memory.usage, rtol=0, atol=0)
            if t % 11 == 10:
                file = io.BytesIO()
                torch.save(memory.state_dict(), file)
                file.seek(0)
                memories = [memory, LongTermMemory(SMALL)]
                memories[1].load_state_dict(torch.load(file, weights_only=True))


def test_an_empty_memory_has_a_state_too():
    memory = LongTermMemory()
    memory.load_state_dict(LongTermMemory().state_dict())
    assert len(memory) == 0
    assert memory.object_ids == []
    with pytest.raises(ValueError, match="max_frames=10.*max_frames=5"):
        LongTermMemory(SMALL).load_state_dict(memory.state_dict())
    with pytest.raises(KeyError):
        memory.load_state_dict({"settings": repr(memory.settings)})


def test_removing_all_objects_leaves_a_new_memory():
    memory, frame = LongTermMemory(SMALL), Video({1: 0, 2: 0}).frame(0)
    memory.append(0, *frame)
    memory.remove([2, 1])
    assert (len(memory), memory.nbytes, memory.object_ids) == (0, 0, [])
    with pytest.raises(RuntimeError, match="empty"):
        memory.read(frame[0], frame[4])


def test_gradient_reaches_the_query():
    memory, frame = LongTermMemory(SMALL), Video({1: 0, 2: 0}, dtype=torch.float32).frame(0)
    memory.append(0, *frame)
    query = frame[0].clone().requires_grad_()
    memory.read(query, frame[4]).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame_index": 0}, "frame_index must be above"),
        ({"key": torch.zeros(2, CK, H, W)}, "key must have shape"),
        ({"value": torch.zeros(1, 1, CV, H, W)}, "value must have shape"),
        ({"object_ids": [1, 3]}, r"object_ids lacks \[2\]"),
        ({"object_ids": [0, 2]}, "object_ids must be at least 1"),
        ({"shrinkage": None}, "shrinkage"),
        ({"selection": torch.zeros(1, CK, H, W + 1)}, "selection must have shape"),
        ({"selection": None}, "selection must be a tensor"),
    ],
)
def test_bad_frames_change_nothing(change, message):
    memory = LongTermMemory(SMALL)
    names = ("key", "value", "object_ids", "shrinkage", "selection")
    good = dict(zip(names, Video({1: 0, 2: 0}).frame(0), strict=True))
    memory.append(0, **good)
    before = memory.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        memory.append(**({"frame_index": 1} | good | change))
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert len(memory) == H * W
    torch.testing.assert_close(after["key"], before["key"], rtol=0, atol=0)


def test_one_video_at_a_time():
    with pytest.raises(ValueError, match="batch 1"):
        LongTermMemory().append(
            0,
            torch.zeros(2, CK, H, W),
            torch.zeros(2, 1, CV, H, W),
            [1],
            torch.ones(2, 1, H, W),
            torch.zeros(2, CK, H, W),
        )


def test_bad_settings():
    with pytest.raises(ValueError, match="min_frames must be at least 2 and below max_frames = 10, got 10"):
        LongTerm(min_frames=10)
    with pytest.raises(ValueError, match="prototypes must be from 1 to capacity = 100, got 128"):
        LongTerm(capacity=100)
    with pytest.raises(TypeError, match="max_frames must be an integer"):
        LongTerm(max_frames=10.0)
    with pytest.raises(TypeError, match="settings must be a LongTerm"):
        LongTermMemory(Bounded(4))
    with pytest.raises(ValueError, match="not in the memory"):
        LongTermMemory().remove([1])


def test_a_bank_refuses_to_compress():
    key, value, ids, shrinkage, _ = Video({1: 0}).frame(0)
    with pytest.raises(ValueError, match="compresses frames"):
        MemoryBank(LongTerm()).append(0, key, value, ids, shrinkage)
