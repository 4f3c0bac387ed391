# SPDX-License-Identifier: Apache-2.0
"""The batches of a run: which clips belong to which step and process, from any step on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from .clips import Batch, collate
from .config import ConfigError, TrainConfig
from .dataset import ClipDataset


class _Places(Sampler[list[int]]):
    """Indices of this process's clips, batch by batch, of the rest of an epoch."""

    def __init__(self, per_epoch: int, batch: int, rank: int, processes: int) -> None:
        self.first, self._per_epoch = 0, per_epoch
        self._batch, self._rank, self._processes = batch, rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for place in range(self.first, self._per_epoch):
            begin = (place * self._processes + self._rank) * self._batch
            yield list(range(begin, begin + self._batch))

    def __len__(self) -> int:
        return self._per_epoch - self.first


class Batches:
    """The batches of steps first, first + 1, ... up to the last step of a run, on the CPU.

    Step s takes clips s' * batch ... of epoch s // steps_per_epoch, split over the processes in order: two
    processes see together what one process with the same configuration sees.

    Args:
        dataset: of clips; its epoch and progress are set here.
        config: batch, steps, workers.
        rank, processes: of this process.
        pin: batches come in page-locked memory.

    Raises:
        ConfigError: the batch is no multiple of the processes, or larger than an epoch.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        config: TrainConfig,
        *,
        rank: int = 0,
        processes: int = 1,
        pin: bool = False,
    ) -> None:
        if config.batch % processes:
            raise ConfigError(f"batch must be a multiple of the {processes} processes, got {config.batch}")
        self.steps_per_epoch = len(dataset) // config.batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"batch must be at most data.clips_per_epoch, {len(dataset)}, got {config.batch}"
            )
        self._dataset, self._steps = dataset, config.steps
        self._places = _Places(self.steps_per_epoch, config.batch // processes, rank, processes)
        self._loader: DataLoader[Batch] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=self._places,
            collate_fn=collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=pin,
            # Its own: a loader draws a seed whenever it begins, from what the model's dropout draws from.
            generator=torch.Generator(),
        )

    def since(self, first: int) -> Iterator[Batch]:
        """The batches from step `first` on."""
        step = first
        while step < self._steps:
            epoch, self._places.first = divmod(step, self.steps_per_epoch)
            self._dataset.set_epoch(epoch)
            self._dataset.set_progress(epoch * self.steps_per_epoch / self._steps)
            for batch in self._loader:
                yield batch
                step += 1
                if step == self._steps:
                    return
