# SPDX-License-Identifier: Apache-2.0
"""Whole data sets: what is written and scored, what goes on after a stop, and several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vosops.data import read_labels
from vosops.evaluation import evaluate_folders
from vosops.propagate import LabelPropagator
from vosops.recipes import DatasetError, Member, Pipeline, Processes, Recipe, run_dataset
from vosops.recipes.recipe import dump

from .clips import labels, write_davis, write_youtube

CLIPS = {"ant": 6, "bee": 50, "cat": 24}
RECIPE = Recipe((Member("propagate", options={"stride": 4}),))


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("davis"), CLIPS)


@pytest.fixture(scope="module")
def whole(davis, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(davis, out)


def run(data, out, recipe=RECIPE, **options):
    return run_dataset(Pipeline(recipe), data, out, Processes(), **options)


def files(out):
    """Every file but the measurements, by name."""
    kept = [path for path in sorted(out.rglob("*")) if path.is_file()]
    kept = [path for path in kept if path.name not in ("speed.json", "report.json")]
    return {str(path.relative_to(out)): path.read_bytes() for path in kept}


def test_masks_scores_and_report(davis, whole):
    out, report = whole
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted(CLIPS)
    for name, count in CLIPS.items():
        names = [f"{number:05d}.png" for number in range(count)]
        assert sorted(path.name for path in (out / name / "masks").iterdir()) == names
        assert np.array_equal(read_labels(out / name / "masks/00000.png"), labels(0))
    again = out.parent / "plain"
    for name in CLIPS:
        (again / name).mkdir(parents=True)
        for mask in (out / name / "masks").iterdir():
            (again / name / mask.name).symlink_to(mask)
    expected = evaluate_folders(again, davis)
    assert report.scores.global_row() == expected.global_row()
    assert expected.jf_mean > 0.7
    assert report.sequences == len(CLIPS)
    assert report.frames == sum(CLIPS.values())
    assert report.fps > 0
    assert 50e6 < report.peak_bytes < 20e9
    saved = json.loads((out / "report.json").read_text())
    assert saved["scores"] == expected.global_row()
    assert [row["sequence"] for row in saved["sequences"]] == sorted(CLIPS)
    assert (out / "global_results.csv").is_file()


def test_the_same_call_does_nothing_and_another_is_refused(davis, whole, monkeypatch):
    out, report = whole
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(LabelPropagator, "step", None)
        again = run(davis, out)
    assert replace(again, scores=None) == replace(report, scores=None)
    assert again.scores.global_row() == report.scores.global_row()
    assert files(out) == before
    other = Recipe((Member("propagate", options={"stride": 4}, top_k=3),), max_size=64)
    with pytest.raises(ValueError, match=r"other settings .*:\nmax_size: None, 64\n.*top_k: None, 3"):
        run(davis, out, other)
    with pytest.raises(ValueError, match=r"is not empty and holds no dataset\.json"):
        run(davis, out / "ant")
    (out.parent / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write to .*file"):
        run(davis, out.parent / "file")


def test_sequences_are_chosen_and_more_may_follow(davis, whole, tmp_path):
    report = run(davis, tmp_path / "out", sequences=["ant"])
    assert [score.name for score in report.scores.sequences] == ["ant"]
    run(davis, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole[0])


def test_probabilities_are_saved_for_an_ensemble(davis, whole, tmp_path):
    run(davis, tmp_path / "a", sequences=["ant"], save_probabilities=True)
    assert len(list((tmp_path / "a/ant/probabilities").glob("*.npz"))) == CLIPS["ant"]
    run(davis, tmp_path / "b", Recipe((Member(probabilities=tmp_path / "a"),)), sequences=["ant"])
    for number in range(CLIPS["ant"]):
        saved, direct = (read_labels(x / f"ant/masks/{number:05d}.png") for x in (tmp_path / "b", whole[0]))
        assert (saved == direct).mean() > 0.999


def test_a_sequence_that_fails_does_not_stop_the_others(davis, whole, tmp_path):
    data = tmp_path / "data"
    write_davis(data, CLIPS)
    broken = data / "JPEGImages/480p/bee/00006.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:100])
    with pytest.raises(DatasetError, match="1 of 3 sequences failed; run the same again") as error:
        run(data, tmp_path / "out")
    assert [line[:17] for line in error.value.failures] == ["bee: frame 00006 "]
    assert (tmp_path / "out/cat/score.json").is_file()
    assert not (tmp_path / "out/report.json").exists()
    broken.write_bytes(good)
    run(data, tmp_path / "out")
    assert files(tmp_path / "out") == files(whole[0])


def test_youtube_vos_has_objects_that_enter_later(tmp_path):
    data = write_youtube(tmp_path / "data", given={2: (2,), 4: (1, 2)})
    report = run(data, tmp_path / "out")
    assert report.scores is None
    found = [read_labels(tmp_path / f"out/0a49f5265b/masks/{5 * n:05d}.png") for n in range(8)]
    assert [sorted(set(np.unique(mask)) - {0}) for mask in found] == [[]] * 2 + [[2]] * 2 + [[1, 2]] * 4
    assert np.array_equal(found[4] == 1, labels(4) == 1)
    overlap = ((found[7] == 1) & (labels(7) == 1)).sum() / ((found[7] == 1) | (labels(7) == 1)).sum()
    assert overlap > 0.7
    assert json.loads((tmp_path / "out/report.json").read_text())["scores"] is None


def test_a_killed_run_goes_on_to_the_same_files(davis, whole, tmp_path):
    config, out = tmp_path / "recipe.yaml", tmp_path / "out"
    config.write_text(dump(RECIPE))
    command = [sys.executable, "-m", "vosops", "dataset", "run", davis, "--recipe", config, "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    # In the longest sequence, behind the first state that it saved.
    while process.poll() is None and not (out / "bee/masks/00013.png").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert not (out / "bee/score.json").exists()
    run(davis, out)
    assert files(out) == files(whole[0])


def test_two_processes_give_the_files_of_one(davis, whole, tmp_path):
    config, out = tmp_path / "recipe.yaml", tmp_path / "out"
    config.write_text(dump(RECIPE))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = ["-m", "vosops", "dataset", "run", str(davis), "--recipe", str(config), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("3 sequences in") == 1  # one report, of one process
    assert files(out) == files(whole[0])
    workers = {name: json.loads((out / name / "speed.json").read_text())["process"] for name in CLIPS}
    assert workers == {"bee": 0, "cat": 1, "ant": 1}


def test_processes_of_torchrun(monkeypatch):
    assert (Processes().rank, Processes().count) == (0, 1)
    assert Processes().gather("word") == ["word"]
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (Processes().rank, Processes().count) == (3, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ValueError, match=r"RANK must lie in 0 \.\. WORLD_SIZE - 1 = 3, got 4"):
        Processes()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK must be a number, as torchrun sets it, got 'first'"):
        Processes()


DATA = Path(os.environ.get("VOSOPS_DATA", "../shared/data"))


@pytest.mark.skipif(not (DATA / "JPEGImages").is_dir(), reason="needs real clips: VOSOPS_DATA")
def test_real_clips(tmp_path):
    """Two short pieces of real sequences, reduced, come out scored."""
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for name in ("camel", "libby"):
            folder = tmp_path / "data" / kind / "480p" / name
            folder.mkdir(parents=True)
            for number in range(5):
                file = f"{number:05d}.{suffix}"
                (folder / file).symlink_to((DATA / kind / "480p" / name / file).resolve())
    report = run(tmp_path / "data", tmp_path / "out", Recipe((Member("propagate"),), max_size=240))
    assert [score.name for score in report.scores.sequences] == ["camel", "libby"]
    assert report.scores.j.mean > 0.6
