# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun started for one run, or the only one."""

from __future__ import annotations

import os
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=30)  # processes wait for the one with the longest video


class Processes:
    """One process of a run: which one, of how many, and what the others say. A context manager.

    Reads what torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK); without it there is one process. They talk
    through gloo, whatever device the models are on: only words are exchanged.

    Attributes:
        rank: number of this process, from 0.
        count: of all.
        device: the GPU of this process, by LOCAL_RANK, or "cpu" where there is none.

    Raises:
        ValueError: the variables are no numbers, or a rank is not below the count.
    """

    def __init__(self) -> None:
        self.rank, self.count, local = (
            _number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        if not 0 <= self.rank < self.count:
            raise ValueError(f"RANK must lie in 0 .. WORLD_SIZE - 1 = {self.count - 1}, got {self.rank}")
        gpus = torch.cuda.device_count()
        self.device = f"cuda:{local % gpus}" if gpus else "cpu"

    def __enter__(self) -> Processes:
        if self.count > 1:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def gather(self, value: Any) -> list[Any]:
        """What every process gives, in the order of ranks; waits for all. Values are pickled."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, as torchrun sets it, got {text!r}")
    return int(text)
