# SPDX-License-Identifier: Apache-2.0
"""XMem's memory of one video: recent frames in full, older ones as prototypes chosen by their usage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vosops.ops.checks import check_device, check_shape, check_tensor
from vosops.ops.memory_read import memory_read

from .checks import FrameShape, check_frame, check_ids, check_leaving, check_present

_NEVER_READ = 1e-7  # reads of a new position, so that its usage is 0 and not 0/0


@dataclass(frozen=True)
class LongTerm:
    """The policy of a `LongTermMemory`: how many positions it holds; XMem's settings by default.

    Args:
        max_frames: frames in the working memory that make it compress, T_max.
        min_frames: frames of it that stay, T_min: the first and the min_frames - 1 newest; at least 2.
        prototypes: positions that the compressed frames leave in the long-term memory, P.
        capacity: most positions of the long-term memory, LT_max.

    Raises:
        TypeError, ValueError: no integers, or not 2 <= min_frames < max_frames, 1 <= prototypes <= capacity.
    """

    max_frames: int = 10
    min_frames: int = 5
    prototypes: int = 128
    capacity: int = 10_000

    def __post_init__(self) -> None:
        for name in ("max_frames", "min_frames", "prototypes", "capacity"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"LongTerm.{name} must be an integer, got {type(value).__name__}")
        if not 2 <= self.min_frames < self.max_frames:
            raise ValueError(
                f"LongTerm.min_frames must be at least 2 and below max_frames = {self.max_frames}, "
                f"got {self.min_frames}"
            )
        if not 1 <= self.prototypes <= self.capacity:
            raise ValueError(
                f"LongTerm.prototypes must be from 1 to capacity = {self.capacity}, got {self.prototypes}"
            )

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        """A new slot for every frame, as `Policy` asks."""
        return len(frames)

    def limit(self, slot_bytes: int) -> int | None:
        """Refused: it is what a `MemoryBank` asks, and a bank keeps or drops frames but compresses none.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"policy {self} compresses frames: it is for LongTermMemory, a MemoryBank needs another"
        )


@dataclass
class _Group:
    object_ids: list[int]
    start: int  # the frame on which they entered: older positions never match
    value: Tensor  # [rows, O*Cv]


class LongTermMemory:
    """A memory that stays bounded on any length of video, whatever objects come and go (batch 1).

    The working memory holds whole frames. When it is full, the frames between the first and the newest ones
    are compressed: their `prototypes` most used positions become the queries of a dense read of those
    frames, which gives the prototypes' values and shrinkage ("potentiation"), and go to the long-term memory;
    there the least used positions make room when it is full. The usage of a position is the weight that all
    queries of all reads gave it, over the number of reads it was there for.

    Objects that enter together form a group. Keys, shrinkage and usage are shared by all groups, values are
    per group, and every position knows the frame it comes from (a prototype: that of its key). A group
    matches the positions from its entry on, in both memories. That is all that groups need: positions are
    chosen and evicted by the one shared usage, which is counted in the match of the oldest group, the one
    that matches every position. A compression also spares the frames on which later groups entered
    (they carry a given mask, as the first frame does), the newest (max_frames - min_frames) // 2 of them.

    Differences from the published code: that raises NotImplementedError when the long-term memory must
    evict with several groups, pairs some values of later groups with keys of other frames after a
    compression, and counts long-term usage only where the video is known to be long (391 frames);
    here usage is always counted. One group without eviction gives the published result.

    Storage is preallocated and position-major: long-term rows end where working rows begin, so a read takes
    one slice and nothing is concatenated. It is detached: reads are differentiable in their query alone.

    Args:
        settings: how many positions to hold.

    Note:
        Bounded by capacity + max_frames * H*W positions, each 4 (Ck + O*Cv) bytes in float32 and some more.
        The dtype is that of the first key, float32 at least. The long-term rows grow geometrically
        to their capacity. A compression copies at most min_frames + (max_frames - min_frames) // 2
        frames and reads `prototypes` queries; nothing else is moved.

    Source: XMem (Cheng and Schwing, ECCV 2022), sec. 3.3: long-term memory, prototype selection and memory
    potentiation; the published code where it says more.

    Example:
        >>> memory = LongTermMemory()
        >>> memory.append(0, key, value, [1, 4], shrinkage, selection)  # (1, 64, 30, 54), (1, 2, 512, 30, 54)
        >>> read = memory.read(query_key, query_selection, top_k=30)  # (1, 2, 512, 30, 54)
    """

    def __init__(self, settings: LongTerm | None = None) -> None:
        self.settings = LongTerm() if settings is None else settings
        if not isinstance(self.settings, LongTerm):
            raise TypeError(f"settings must be a LongTerm, got {settings!r}")
        self._clear()

    def _clear(self) -> None:
        self._shape: FrameShape | None = None
        self._frames: list[int] = []  # of the working memory, in time order
        self._groups: list[_Group] = []  # in the order of entering
        self._long = 0  # long-term positions: the rows just before `_boundary`
        self._newest_long = -1  # no long-term position comes from a later frame
        self._boundary = 0  # first row of the working memory
        empty = torch.empty(0)
        self._key = self._shrinkage = self._frame = self._use = self._life = empty  # [rows, C]
        self._selection = empty  # [working rows, Ck]: prototypes are never queries again

    def __len__(self) -> int:
        """Number of positions that a read may match."""
        return self._long + len(self._frames) * self._area

    def __repr__(self) -> str:
        return (
            f"LongTermMemory({self.settings}, frames={self.frames}, long_term={self._long}, "
            f"object_ids={self.object_ids})"
        )

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames in the working memory, in time order."""
        return tuple(self._frames)

    @property
    def long_term_positions(self) -> int:
        """Prototypes in the long-term memory."""
        return self._long

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order in which `read` returns them: the order of entering."""
        return [object_id for group in self._groups for object_id in group.object_ids]

    @property
    def usage(self) -> Tensor:
        """(M,) usage of every position, long-term positions first; a copy."""
        rows = self._rows
        return (self._use[rows] / self._life[rows]).squeeze(1)

    @property
    def nbytes(self) -> int:
        """Bytes of storage allocated, spare rows included."""
        return self._selection.nbytes + sum(table.nbytes for table in self._tables)

    def append(
        self,
        frame_index: int,
        key: Tensor,  # [1, Ck, H, W]
        value: Tensor,  # [1, O, Cv, H, W]
        object_ids: Sequence[int],
        shrinkage: Tensor,  # [1, 1, H, W]
        selection: Tensor,  # [1, Ck, H, W]
    ) -> None:
        """Remember a frame, then compress if the working memory is full.

        Args:
            frame_index: index of the frame in the video, above that of the frame before.
            key: (1, Ck, H, W) any floating dtype and strides. The first frame settles Ck, H, W, the device.
            value: (1, O, Cv, H, W) of all objects present. The first frame settles Cv.
            object_ids: O distinct ids >= 1, in the order of value's objects. Ids not seen before enter with
                this frame; every object that is present must be there (see `remove`).
            shrinkage: (1, 1, H, W) r_j.
            selection: (1, Ck, H, W) e_i of the key as a query, for the day it becomes a prototype.

        Raises:
            TypeError, ValueError: a bad argument, named; the memory is unchanged.

        Note:
            Cost: one pass over key and value. Every max_frames - min_frames frames also a compression, a
            dense read of `prototypes` queries.
        """
        ids = check_ids(object_ids)
        newest = self._frames[-1] if self._frames else None
        shape = check_frame(frame_index, key, value, ids, shrinkage, self._shape, newest)
        if shape.batch != 1:
            raise ValueError(f"key must have batch 1, the memory holds one video; got {shape.batch}")
        check_tensor("selection", selection, layout="(1, Ck, H, W)")
        check_shape("selection", selection, key.shape, "(1, Ck, H, W), that of key")
        check_device("selection", selection, "key", key.device)
        entering = check_present(ids, self.object_ids)
        # Storage made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            if self._shape is None:
                self._allocate(shape, torch.promote_types(key.dtype, torch.float32))
            if entering:
                # Zeros: rows from before the entry are masked in every read, but NaN must not lie there.
                values = self._key.new_zeros(len(self._key), len(entering) * shape.value_channels)
                self._groups.append(_Group(entering, frame_index, values))
            begin = self._boundary + len(self._frames) * self._area
            rows = slice(begin, begin + self._area)
            self._selection[begin - self._boundary :][: self._area] = selection[0].flatten(1).mT
            self._key[rows] = key[0].flatten(1).mT
            self._shrinkage[rows] = shrinkage[0].flatten(1).mT
            self._frame[rows], self._use[rows], self._life[rows] = frame_index, 0, _NEVER_READ
            for group in self._groups:
                target = group.value[rows].unflatten(1, (len(group.object_ids), -1))  # [H*W, O, Cv]
                for object_number, object_id in enumerate(group.object_ids):
                    target[:, object_number] = value[0, ids.index(object_id)].flatten(1).mT
            self._frames.append(frame_index)
            if len(self._frames) == self.settings.max_frames:
                self._compress()

    def read(
        self,
        query_key: Tensor,  # [1, Ck, *q]
        selection: Tensor,  # [1, Ck, *q]
        *,
        top_k: int | None = None,
    ) -> Tensor:
        """Read the values of all objects, and count the usage of what was matched.

        Args:
            query_key, selection, top_k: as in `vosops.memory_read`.

        Returns:
            (1, O, Cv, *q) in the order of `object_ids`.

        Raises:
            RuntimeError: the memory is empty.
            TypeError, ValueError: a bad argument, named; nothing is counted.

        Note:
            Cost: one `memory_read` per group. A group that entered after the last compression reads the
            working frames from its entry on; an older one the whole memory, masked up to its entry.
        """
        if self._shape is None:
            raise RuntimeError("the memory is empty: append a frame first")
        reads = []
        for group in self._groups:
            rows, mask = self._rows, None
            if group.start > self._newest_long:
                first = next(slot for slot, frame in enumerate(self._frames) if frame >= group.start)
                rows = slice(self._boundary + first * self._area, rows.stop)
            elif group is not self._groups[0]:
                mask = (self._frame[rows] >= group.start).mT  # [1, M]
            result = memory_read(
                query_key,
                self._key[rows].mT[None],
                self._values(group, rows),
                similarity="l2",
                shrinkage=self._shrinkage[rows].mT[None],
                selection=selection,
                top_k=top_k,
                memory_mask=mask,
                return_usage=group is self._groups[0],
            )
            if isinstance(result, tuple):
                result, usage = result
                self._use[rows] += usage.mT
                self._life[rows] += 1
            reads.append(result)
        return reads[0] if len(reads) == 1 else torch.cat(reads, 1)

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forget objects and free their values, and the positions that no object left can match.

        Removing all objects leaves an empty memory, as new.

        Raises:
            TypeError, ValueError: an id is not in the memory; nothing is removed.

        Note:
            Cost: one copy of the values of a group that loses only some of its objects, and of the
            positions that stay when others are dropped.
        """
        ids = check_leaving(object_ids, self.object_ids)
        with torch.inference_mode(False), torch.no_grad():
            for group in self._groups:
                kept = [i for i, object_id in enumerate(group.object_ids) if object_id not in ids]
                if 0 < len(kept) < len(group.object_ids):
                    values = group.value.unflatten(1, (len(group.object_ids), -1))
                    group.value = values[:, kept].flatten(1)
                group.object_ids = [group.object_ids[i] for i in kept]
            self._groups = [group for group in self._groups if group.object_ids]
            if not self._groups:
                self._clear()
                return
            start = self._groups[0].start
            self._keep_slots([slot for slot, frame in enumerate(self._frames) if frame >= start])
            long = slice(self._boundary - self._long, self._boundary)
            matched = (self._frame[long] >= start).squeeze(1).nonzero().squeeze(1) + long.start
            if len(matched) < self._long:
                self._long = len(matched)
                for table in self._tables:
                    table[self._boundary - self._long : self._boundary] = table[matched]

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: numbers, strings and tensors (copies, without spare rows).

        Safe with torch.save and torch.load(weights_only=True).
        """
        rows = self._rows
        names = ("key", "shrinkage", "frame", "use", "life")
        return {
            "settings": repr(self.settings),
            "grid": None if self._shape is None else list(self._shape.grid),
            "frames": list(self._frames),
            "newest_long": self._newest_long,
            "selection": self._selection[: len(self._frames) * self._area].clone(),
            **{name: getattr(self, f"_{name}")[rows].clone() for name in names},
            "groups": [
                {
                    "object_ids": list(group.object_ids),
                    "start": group.start,
                    "value": group.value[rows].clone(),
                }
                for group in self._groups
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by that of `state`, of a `LongTermMemory` with the same settings.

        Every later read and append then gives what it would have given there, bit for bit.

        Raises:
            ValueError: the settings differ; the memory is unchanged.
            KeyError: `state` is not of `state_dict`; the memory is unchanged.
        """
        if state["settings"] != repr(self.settings):
            raise ValueError(f"state was saved with {state['settings']}, this memory has {self.settings}")
        names = ("key", "shrinkage", "frame", "use", "life", "selection")
        tables = {name: state[name] for name in names}
        grid, frames, groups = state["grid"], list(state["frames"]), state["groups"]
        newest_long = state["newest_long"]
        self._clear()
        if not frames:
            return
        key = tables["key"]
        width = groups[0]["value"].shape[1] // len(groups[0]["object_ids"])
        shape = FrameShape(1, key.shape[1], width, grid[0], grid[1], True, key.device)
        self._frames, self._newest_long = frames, newest_long
        self._long = self._boundary = len(key) - len(frames) * shape.height * shape.width
        with torch.inference_mode(False), torch.no_grad():
            self._allocate(shape, key.dtype)
            rows = self._rows
            for name in names:
                target = getattr(self, f"_{name}")[: len(tables[name])]
                target.copy_(tables[name])
            for group in groups:
                values = key.new_zeros(len(self._key), group["value"].shape[1])
                values[rows] = group["value"]
                self._groups.append(_Group(list(group["object_ids"]), group["start"], values))

    @property
    def _area(self) -> int:
        return 0 if self._shape is None else self._shape.height * self._shape.width

    @property
    def _rows(self) -> slice:
        return slice(self._boundary - self._long, self._boundary + len(self._frames) * self._area)

    @property
    def _tables(self) -> list[Tensor]:
        shared = [self._key, self._shrinkage, self._frame, self._use, self._life]
        return shared + [group.value for group in self._groups]

    def _values(self, group: _Group, rows: slice) -> Tensor:
        """(1, O, Cv, M) view of a group's values, channels innermost."""
        return group.value[rows].unflatten(1, (len(group.object_ids), -1)).permute(1, 2, 0)[None]

    def _allocate(self, shape: FrameShape, dtype: torch.dtype) -> None:
        self._shape = shape
        working = self.settings.max_frames * self._area
        like = torch.empty(0, dtype=dtype, device=shape.device)
        self._key = like.new_zeros(self._boundary + working, shape.key_channels)
        self._shrinkage, self._use, self._life = (like.new_zeros(len(self._key), 1) for _ in range(3))
        self._frame = torch.zeros(len(self._key), 1, dtype=torch.int64, device=shape.device)
        self._selection = like.new_zeros(working, shape.key_channels)

    def _compress(self) -> None:
        """Frames of the working memory become prototypes of the long-term memory."""
        area, kept = self._area, self._kept_slots()
        slots = [slot for slot in range(len(self._frames)) if slot not in kept]
        first = slots[0] * area
        work = slice(
            first, (slots[-1] + 1) * area
        )  # in the working memory: the candidates, and spared frames
        rows = slice(self._boundary + work.start, self._boundary + work.stop)
        candidate = torch.zeros(rows.stop - rows.start, dtype=torch.bool, device=self._key.device)
        for slot in slots:
            candidate[slot * area - first :][:area] = True
        usage = (self._use[rows] / self._life[rows]).squeeze(1).masked_fill(~candidate, -1)
        chosen = usage.topk(min(self.settings.prototypes, len(slots) * area)).indices  # [P]
        key, frame = self._key[rows], self._frame[rows]
        selection = self._selection[work][chosen]

        def potentiate(value: Tensor, start: int) -> Tensor:  # [1, O, Cv, M] -> [P, O*Cv]
            read = memory_read(
                key[chosen].mT[None],
                key.mT[None],
                value,
                similarity="l2",
                shrinkage=self._shrinkage[rows].mT[None],
                selection=selection.mT[None],
                memory_mask=(candidate & (frame[:, 0] >= start))[None],
            )
            assert isinstance(read, Tensor)
            return read[0].flatten(0, 1).mT

        shrinkage = potentiate(self._shrinkage[rows].mT[None, None], self._groups[0].start)
        # A group that entered later has no value at prototypes from before: zeros, which it never matches.
        values = [
            potentiate(self._values(group, rows), group.start).masked_fill(frame[chosen] < group.start, 0)
            for group in self._groups
        ]
        new = (key[chosen], shrinkage, frame[chosen], torch.zeros_like(shrinkage))
        life = torch.full_like(shrinkage, _NEVER_READ)
        target = self._long_term_rows(len(chosen))
        for table, prototypes in zip(self._tables, (*new, life, *values), strict=True):
            table[target] = prototypes
        self._newest_long = self._frames[slots[-1]]
        self._keep_slots(kept)

    def _kept_slots(self) -> list[int]:
        """The slots of the working memory that a compression spares, ascending."""
        settings = self.settings
        newest = settings.max_frames - settings.min_frames + 1
        starts = [group.start for group in self._groups]
        entries = [slot for slot in range(1, newest) if self._frames[slot] in starts]
        spared = entries[-((settings.max_frames - settings.min_frames) // 2) :] if newest > 2 else []
        return [0, *spared, *range(newest, settings.max_frames)]

    def _long_term_rows(self, count: int) -> Tensor:
        """Rows for `count` new prototypes: those of the least used ones where there is no room, else new."""
        excess = max(0, self._long + count - self.settings.capacity)
        new = count - excess
        if new > self._boundary - self._long:
            self._grow(min(self.settings.capacity, max(2 * self._boundary, self._long + new)))
        begin = self._boundary - self._long
        usage = self._use[begin : self._boundary] / self._life[begin : self._boundary]
        evicted = usage.squeeze(1).topk(excess, largest=False).indices + begin
        self._long += new
        return torch.cat((evicted, torch.arange(begin - new, begin, device=evicted.device)))

    def _grow(self, boundary: int) -> None:
        """Move the working memory's first row to `boundary`, for more long-term rows before it."""
        added, used = boundary - self._boundary, self._rows

        def grown(table: Tensor) -> Tensor:
            larger = table.new_zeros(len(table) + added, table.shape[1])
            larger[used.start + added : used.stop + added] = table[used]
            return larger

        self._key, self._shrinkage, self._frame = map(grown, (self._key, self._shrinkage, self._frame))
        self._use, self._life = grown(self._use), grown(self._life)
        for group in self._groups:
            group.value = grown(group.value)
        self._boundary = boundary

    def _keep_slots(self, slots: Sequence[int]) -> None:
        """Drop all frames of the working memory but those in `slots`, ascending."""
        tables = [(self._selection, 0), *((table, self._boundary) for table in self._tables)]
        for table, base in tables:
            for target, source in enumerate(slots):
                if target != source:
                    old = table[base + source * self._area :][: self._area]
                    table[base + target * self._area :][: self._area] = old
        self._frames = [self._frames[slot] for slot in slots]
