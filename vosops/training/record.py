# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind while it goes on: log.csv, TensorBoard curves, overlays, a progress bar."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vosops.data.files import write_file

COLUMNS = ("step", "loss", "cross_entropy", "jaccard", "lr", "gradient_norm", "held_out_j", "seconds")


class Record:
    """Writes the log of a run, from a step on: what a killed run logged beyond its checkpoint is dropped.

    Args:
        folder: of the run, which exists.
        first: step at which the run begins or goes on.
        steps: of the whole run.
        console: where progress is shown: a bar with the time left, or lines where there is no terminal.

    Raises:
        OSError: a file of the folder cannot be written.
    """

    def __init__(self, folder: Path, first: int, steps: int, console: Console) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds of imports that only training needs

        self._folder, self._steps, self._console = folder, steps, console
        self._begin, self._first = time.monotonic(), first
        rows = [row for row in read_log(folder) if int(row["step"]) <= first]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(folder / "log.csv", lambda file: file.write(text.getvalue().encode()))
        self._file = (folder / "log.csv").open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        # Loading TensorBoard's own C++ writer is not needed: events are few.
        self._board: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            str(folder / "tensorboard"), purge_step=first + 1 if first else None
        )
        (folder / "overlays").mkdir(exist_ok=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first)
        self._bar.start()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        self._bar.update(self._task, completed=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A row of log.csv and points of the curves.

        Args:
            step: how many are done.
            values: by the names of `COLUMNS`; those that are missing stay empty.
        """
        self._writer.writerow({"step": step} | {name: repr(float(v)) for name, v in values.items()})
        self._file.flush()
        for name, value in values.items():
            if name != "seconds":
                self._board.add_scalar(name, value, step)
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in ("loss", "held_out_j") if name in values)
        self._bar.update(self._task, description=shown)
        if not self._console.is_terminal:
            left = (time.monotonic() - self._begin) / max(1, step - self._first) * (self._steps - step)
            left_text = timedelta(seconds=round(left))
            self._console.print(
                f"step {step} of {self._steps}: {shown}, {left_text} left", highlight=False, soft_wrap=True
            )

    def picture(self, step: int, image: NDArray[np.uint8]) -> None:
        """An overlay (H, W, 3) uint8 RGB, as overlays/<step>.jpg and on TensorBoard."""
        path = self._folder / "overlays" / f"{step:06d}.jpg"
        write_file(path, partial(Image.fromarray(image).save, format="JPEG", quality=85))
        self._board.add_image("clips", image, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.stop()
        self._file.close()
        self._board.close()


def read_log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv, which begins with the names of `COLUMNS`; none if there is no file."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # A run that is killed while it writes may leave half a row.
        return [row for row in csv.DictReader(file) if None not in row.values() and row["step"]]
