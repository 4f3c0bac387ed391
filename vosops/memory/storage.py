# SPDX-License-Identifier: Apache-2.0
"""One tensor of the memory: rows of channels, position-major, in slots of one frame each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Spare slots are at most half of those used, and growing copies at most three times the bytes held.
_GROWTH = 1.5
_FIRST_SLOTS = 4


class SlotTensor:
    """Slots `first`, `first` + 1, ... of a memory as one tensor [B, size, H*W, C], channels innermost.

    A frame is written to its slot once; growing copies the slots used to a larger tensor. Every method
    that copies returns the bytes it wrote. Arguments are trusted: `MemoryBank` checks them.

    Args:
        batch, grid, channels: B, (H, W) and C.
        dtype, device: of the storage.
        first: the slot held by the tensor's first row.
        capacity: one past the last slot to allocate; None starts small and grows geometrically.
    """

    def __init__(
        self,
        batch: int,
        grid: tuple[int, int],
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        first: int = 0,
        capacity: int | None = None,
    ) -> None:
        self.first = first
        self._grid = grid
        size = _FIRST_SLOTS if capacity is None else capacity - first
        self._rows = torch.empty(batch, size, grid[0] * grid[1], channels, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._rows.nbytes

    def view(self, begin: int, end: int) -> Tensor:
        """Slots begin .. end - 1 without a copy.  # [B, C, T, H, W], channels innermost"""
        batch, _, _, channels = self._rows.shape
        rows = self._rows[:, begin - self.first : end - self.first]
        return rows.view(batch, end - begin, *self._grid, channels).permute(0, 4, 1, 2, 3)

    def write(self, slot: int, frame: Tensor, used: int, capacity: int | None) -> int:
        """Write `frame` [B, C, H, W] to `slot`, resizing first where needed.

        Args:
            slot: an old slot, or the one after the last.
            frame: any strides and floating dtype.
            used: slots below it hold frames.
            capacity: as in the constructor; a storage of another size is resized to it.
        """
        first, end = min(slot, self.first), max(slot + 1, used)
        size = self._rows.shape[1]
        wanted = size if capacity is None else capacity - first
        if capacity is None and end - first > size:
            wanted = max(end - first, int(size * _GROWTH) + 1)
        copied = 0
        if first < self.first or wanted != size:
            copied = self._resize(first, wanted, used)
        target = self._rows[:, slot - self.first]  # [B, H*W, C]
        target.copy_(frame.flatten(2).mT)
        return copied + target.nbytes

    def clear(self, end: int) -> None:
        """Zero the slots below `end`: they are masked in every read, but NaN must not lie there."""
        self._rows[:, : max(end - self.first, 0)].zero_()

    def keep(self, slots: Sequence[int]) -> int:
        """Drop all slots but `slots`, ascending, and free the others."""
        rows = [slot - self.first for slot in slots if slot >= self.first]
        self.first = len(slots) - len(rows)
        self._rows = self._rows[:, rows]
        return self._rows.nbytes

    def keep_channels(self, blocks: Sequence[int], width: int, used: int) -> int:
        """Drop all blocks of `width` channels but `blocks`, and free the others."""
        batch, size, positions, _ = self._rows.shape
        rows = used - self.first
        old = self._rows.view(batch, size, positions, -1, width)[:, :rows]
        self._rows = self._rows.new_empty(batch, size, positions, len(blocks) * width)
        new = self._rows.view(batch, size, positions, -1, width)[:, :rows]
        for block, source in enumerate(blocks):
            new[..., block, :].copy_(old[..., source, :])
        return new.nbytes

    def _resize(self, first: int, size: int, used: int) -> int:
        """Move to a tensor of `size` slots from slot `first` on."""
        old, offset = self._rows, self.first - first
        rows = min(max(used - self.first, 0), old.shape[1])
        batch, _, positions, channels = old.shape
        self._rows = old.new_empty(batch, size, positions, channels)
        self._rows[:, :offset].zero_()
        moved = self._rows[:, offset : offset + rows]
        moved.copy_(old[:, :rows])
        self.first = first
        return moved.nbytes
