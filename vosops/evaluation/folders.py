# SPDX-License-Identifier: Apache-2.0
"""Scoring folders of masks: finds the sequences, checks every file, then scores them one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .report import EvaluationReport
from .sequence import VOID, SequenceScore, evaluate_sequence

_SHOWN = 8  # entries of a list shown in an error
_MANY_LABELS = 32  # more labels than this in a result are grey levels, not objects


class EvaluationError(ValueError):
    """The folders cannot be scored; the message says which file and why."""


@dataclass(frozen=True)
class _Sequence:
    name: str
    gt_masks: list[Path]  # every frame's
    masks: list[Path]  # the results of the same frames


def evaluate_folders(
    results: str | PathLike[str],
    ground_truth: str | PathLike[str],
    *,
    sequences: Sequence[str] | None = None,
    single_object: bool = False,
    on_sequence: Callable[[SequenceScore], None] | None = None,
) -> EvaluationReport:
    """Score folders of mask PNGs under the DAVIS 2017 semi-supervised protocol (see `evaluate_sequence`).

    Masks are 8-bit indexed or grey PNGs that hold label ids: 0 background, 1..n objects, 255 void. A result
    has the file name of its ground truth. Results of a sequence's first and last frame are not needed;
    further files and sequences in `results` are ignored.

    Args:
        results: folder of sequences, `<results>/<sequence>/00000.png`; or the folder of the only sequence.
        ground_truth: folder of sequences; or a DAVIS root with `Annotations/480p/<sequence>`; or the folder
            of one sequence's masks.
        sequences: names to score, in this order. By default those of a DAVIS root's `ImageSets/2017/val.txt`
            if it has one, else every sequence of `ground_truth`, by name.
        single_object: score the union of the objects (every label above 0) as one object.
        on_sequence: called with each sequence's scores as soon as they are known.

    Returns:
        EvaluationReport, its sequences in the order they were scored.

    Raises:
        EvaluationError: a missing folder, sequence or frame; a file that is no mask; sizes that differ; all
            found before anything is scored. A result with more labels than the ground truth has objects, or
            grey levels instead of labels, is found when its frame is read.

    Note:
        Cost: about 10 ms per frame with one object at 854x480; memory for two frames.
    """
    pairs = _pair_sequences(Path(results), Path(ground_truth), sequences)
    problems = [problem for sequence in pairs for problem in _check_headers(sequence)]
    if problems:
        raise EvaluationError(_shorten(problems, "\n"))
    scores = []
    for sequence in pairs:
        scores.append(_score(sequence, single_object))
        if on_sequence is not None:
            on_sequence(scores[-1])
    return EvaluationReport(tuple(scores))


def _score(sequence: _Sequence, single_object: bool) -> SequenceScore:
    gt_masks = sequence.gt_masks
    with Image.open(gt_masks[0]) as image:
        num_objects = 1 if single_object else _num_objects(np.asarray(image))
    # The results of the first and last frame are never looked at, so they need not exist.
    placeholder = np.zeros((1, 1), dtype=np.uint8)
    predictions: Iterator[NDArray[np.uint8]] = (
        _read_result(path, num_objects, single_object) if 0 < index < len(gt_masks) - 1 else placeholder
        for index, path in enumerate(sequence.masks)
    )
    try:
        return evaluate_sequence(
            (_read(path) for path in gt_masks),
            predictions,
            name=sequence.name,
            frames=[path.stem for path in gt_masks],
            single_object=single_object,
        )
    except EvaluationError:
        raise
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(image, dtype=np.uint8)
    except OSError as error:  # a truncated file passes the check of its header
        raise EvaluationError(f"{path}: cannot be read: {error}") from error


def _num_objects(labels: NDArray[np.uint8]) -> int:
    return int(labels[labels != VOID].max(initial=0))


def _read_result(path: Path, num_objects: int, single_object: bool) -> NDArray[np.uint8]:
    labels = _read(path)
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    if set(present) == {0, VOID}:
        raise EvaluationError(
            f"{path}: holds only 0 and 255, and 255 means void; a mask of one object holds 0 and 1 "
            "(convert: Image.fromarray((np.asarray(Image.open(path)) > 127).astype('uint8')).save(path))"
        )
    if len(present) > max(_MANY_LABELS, num_objects + 2):
        raise EvaluationError(
            f"{path}: holds {len(present)} different values, so it has grey levels (an anti-aliased or "
            "probability mask) instead of label ids; resize label maps by nearest neighbour and threshold "
            "probabilities before writing"
        )
    extra = [int(label) for label in present if num_objects < label < VOID]
    if extra and not single_object:
        raise EvaluationError(
            f"{path}: has label{'s' * (len(extra) > 1)} {_shorten(extra)}, but the first frame of the ground "
            f"truth has {num_objects} object{'s' * (num_objects != 1)}; to score the union of all objects "
            "use --union (single_object=True)"
        )
    return labels


def _check_headers(sequence: _Sequence) -> list[str]:
    """What is wrong with the sequence's files, from their headers alone."""
    problems = []
    for index, (gt_path, path) in enumerate(zip(sequence.gt_masks, sequence.masks, strict=True)):
        gt_size, problem = _mask_size(gt_path)
        if problem is None and 0 < index < len(sequence.masks) - 1:
            size, problem = _mask_size(path)
            if problem is None and size != gt_size:
                problem = (
                    f"{path}: is {size[0]}x{size[1]}, its ground truth {gt_size[0]}x{gt_size[1]} (WxH); "
                    "resize results by nearest neighbour"
                )
        if problem is not None:
            problems.append(problem)
    if problems:
        return problems
    labels = _read(sequence.gt_masks[0])
    if _num_objects(labels) == 0:
        hint = (
            "; it holds 0 and 255, and 255 means void: a mask of one object holds 0 and 1"
            if labels.any()
            else ""
        )
        problems.append(f"{sequence.gt_masks[0]}: the first ground-truth mask has no object{hint}")
    return problems


def _mask_size(path: Path) -> tuple[tuple[int, int], str | None]:
    """Width and height of a mask, and why it is none."""
    try:
        with Image.open(path) as image:
            if image.mode in ("P", "L", "1"):
                return image.size, None
            return image.size, (
                f"{path}: is an image of mode {image.mode}, expected an 8-bit indexed or grey PNG "
                "of label ids (0 background, 1..n objects); map each colour to its id before scoring"
            )
    except (OSError, UnidentifiedImageError) as error:
        return (0, 0), f"{path}: cannot be read as an image: {error}"


def _pair_sequences(results: Path, ground_truth: Path, names: Sequence[str] | None) -> list[_Sequence]:
    """Every sequence to score with the paths of its masks; complains about all missing files at once."""
    for argument, folder in (("RESULTS", results), ("GROUND_TRUTH", ground_truth)):
        if not folder.is_dir():
            raise EvaluationError(f"{argument} must be a folder, {folder} is not one")
    gt_folders = _ground_truth_folders(ground_truth, names)
    pairs, missing_sequences, missing_frames = [], [], []
    for name, gt_folder in gt_folders.items():
        gt_masks = sorted(gt_folder.glob("*.png"))
        if len(gt_masks) < 3:
            raise EvaluationError(
                f"{gt_folder}: has {len(gt_masks)} mask PNGs; at least 3 are needed, since the first and the "
                "last frame are not scored"
            )
        folder = results / name
        if not folder.is_dir() and len(gt_folders) == 1 and _holds_masks(results):
            folder = results
        if not folder.is_dir():
            missing_sequences.append(name)
            continue
        masks = [folder / path.name for path in gt_masks]
        missing = [path.stem for path in masks[1:-1] if not path.is_file()]
        if missing:
            count = f"{len(missing)} of {len(masks) - 2} scored frames"
            hint = f"; did you mean {folder / 'masks'}?" if any(folder.glob("masks/*.png")) else ""
            missing_frames.append(f"{folder}: no mask for {count}: {_shorten(missing)}{hint}")
        pairs.append(_Sequence(name, gt_masks, masks))
    if missing_sequences:
        count = f"{len(missing_sequences)} of {len(gt_folders)} sequence{'s' * (len(gt_folders) > 1)}"
        message = f"{results}: no folder for {count}: {_shorten(missing_sequences)}"
        if not any(results.glob("*/*.png")) and not any(results.glob("*.png")):
            message += f"; there are no PNGs in {results} or its subfolders"
        missing_frames.insert(0, message)
    if missing_frames:
        raise EvaluationError(_shorten(missing_frames, "\n"))
    return pairs


def _holds_masks(folder: Path) -> bool:
    # `vosops segment` writes into `masks`; pointing at its parent is answered with that hint.
    return any(folder.glob("*.png")) or any(folder.glob("masks/*.png"))


def _ground_truth_folders(root: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Sequence name -> folder of its ground truth."""
    annotations = root / "Annotations" / "480p"
    if annotations.is_dir():
        listed = root / "ImageSets" / "2017" / "val.txt"
        if names is None and listed.is_file():
            names = listed.read_text(encoding="utf-8").split()
        root = annotations
    elif any(root.glob("*.png")):
        found = {root.resolve().name: root}
        return found if names is None else _select(found, names, root)
    found = {folder.name: folder for folder in sorted(root.iterdir()) if any(folder.glob("*.png"))}
    if not found:
        raise EvaluationError(
            f"{root}: has no PNGs; expected a folder of sequences (<sequence>/00000.png), a DAVIS root "
            "(Annotations/480p/<sequence>) or the folder of one sequence's masks"
        )
    return found if names is None else _select(found, names, root)


def _select(found: dict[str, Path], names: Sequence[str], root: Path) -> dict[str, Path]:
    if not names:
        raise EvaluationError("sequences must name at least one sequence, got none")
    unknown = [name for name in names if name not in found]
    if unknown:
        raise EvaluationError(
            f"{root}: has no ground truth for {_shorten(unknown)}; it has {_shorten(list(found))}"
        )
    return {name: found[name] for name in names}


def _shorten(entries: Sequence[object], separator: str = ", ") -> str:
    text = separator.join(str(entry) for entry in entries[:_SHOWN])
    more = len(entries) - _SHOWN
    return f"{text}{separator}and {more} more" if more > 0 else text
