# SPDX-License-Identifier: Apache-2.0
"""A recipe over a whole data set: shared among processes, gone on with after a stop, scored, one report."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import vosops
from vosops.data import write_mask
from vosops.data.files import remove_leftovers, write_file
from vosops.data.frames import FrameSource, open_frames
from vosops.data.masks import LabelMap
from vosops.evaluation import EvaluationReport, SequenceScore, evaluate_folders, write_csv
from vosops.propagate.probabilities import SavingSegmenter
from vosops.propagate.run import RunError, VideoSegmenter, segment_video
from vosops.training.settings import differences

from .late_objects import LateObjects
from .pipeline import PROBABILITIES, Pipeline
from .processes import Processes
from .sequences import DataSequence, Later, find_sequences, share

_REQUEST, _SCORE, _SPEED, _REPORT = "dataset.json", "score.json", "speed.json", "report.json"
_UNSCORED = 2  # the first and the last frame of a sequence


class DatasetError(RuntimeError):
    """Sequences that could not be segmented; the others are done, and the same run goes on.

    Attributes:
        failures: one line each, beginning with the sequence's name.
    """

    def __init__(self, failures: Sequence[str], sequences: int) -> None:
        super().__init__(
            f"{len(failures)} of {sequences} sequences failed; run the same again when this is mended:\n"
            + "\n".join(failures)
        )
        self.failures = list(failures)


@dataclass(frozen=True)
class DatasetReport:
    """What a run over a data set gave.

    Attributes:
        sequences: how many were segmented.
        scores: of those with ground truth on every frame; None if there is none.
        frames, seconds: of segmentation, reading and writing, over all processes; frames that a stopped call
            did before it stopped, and the seconds that it took, are not in.
        peak_bytes: the most memory that one process held (resident, of its whole life, models included).
    """

    sequences: int
    scores: EvaluationReport | None
    frames: int
    seconds: float
    peak_bytes: int

    @property
    def fps(self) -> float:
        """Frames per second of one process; 0 where nothing was timed."""
        return self.frames / self.seconds if self.seconds else 0.0


def run_dataset(
    pipeline: Pipeline,
    data: str | Path,
    out: str | Path,
    processes: Processes,
    *,
    sequences: Sequence[str] | None = None,
    save_probabilities: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetReport | None:
    """Segments every sequence of a data set and scores those that have ground truth.

    Writes into `out`: `<sequence>/masks/<frame>.png` and run.json (`segment_video`), score.json with J and F
    of every object and frame, the CSV tables of the DAVIS benchmark, and report.json. All these are functions
    of the recipe and the data: a call that was stopped, killed too, goes on where it was when it is repeated,
    with any number of processes, and leaves the same bytes. speed.json and the times in report.json are
    measurements.

    Args:
        pipeline: of the recipe.
        data: in DAVIS's or YouTube-VOS's layout; which masks are given says `find_sequences`.
        out: folder to write to.
        processes: that share the work; each sequence is segmented by one (`share`).
        sequences: names; see `find_sequences`.
        save_probabilities: write `<sequence>/probabilities` as well, for members of an ensemble to read.
        on_progress: called with the frames done and all of this process's share.

    Returns:
        The report, in process 0; None in the others.

    Raises:
        LayoutError: `data` is no data set.
        ValueError: `out` holds a run of another recipe, or other files; nothing was done.
        DatasetError: sequences failed, in whatever process; the others are done.
    """
    out = Path(out)
    found, folders = find_sequences(Path(data), sequences)
    refused = _begin(out, pipeline, save_probabilities) if processes.rank == 0 else None
    refused = processes.gather(refused)[0]
    if refused is not None:
        raise ValueError(refused)
    worker = _Worker(pipeline, out, folders.masks, save_probabilities, processes.rank)
    mine = share(found, processes.rank, processes.count)
    total, done = sum(len(sequence.names) for sequence in mine), 0

    def advance(number: int) -> None:
        if on_progress is not None:
            on_progress(done + number, total)

    failures = []
    for sequence in mine:
        try:
            worker.segment(sequence, advance)
        except (RunError, ValueError, OSError) as error:
            failures.append(f"{sequence.name}: {error}")
        done += len(sequence.names)
        advance(0)
    failures = [line for lines in processes.gather(failures) for line in lines]
    if failures:
        raise DatasetError(failures, len(found))
    return _merge(found, out) if processes.rank == 0 else None


def _begin(out: Path, pipeline: Pipeline, save_probabilities: bool) -> str | None:
    """Makes the folder ready; returns why it cannot be used."""
    request = {
        "vosops": vosops.__version__,
        "max_size": pipeline.recipe.max_size,
        "save_probabilities": save_probabilities,
        "recipe": pipeline.settings,
    }
    request = json.loads(json.dumps(request))
    file = out / _REQUEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        if file.is_file():
            changes = differences(json.loads(file.read_text()), request)
            if changes:
                return f"{out} was begun with other settings (then, now):\n" + "\n".join(changes)
        elif any(out.iterdir()):
            return f"{out} is not empty and holds no {_REQUEST}: choose another folder"
        else:
            _write_json(file, request)
    except OSError as error:
        return f"cannot write to {out}: {error.strerror or error}"
    except ValueError as error:
        return f"{file} is damaged ({error}): choose another folder"
    return None


@dataclass(frozen=True)
class _Worker:
    """What one process does with each of its sequences."""

    pipeline: Pipeline
    out: Path
    truth: Path
    save_probabilities: bool
    rank: int

    def segment(self, sequence: DataSequence, advance: Callable[[int], None]) -> None:
        """Segments and scores one sequence, or goes on with it; does nothing if it is done."""
        out = self.out / sequence.name
        if (out / _SPEED).is_file():
            return
        given, palette = sequence.read_given()
        source: FrameSource = open_frames(sequence.frames)
        if sequence.start:
            source = Later(source, sequence.start)
        late = {number: labels for number, labels in given.items() if number > 0}
        digests = {str(n): hashlib.sha256(labels.tobytes()).hexdigest() for n, labels in late.items()}
        summary = segment_video(
            self._segmenter(sequence, late),
            source,
            given[0],
            out,
            palette=palette,
            resume=True,
            max_size=self.pipeline.recipe.max_size,
            write_overlay=False,
            settings={**self.pipeline.settings, "later_masks": digests},
            on_progress=lambda stage, done, total: advance(done),
        )
        for name in sequence.names[: sequence.start]:
            write_mask(summary.masks / f"{name}.png", np.zeros(source.size, np.uint8), palette)
        if sequence.scored and len(sequence.names) > _UNSCORED:
            (score,) = evaluate_folders(summary.masks, self.truth, sequences=[sequence.name]).sequences
            _write_json(out / _SCORE, {"frames": score.frames, "j": score.j.tolist(), "f": score.f.tolist()})
        speed = {"frames": summary.segmented, "seconds": summary.seconds, "peak_bytes": peak_bytes()}
        _write_json(out / _SPEED, {"process": self.rank, **speed})

    def _segmenter(self, sequence: DataSequence, late: Mapping[int, LabelMap]) -> VideoSegmenter:
        segmenter = self.pipeline(sequence.name)
        if late:
            segmenter = LateObjects(segmenter, late)
        if self.save_probabilities:
            folder = self.out / sequence.name / PROBABILITIES
            segmenter = SavingSegmenter(segmenter, folder, self.pipeline.settings)
        return segmenter


def _merge(sequences: Sequence[DataSequence], out: Path) -> DatasetReport:
    """The report of all sequences, written to report.json and, with scores, as the benchmark's tables."""
    scores, speeds, rows = [], [], []
    for sequence in sorted(sequences, key=lambda sequence: sequence.name):
        speed = json.loads((out / sequence.name / _SPEED).read_text())
        row: dict[str, Any] = {"sequence": sequence.name, "frames": len(sequence.names)}
        if (out / sequence.name / _SCORE).is_file():
            saved = json.loads((out / sequence.name / _SCORE).read_text())
            score = SequenceScore(
                sequence.name, tuple(saved["frames"]), np.array(saved["j"]), np.array(saved["f"])
            )
            scores.append(score)
            row |= {"j": score.j_mean, "f": score.f_mean, "j_and_f": score.jf_mean}
        speeds.append(speed)
        rows.append(row | {"timed": speed})
    report = DatasetReport(
        len(sequences),
        EvaluationReport(tuple(scores)) if scores else None,
        sum(speed["frames"] for speed in speeds),
        sum(speed["seconds"] for speed in speeds),
        max(speed["peak_bytes"] for speed in speeds),
    )
    if report.scores is not None:
        write_csv(report.scores, out)
    mean = None if report.scores is None else report.scores.global_row()
    summary = {"scores": mean, "frames_per_second": report.fps, "peak_bytes": report.peak_bytes}
    _write_json(out / _REPORT, {**summary, "sequences": rows})
    return report


def peak_bytes() -> int:
    """The most resident memory that this process has held so far."""
    import resource  # here, since Windows lacks it and importing this file must not need it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_file(path, lambda file: file.write(text.encode()))
