# SPDX-License-Identifier: Apache-2.0
"""The memory of one video: keys shared by all objects, values per object, read with `vosops.memory_read`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vosops.ops.checks import FLOATS
from vosops.ops.memory_read import memory_read
from vosops.ops.priors import Prior

from .checks import FrameShape, check_frame, check_ids, check_leaving, check_present, check_read, slice_prior
from .policies import Policy, oldest, thinning
from .storage import SlotTensor


class MemoryGroup(NamedTuple):
    """The operands of one memory read: the objects that entered on one frame, and what they may match.

    object_ids: in the order of value's objects.
    slots: the slots of the tensors below, a slice of `MemoryBank.frames`.
    key: (B, Ck, T, H, W) view, channels innermost.
    value: (B, O, Cv, T, H, W) view, channels innermost.
    shrinkage: (B, 1, T, H, W) float32 view, or None.
    memory_mask: (B, T, H, W) bool, False on frames from before the objects entered; None if there are none.
    """

    object_ids: tuple[int, ...]
    slots: slice
    key: Tensor
    value: Tensor
    shrinkage: Tensor | None
    memory_mask: Tensor | None


@dataclass
class _Group:
    object_ids: list[int]
    start: int  # the frame on which they entered
    value: SlotTensor


class MemoryBank:
    """Keys and values of the frames a video segmenter remembers, stored as the operators like to read them.

    Storage is preallocated and position-major: a frame is H*W x Ck keys and H*W x (O*Cv) values, innermost
    contiguous. A policy says which frames stay; a replaced frame is overwritten in its slot and nothing
    is shifted. Objects may enter on any frame under any ids: those that enter together form a group with
    values of its own, and frames from before never match for it.

    The order of slots is the order of `frames`, and of T in every view. It is the order of time only as
    long as no slot but the last was overwritten (EveryNth never does; the others do once they are full).
    Whatever a caller adds per memory position has that order too: `CenterPrior` centres (1, T, H, W, 2), a
    sigma (1, T, H, W), a memory mask (B, T, H, W) are built by going over `frames`.

    Gradients: the storage is detached, so no gradient reaches an appended key or value; a read is
    differentiable with respect to its query. Run backward before the next append, which writes to the
    storage that backward reads (torch raises an error otherwise).

    Args:
        policy: what to keep: EveryNth, Bounded, ByteBudget, Balanced or any `Policy`.
        key_dtype: storage dtype of the keys; bfloat16 halves float32.
        value_dtype: storage dtype of the values.

    Raises:
        TypeError: policy is no policy, or a dtype is no floating-point dtype.

    Note:
        Cost: an append writes one frame; growth under a policy without limit copies at most three times the
        bytes held (`bytes_copied` counts all), and keeps spare slots of at most half of those used. Under
        a policy with a limit all slots are allocated with the first frame and never grow.

    Example:
        >>> bank = MemoryBank(EveryNth(5), key_dtype=torch.bfloat16)
        >>> bank.append(0, key, value, object_ids=[1, 4])  # (1, 64, 30, 54), (1, 2, 512, 30, 54)
        >>> read = bank.read(query_key, similarity="l2", top_k=20)  # (1, 2, 512, 30, 54)
    """

    bytes_copied: int
    """Bytes written to the storage so far: frames appended, and frames copied when it grew or shrank."""

    def __init__(
        self,
        policy: Policy,
        *,
        key_dtype: torch.dtype = torch.float32,
        value_dtype: torch.dtype = torch.float32,
    ) -> None:
        if isinstance(policy, type) or not isinstance(policy, Policy):
            raise TypeError(f"policy must be a policy such as EveryNth(5), got {policy!r}")
        for name, dtype in (("key_dtype", key_dtype), ("value_dtype", value_dtype)):
            if dtype not in FLOATS:
                raise TypeError(f"{name} must be one of {', '.join(map(str, FLOATS))}; got {dtype!r}")
        self.policy = policy
        self.key_dtype = key_dtype
        self.value_dtype = value_dtype
        self.bytes_copied = 0
        self._clear()

    def _clear(self) -> None:
        self._frames: list[int] = []
        self._lasting: set[int] = set()
        self._travelled: dict[int, float] = {}  # per frame held, measured under a ThinningPolicy alone
        self._groups: list[_Group] = []
        self._shape: FrameShape | None = None
        self._key: SlotTensor | None = None
        self._shrinkage: SlotTensor | None = None

    def __len__(self) -> int:
        """Number of frames held, T."""
        return len(self._frames)

    def __repr__(self) -> str:
        return f"MemoryBank({self.policy}, frames={self.frames}, object_ids={self.object_ids})"

    @property
    def frames(self) -> tuple[int, ...]:
        """Frame index of every slot, in slot order."""
        return tuple(self._frames)

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects, in the order in which `read` returns them: the order of entering."""
        return [object_id for group in self._groups for object_id in group.object_ids]

    @property
    def nbytes(self) -> int:
        """Bytes of storage allocated, spare slots included."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def key(self) -> Tensor:
        """(B, Ck, T, H, W) keys of all slots: a view, channels innermost, valid until the next append.

        Raises:
            RuntimeError: the memory is empty.
        """
        if self._key is None:
            raise RuntimeError("the memory is empty: append a frame first")
        return self._key.view(0, len(self))

    @property
    def groups(self) -> list[MemoryGroup]:
        """What each group of objects reads, as views valid until the next append; empty without objects.

        For callers that match and gather themselves (`vosops.memory_match`, `vosops.memory_gather`).
        """
        return [self._view(group) for group in self._groups]

    def append(
        self,
        frame_index: int,
        key: Tensor,  # [B, Ck, H, W]
        value: Tensor,  # [B, O, Cv, H, W]
        object_ids: Sequence[int],
        shrinkage: Tensor | None = None,  # [B, 1, H, W]
        *,
        lasting: bool = False,
    ) -> None:
        """Remember a frame, where the policy says.

        Args:
            frame_index: index of the frame in the video, above that of every frame held; gaps are fine.
            key: (B, Ck, H, W) any floating dtype and strides. The first frame settles B, Ck, H, W, the
                device, and whether there is a shrinkage.
            value: (B, O, Cv, H, W) of all objects present. The first frame settles Cv.
            object_ids: O distinct ids >= 1, in the order of value's objects. Ids not seen before enter with
                this frame; every object that is present must be there (see `remove`).
            shrinkage: (B, 1, H, W) r_j of XMem, kept as float32.
            lasting: keep the frame as one on which objects enter: it is given up only where nothing else is
                left (AOT's reference frames, whose masks were given).

        Raises:
            TypeError, ValueError: a bad argument, named, or a byte budget too small for two frames; the
                memory is unchanged.

        Note:
            Cost: one pass over key and value. When objects enter or leave under a byte budget, the storage
            is laid out anew once.
        """
        ids = check_ids(object_ids)
        newest = max(self._frames) if self._frames else None
        shape = check_frame(frame_index, key, value, ids, shrinkage, self._shape, newest)
        entering = check_present(ids, self.object_ids)
        limit = self._limit(shape, len(ids))
        # Storage made in inference mode could never be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            travelled = 0.0 if thinning(self.policy) is None else self._measure(key)
            if limit is not None and len(self) > limit:
                self._shrink(limit, frame_index, travelled)
            used, slot = len(self), self._slot(frame_index, travelled, limit)
            keys = self._key or _slots(shape, shape.key_channels, self.key_dtype, 0, limit)
            shrinkages = self._shrinkage
            if shrinkages is None and shrinkage is not None:
                shrinkages = _slots(shape, 1, torch.float32, 0, limit)
            groups = list(self._groups)
            if entering:
                first = slot if limit is None else 0
                values = _slots(shape, len(entering) * shape.value_channels, self.value_dtype, first, limit)
                values.clear(used)
                groups.append(_Group(entering, frame_index, values))
            copied = keys.write(slot, key, used, limit)
            if shrinkages is not None and shrinkage is not None:
                copied += shrinkages.write(slot, shrinkage, used, limit)
            for group in groups:
                order = [ids.index(object_id) for object_id in group.object_ids]
                rows = value if order == list(range(len(ids))) else value[:, order]
                copied += group.value.write(slot, rows.flatten(1, 2), used, limit)
        self._shape, self._key, self._shrinkage, self._groups = shape, keys, shrinkages, groups
        self._frames[slot : slot + 1] = [frame_index]
        self._lasting = {frame for frame in self._lasting if frame in self._frames}
        self._travelled = {frame: self._travelled.get(frame, 0.0) for frame in self._frames}
        self._travelled[frame_index] = travelled
        if lasting:
            self._lasting.add(frame_index)
        self.bytes_copied += copied

    def read(
        self,
        query_key: Tensor,  # [B, Ck, *q]
        *,
        similarity: Literal["dot", "l2"] = "dot",
        scale: float | None = None,
        selection: Tensor | None = None,  # [B, Ck, *q]
        top_k: int | None = None,
        prior: Prior | None = None,
        memory_mask: Tensor | None = None,  # [B, T, H, W]
        return_usage: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read the values of all objects: `vosops.memory_read` on the memory, with its options.

        Args:
            query_key: (B, Ck, *q), on the memory's device.
            similarity, scale, selection, top_k: as in `vosops.memory_read`; the shrinkage is the stored one.
            prior: its tensors over the memory have shape (B, T, H, W) or (B, T, H, W, 2), in slot order.
            memory_mask: (B, T, H, W) bool in slot order; a False position never matches.
            return_usage: also return the usage.

        Returns:
            (B, O, Cv, *q) in the order of `object_ids`. With return_usage also (B, T, H, W) float32 in slot
            order, summed over groups.

        Raises:
            RuntimeError: the memory is empty.
            TypeError, ValueError: a bad argument, named. KernelPrior with sigma_growth takes the last slot
                as the newest frame, so it is refused when the slots are not in time order.

        Note:
            Cost: one `memory_read` per group of objects that entered together, over the frames it has.
        """
        if self._shape is None:
            raise RuntimeError("the memory is empty: append a frame first")
        check_read(self._shape, self._frames, prior, memory_mask)
        reads, usage = [], None
        for group in self.groups:
            mask = group.memory_mask
            if memory_mask is not None:
                allowed = memory_mask[:, group.slots]
                mask = allowed if mask is None else allowed & mask
            result = memory_read(
                query_key,
                group.key,
                group.value,
                similarity=similarity,
                scale=scale,
                shrinkage=group.shrinkage,
                selection=selection,
                top_k=top_k,
                prior=slice_prior(prior, group.slots),
                memory_mask=mask,
                return_usage=return_usage,
            )
            if isinstance(result, tuple):
                result, part = result
                if usage is None:
                    usage = part.new_zeros(part.shape[0], len(self), *self._shape.grid)
                usage[:, group.slots] += part
            reads.append(result)
        read = reads[0] if len(reads) == 1 else torch.cat(reads, 1)
        return read if usage is None else (read, usage)

    def remove(self, object_ids: Iterable[int]) -> None:
        """Forget objects; their storage is freed, and so are frames that no object left can match.

        Removing all objects leaves an empty memory, as new (`bytes_copied` goes on).

        Raises:
            TypeError, ValueError: an id is not in the memory; nothing is removed.

        Note:
            Cost: one copy of the values of a group that loses only some of its objects, and of the frames
            that stay when others are dropped.
        """
        ids = check_leaving(object_ids, self.object_ids)
        assert self._shape is not None
        with torch.inference_mode(False), torch.no_grad():
            for group in self._groups:
                kept = [i for i, object_id in enumerate(group.object_ids) if object_id not in ids]
                if 0 < len(kept) < len(group.object_ids):
                    width = self._shape.value_channels
                    self.bytes_copied += group.value.keep_channels(kept, width, len(self))
                group.object_ids = [group.object_ids[i] for i in kept]
            self._groups = [group for group in self._groups if group.object_ids]
            if not self._groups:
                self._clear()
                return
            start = min(group.start for group in self._groups)
            if min(self._frames) < start:
                self._keep([slot for slot, frame in enumerate(self._frames) if frame >= start])

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly: numbers, strings and tensors (copies, without spare slots).

        Safe with torch.save and torch.load(weights_only=True).
        """
        used = len(self)
        return {
            "policy": repr(self.policy),
            "key_dtype": str(self.key_dtype),
            "value_dtype": str(self.value_dtype),
            "bytes_copied": self.bytes_copied,
            "frames": list(self._frames),
            "lasting": sorted(self._lasting),
            "travelled": [self._travelled[frame] for frame in self._frames],
            "key": None if self._key is None else self._key.view(0, used).clone(),
            "shrinkage": None if self._shrinkage is None else self._shrinkage.view(0, used).clone(),
            "groups": [
                {
                    "object_ids": list(group.object_ids),
                    "start": group.start,
                    "first": group.value.first,
                    "value": group.value.view(group.value.first, used).clone(),
                }
                for group in self._groups
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the content by that of `state`, of a `MemoryBank` with the same policy and dtypes.

        Every later read and append then gives what it would have given there, bit for bit.

        Raises:
            ValueError: policy or dtypes differ; the memory is unchanged.
            KeyError: `state` is not of `state_dict`; the memory is unchanged.
        """
        mine = (repr(self.policy), str(self.key_dtype), str(self.value_dtype))
        for name, expected in zip(("policy", "key_dtype", "value_dtype"), mine, strict=True):
            if state[name] != expected:
                raise ValueError(f"state was saved with {name} {state[name]}, this memory has {expected}")
        frames, key, shrinkage = list(state["frames"]), state["key"], state["shrinkage"]
        groups, copied, lasting = state["groups"], state["bytes_copied"], set(state["lasting"])
        travelled = dict(zip(frames, state["travelled"], strict=True))
        self._clear()
        self.bytes_copied = copied
        if not frames:
            return
        self._frames, self._lasting, self._travelled = frames, lasting, travelled
        batch, channels, _, height, width = key.shape
        objects = sum(len(group["object_ids"]) for group in groups)
        value_channels = groups[0]["value"].shape[1] // len(groups[0]["object_ids"])
        shape = FrameShape(batch, channels, value_channels, height, width, shrinkage is not None, key.device)
        limit = self._limit(shape, objects)
        self._shape = shape
        self._key = self._restore(key, 0, limit)
        self._shrinkage = None if shrinkage is None else self._restore(shrinkage, 0, limit)
        for group in groups:
            values = self._restore(group["value"], group["first"], limit)
            self._groups.append(_Group(list(group["object_ids"]), group["start"], values))

    def _tensors(self) -> list[SlotTensor]:
        shared = [tensor for tensor in (self._key, self._shrinkage) if tensor is not None]
        return shared + [group.value for group in self._groups]

    def _restore(self, saved: Tensor, first: int, limit: int | None) -> SlotTensor:
        assert self._shape is not None
        used = len(self)
        with torch.inference_mode(False), torch.no_grad():
            capacity = used if limit is None else limit
            tensor = _slots(self._shape, saved.shape[1], saved.dtype, first, capacity)
            tensor.view(first, used).copy_(saved)
        return tensor

    def _limit(self, shape: FrameShape, objects: int) -> int | None:
        """The most slots that the policy allows with so many objects."""
        keys = shape.key_channels * self.key_dtype.itemsize
        values = objects * shape.value_channels * self.value_dtype.itemsize
        slot_bytes = shape.batch * shape.height * shape.width * (keys + values + 4 * shape.shrinks)
        limit = self.policy.limit(slot_bytes)
        if limit is not None and limit < 2:
            raise ValueError(
                f"policy {self.policy} holds {limit} frames of {slot_bytes} bytes (objects: {objects}); "
                "a memory needs two, the first and the previous"
            )
        return limit

    def _slot(self, frame: int, travelled: float, limit: int | None) -> int:
        """The slot that a new frame goes to."""
        if not self._frames:
            return 0
        entries = self._entries()
        slot = self.policy.slot(frame, self.frames, entries)
        if not 0 <= slot <= len(self):
            raise ValueError(f"policy {self.policy} chose slot {slot} of {len(self)} for frame {frame}")
        return self._give_up(self._frames, frame, travelled) if slot == limit else slot

    def _give_up(self, frames: Sequence[int], new: int, travelled: float) -> int:
        """The slot of `frames` that a full memory gives up for a new one."""
        entries, thins = self._entries(), thinning(self.policy)
        if thins is None:
            return oldest(frames, entries)
        path = [*(self._travelled[frame] for frame in frames), travelled]
        return thins.give_up([*frames, new], entries, path)

    def _measure(self, key: Tensor) -> float:
        """How far the keys have moved since the memory's first frame, as `ThinningPolicy` says."""
        if self._key is None:
            return 0.0
        newest = max(range(len(self)), key=self._frames.__getitem__)
        before = self._key.view(0, len(self))[:, :, newest].float()
        length = (key.float().square().sum() + before.square().sum()) / 2
        change = (key.float() - before).square().sum() / length.clamp(min=torch.finfo(torch.float32).tiny)
        return self._travelled[self._frames[newest]] + float(change.sqrt())

    def _entries(self) -> set[int]:
        """Frames that are given up last."""
        return self._lasting | {group.start for group in self._groups}

    def _shrink(self, count: int, new: int, travelled: float) -> None:
        """Give up frames until `count` are left."""
        frames = list(self._frames)
        while len(frames) > count:
            del frames[self._give_up(frames, new, travelled)]
        self._keep([slot for slot, frame in enumerate(self._frames) if frame in frames])

    def _keep(self, slots: list[int]) -> None:
        """Drop all slots but `slots`, ascending; the next append allocates what the policy allows."""
        self.bytes_copied += sum(tensor.keep(slots) for tensor in self._tensors())
        self._frames = [self._frames[slot] for slot in slots]
        self._travelled = {frame: self._travelled[frame] for frame in self._frames}

    def _view(self, group: _Group) -> MemoryGroup:
        assert self._key is not None
        assert self._shape is not None
        shape = self._shape
        known = [slot for slot, frame in enumerate(self._frames) if frame >= group.start]
        begin, end = known[0], known[-1] + 1
        mask = None
        if len(known) < end - begin:
            seen = [frame >= group.start for frame in self._frames[begin:end]]
            mask = torch.tensor(seen, device=shape.device)[None, :, None, None]
            mask = mask.expand(shape.batch, end - begin, *shape.grid)
        rows = group.value.view(begin, end)  # [B, O*Cv, T, H, W]
        value = rows.view(shape.batch, len(group.object_ids), shape.value_channels, end - begin, *shape.grid)
        shrinkage = None if self._shrinkage is None else self._shrinkage.view(begin, end)
        key = self._key.view(begin, end)
        return MemoryGroup(tuple(group.object_ids), slice(begin, end), key, value, shrinkage, mask)


def _slots(
    shape: FrameShape, channels: int, dtype: torch.dtype, first: int, capacity: int | None
) -> SlotTensor:
    return SlotTensor(shape.batch, shape.grid, channels, dtype, shape.device, first=first, capacity=capacity)
