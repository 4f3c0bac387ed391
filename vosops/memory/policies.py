# SPDX-License-Identifier: Apache-2.0
"""What a memory keeps: a policy names the slot of a new frame, and how many slots there may be.

Common to all policies: the first frame of the memory is never replaced, and the frame on which later
objects enter (it carries their given mask), or that was appended as lasting, is replaced only where no other
frame is left to replace.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Policy(Protocol):
    """What `MemoryBank` asks of a policy. Policies are immutable and hold no state of a video."""

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        """The slot for a new frame, before any limit.

        Args:
            frame: index of the new frame, above all of `frames`.
            frames: frame index per slot; at least one, in any order.
            entries: frames on which objects of the memory entered, and lasting ones.

        Returns:
            A slot to overwrite, or len(frames) for a new one.
        """
        ...

    def limit(self, slot_bytes: int) -> int | None:
        """The most slots ever held, or None for no limit.

        Args:
            slot_bytes: bytes that one slot takes with the present objects.
        """
        ...


@runtime_checkable
class ThinningPolicy(Policy, Protocol):
    """A policy that chooses itself what a full memory gives up; under any other the oldest frame goes."""

    def give_up(self, frames: Sequence[int], entries: Collection[int], travelled: Sequence[float]) -> int:
        """The slot to give up for a new frame.

        Args:
            frames: frame index per slot, at least two, and last that of the new frame.
            entries: frames on which objects of the memory entered, and lasting ones.
            travelled: of each of `frames`, how far the keys had moved by then: the sum over all frames
                remembered so far, kept or not, of |k_t - k_(t-1)| over the root mean square of both norms.

        Returns:
            A slot, not that of the first frame.
        """
        ...


def _smaller(limit: int, other: int | None) -> int:
    return limit if other is None else min(limit, other)


def _check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_policy(name: str, value: object) -> None:
    if isinstance(value, type) or not isinstance(value, Policy):
        raise TypeError(f"{name} must be a policy such as EveryNth(5), got {value!r}")


@dataclass(frozen=True)
class EveryNth:
    """The first frame, a frame every `n` frames, and the previous frame, which the next one replaces.

    STM (Oh et al., ICCV 2019) uses n = 5; n = 1 keeps every frame. Counted from the first frame, the first
    one at or past each multiple of n stays, so gaps in the frames do no harm. Slots stay in time order.
    No limit: a video of T frames fills about T / n slots.

    Args:
        n: distance in frames.

    Raises:
        TypeError, ValueError: n is no integer, or below 1.
    """

    n: int = 5

    def __post_init__(self) -> None:
        _check_integer("EveryNth.n", self.n, 1)

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        if len(frames) == 1:
            return 1
        # All frames but the newest have stayed, so the two newest tell whether the newest is to stay.
        first, before, newest = min(frames), *sorted(frames)[-2:]
        passed = (newest - first) // self.n > (before - first) // self.n
        temporary = not passed and newest not in entries
        return list(frames).index(newest) if temporary else len(frames)

    def limit(self, slot_bytes: int) -> int | None:
        return None


@dataclass(frozen=True)
class Bounded:
    """At most `frames` frames: the first, and the most recent of those that `inner` keeps.

    The oldest frame is overwritten in place, so slots are not in time order once the memory is full. Where
    `inner` is a `ThinningPolicy`, it says what is overwritten.

    Args:
        frames: most frames held, the first included; at least 2.
        inner: what to keep of the frames; every one by default.

    Raises:
        TypeError, ValueError: frames is no integer, or below 2; inner is no policy.
    """

    frames: int
    inner: Policy = EveryNth(1)

    def __post_init__(self) -> None:
        _check_integer("Bounded.frames", self.frames, 2)
        _check_policy("Bounded.inner", self.inner)

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        return self.inner.slot(frame, frames, entries)

    def limit(self, slot_bytes: int) -> int | None:
        return _smaller(self.frames, self.inner.limit(slot_bytes))


@dataclass(frozen=True)
class ByteBudget:
    """As many frames as fit in `bytes`: the first, and the most recent of those that `inner` keeps.

    Where `inner` is a `ThinningPolicy`, it says which frames stay.

    When objects enter, a frame takes more bytes and the oldest frames go. `MemoryBank.nbytes` is never
    above the budget after a call; while objects enter or leave, the tensor that is being re-laid exists
    twice for a moment.

    Args:
        bytes: most bytes of keys, values and shrinkage together.
        inner: what to keep of the frames; every one by default.

    Raises:
        TypeError, ValueError: bytes is no integer, or below 1; inner is no policy.
    """

    bytes: int
    inner: Policy = EveryNth(1)

    def __post_init__(self) -> None:
        _check_integer("ByteBudget.bytes", self.bytes, 1)
        _check_policy("ByteBudget.inner", self.inner)

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        return self.inner.slot(frame, frames, entries)

    def limit(self, slot_bytes: int) -> int | None:
        return _smaller(self.bytes // slot_bytes, self.inner.limit(slot_bytes))


@dataclass(frozen=True)
class Balanced:
    """At most `frames` frames, spread evenly over the time and the motion of all of the video seen so far.

    Every frame is kept while there is room; then, with each new frame, the one that is missed least goes:
    that whose two neighbours in time leave the smallest gap without it. A gap is the mean of its share of
    the time passed since the first frame and its share of the motion seen since (of the time alone where
    nothing moved). So the interval follows the length of the video, which need not be known, and is shorter
    where more moves: a clip of 10 frames holds 10, one of 5,000 holds `frames`, over its whole length. The
    newest frame always stays until the next one.

    Give it every frame (`memory_every=1` in `SessionSettings`), or what it may choose from is spread evenly
    already. With a byte budget: `ByteBudget(bytes, Balanced(frames))`.

    Args:
        frames: most frames held, the first included; at least 2.

    Raises:
        TypeError, ValueError: frames is no integer, or below 2.

    Note:
        A full memory overwrites in place, so slots are not in time order. Cost beside `Bounded`: one pass
        over two key maps a frame for their motion, and reading one number back from the device.

    Source: ours, for the "dynamic memory" of the challenge solutions, which publish no rule.
    """

    frames: int

    def __post_init__(self) -> None:
        _check_integer("Balanced.frames", self.frames, 2)

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        return len(frames)

    def limit(self, slot_bytes: int) -> int | None:
        return self.frames

    def give_up(self, frames: Sequence[int], entries: Collection[int], travelled: Sequence[float]) -> int:
        order = sorted(range(len(frames)), key=lambda slot: frames[slot])
        passed = frames[order[-1]] - frames[order[0]]
        moved = travelled[order[-1]] - travelled[order[0]]

        def missed(place: int) -> tuple[bool, float]:
            before, slot, after = order[place - 1 : place + 2]
            time = (frames[after] - frames[before]) / passed
            motion = (travelled[after] - travelled[before]) / moved if moved > 0 else time
            return frames[slot] in entries, time + motion

        return order[min(range(1, len(order) - 1), key=missed)]


@dataclass(frozen=True)
class SharedPolicy:
    """What `inner` keeps in one of several banks that share its limit, and a frame that is only passing by.

    Models that hold a bank per object (STM) ask `inner` about the bytes of all of them. Models that remember
    the previous frame until the next one name it, whatever `inner` would do with it.

    Args:
        inner: the policy of the whole memory.
        banks: how many banks share its bytes, at least 1.
        temporary: index of a remembered frame that the next one replaces; None if there is none.

    Raises:
        TypeError, ValueError: inner is no policy; banks is no integer, or below 1.
    """

    inner: Policy
    banks: int = 1
    temporary: int | None = None

    def __post_init__(self) -> None:
        _check_policy("SharedPolicy.inner", self.inner)
        _check_integer("SharedPolicy.banks", self.banks, 1)

    def slot(self, frame: int, frames: Sequence[int], entries: Collection[int]) -> int:
        if self.temporary is not None and self.temporary in frames:
            return list(frames).index(self.temporary)
        return self.inner.slot(frame, frames, entries)

    def limit(self, slot_bytes: int) -> int | None:
        return self.inner.limit(slot_bytes * self.banks)


def oldest(frames: Sequence[int], entries: Collection[int]) -> int:
    """The slot to give up when the memory is full; the first frame never is.

    Args:
        frames: frame index per slot, at least two.
        entries: frames on which objects entered; given up only where nothing else is left, oldest first.
    """
    first = min(frames)
    return min(
        (slot for slot in range(len(frames)) if frames[slot] != first),
        key=lambda slot: (frames[slot] in entries, frames[slot]),
    )


def thinning(policy: Policy) -> ThinningPolicy | None:
    """The policy that chooses what a full memory gives up, inside of those that only bound or share it."""
    while isinstance(policy, Bounded | ByteBudget | SharedPolicy):
        policy = policy.inner
    return policy if isinstance(policy, ThinningPolicy) else None
