# SPDX-License-Identifier: Apache-2.0
"""Scores of a set of sequences, and their CSV tables as the DAVIS 2017 benchmark names the columns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from .sequence import SequenceScore, Statistics


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of several sequences.

    Every mean is over the objects of all sequences, as the benchmark takes it: a sequence with three objects
    counts three times.

    Attributes:
        sequences: scores of each sequence.
    """

    sequences: tuple[SequenceScore, ...]

    @property
    def j(self) -> Statistics:
        """Statistics of J, averaged over objects."""
        return _average(entry for score in self.sequences for entry in score.j_statistics)

    @property
    def f(self) -> Statistics:
        """Statistics of F, averaged over objects."""
        return _average(entry for score in self.sequences for entry in score.f_statistics)

    @property
    def jf_mean(self) -> float:
        """J&F: the mean of the mean J and the mean F."""
        return (self.j.mean + self.f.mean) / 2

    def global_row(self) -> dict[str, float]:
        """The benchmark's global table: column name -> score."""
        j, f = self.j, self.f
        return {
            "J&F-Mean": (j.mean + f.mean) / 2,
            "J-Mean": j.mean,
            "J-Recall": j.recall,
            "J-Decay": j.decay,
            "F-Mean": f.mean,
            "F-Recall": f.recall,
            "F-Decay": f.decay,
        }


def write_csv(report: EvaluationReport, folder: str | PathLike[str]) -> list[Path]:
    """Write the report as three CSV files, which are replaced if they exist.

    - `global_results.csv` and `per-sequence_results.csv`: the columns, row names (`<sequence>_<object>`) and
      three decimals of the benchmark's `global_results-<set>.csv` and `per-sequence_results-<set>.csv`.
    - `per-frame_results.csv`: Sequence (`<sequence>_<object>`), Frame, J, F with every digit.

    Args:
        report: of `evaluate_folders`.
        folder: made if it is not there.

    Returns:
        The paths of the three files.

    Raises:
        OSError: the folder cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    row = report.global_row()
    per_sequence: list[Sequence[str]] = []
    per_frame: list[Sequence[str]] = []
    for score in report.sequences:
        for name, j, f in zip(score.object_names, score.j, score.f, strict=True):
            per_sequence.append((name, f"{j.mean():.3f}", f"{f.mean():.3f}"))
            for frame, j_frame, f_frame in zip(score.frames, j, f, strict=True):
                per_frame.append((name, frame, repr(float(j_frame)), repr(float(f_frame))))
    return [
        _write(target / "global_results.csv", tuple(row), [[f"{value:.3f}" for value in row.values()]]),
        _write(target / "per-sequence_results.csv", ("Sequence", "J-Mean", "F-Mean"), per_sequence),
        _write(target / "per-frame_results.csv", ("Sequence", "Frame", "J", "F"), per_frame),
    ]


def _average(entries: Iterable[Statistics]) -> Statistics:
    mean, recall, decay = np.mean(list(entries), axis=0)
    return Statistics(float(mean), float(recall), float(decay))


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
