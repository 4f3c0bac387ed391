# SPDX-License-Identifier: Apache-2.0
"""The GPU's part of the benchmarks that needs no GPU: names, jobs, floors, targets from a stand-in's rows."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import gpu, measure, memory_read, run
from benchmarks.case import Settings
from benchmarks.memory_read import OPERATOR, MemoryReadCase
from benchmarks.shapes import MEMORY_READ

ROOT = Path(__file__).parents[2]


def row(shape: str, implementation: str, ms: float, **changes: Any) -> dict[str, Any]:
    """A flat row as a GPU session writes it."""
    filled = run.Row(
        operator="memory_read",
        shape=shape,
        facts={"queries": 1620, "memory": 16200},
        dtype="bfloat16",
        layout="channel_major",
        direction="forward",
        implementation=implementation,
        ms=ms,
        p20_ms=ms,
        p80_ms=ms,
        graph_ms=ms / 2,
        repeats=9,
        extra_mib=100.0,
        error=1e-3,
        tolerance=0.1,
        correct=True,
        limit_ms=0.05,
        limit_basis="a stand-in",
    )
    return dataclasses.replace(filled, **changes).flat()


def stand_in(ours_ms: float = 0.2) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("bfloat16", "float16", "float32"):
        for shape in ("xmem-cap-o1", "stcn-t20-o3"):
            rows += [row(shape, "vosops", ours_ms, dtype=dtype), row(shape, "eager", 4.0, dtype=dtype)]
            rows += [row(shape, "compiled", 2.0, dtype=dtype)]
    for shape in ("stcn-t10-o1-dense", "stm-t10-o2", "kmn-t10-o1"):
        rows += [row(shape, "vosops", ours_ms), row(shape, "sdpa", 0.9), row(shape, "flex", 0.5)]
    for shape in ("stcn-t10-o1", "stm-t10-o2"):
        for name, ms in (("vosops", 1.0), ("eager", 5.0)):
            rows.append(row(shape, name, ms, direction="forward+backward"))
    return [*rows, row("xmem-1080p", "vosops", 2.0)]


def test_targets_that_are_met() -> None:
    entries = gpu.targets(stand_in())
    assert len(entries) == 18
    assert all(entry.met for entry in entries), [entry for entry in entries if not entry.met]
    first = entries[0]
    assert first.what == "xmem-cap-o1, bfloat16: eager / vosops"
    assert (first.wanted, first.measured, first.graph) == (">= 10", pytest.approx(20), pytest.approx(20))
    floor = next(entry for entry in entries if "floor" in entry.what)
    assert floor.measured == pytest.approx(4.0), "plain calls launch"
    assert floor.graph == pytest.approx(2.0), "what counts for the floor"
    dense = next(entry for entry in entries if "sdpa or flex" in entry.what)
    assert dense.measured == pytest.approx(2.5), "the faster of the two"


def test_targets_that_are_missed_wrong_or_not_measured() -> None:
    entries = gpu.targets(stand_in(ours_ms=0.6))
    assert not entries[0].met
    wrong = [{**r, "correct": False} if r["implementation"] == "vosops" else r for r in stand_in()]
    assert not any(entry.met for entry in gpu.targets(wrong))
    nothing = gpu.targets([row("another", "vosops", 1.0)])
    assert len(nothing) == 18
    assert gpu.targets([]) == []
    assert all(entry.measured is None and not entry.met for entry in nothing)
    large = [{**r, "extra_mib": 954.0} if r["shape"] == "xmem-1080p" else r for r in stand_in()]
    assert not gpu.targets(large)[-1].met
    failed = [{**r, "ms": None} if r["implementation"] == "eager" else r for r in stand_in()]
    assert gpu.targets(failed)[0].measured is None


def test_table_of_targets() -> None:
    stream = io.StringIO()
    rows = [r for r in stand_in() if r["shape"] != "kmn-t10-o1"]
    Console(file=stream, width=120).print(gpu.targets_table(gpu.targets(rows)))
    text = stream.getvalue()
    assert "xmem-cap-o1, bfloat16: eager / vosops" in text
    assert ">= 10" in text
    assert "20.00" in text
    assert "ok" in text
    assert "not measured" in text


def test_targets_of_a_results_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory_read-h200.json"
    about = dict.fromkeys(("cpu", "isa", "threads", "torch", "revision", "date"), "stand-in")
    about["gpu"] = "NVIDIA H200"
    rows = [{**r, "ratio": r["ms"] / 0.2} for r in stand_in()[:9]]
    path.write_text(json.dumps({"environment": about, "rows": rows}))
    gpu.main([path, path])
    text = capsys.readouterr().out
    assert text.startswith("NVIDIA H200, memory_read-h200: 9 rows")
    assert text.count("targets on a GPU") == 2
    assert (tmp_path / "memory_read-h200-ratios-other.png").exists(), (
        "drawn anew: a cut run has drawn nothing"
    )
    assert "stm-t10-o2, bfloat16: sdpa or flex / vosops" in text


def test_names_of_files() -> None:
    assert gpu.short_name("NVIDIA H200") == "h200"
    assert gpu.short_name("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
    assert gpu.short_name("NVIDIA GeForce RTX 4090") == "rtx-4090"


def test_results_of_a_gpu_carry_their_targets(tmp_path: Path) -> None:
    rows = [
        run.Row(
            "memory_read",
            "xmem-cap-o1",
            {"queries": 4},
            "bfloat16",
            "channel_major",
            "forward",
            name,
            ms=ms,
            ratio=ms,
            correct=True,
            limit_ms=0.5,
        )
        for name, ms in (("vosops", 1.0), ("eager", 20.0), ("vosops_cuda", 0.8))
    ]
    about = dict.fromkeys(("cpu", "isa", "threads", "torch", "revision", "date"), "stand-in")
    target = tmp_path / "memory_read-h200.json"
    written = run.write(rows, {**about, "gpu": "NVIDIA H200"}, target)
    assert [path.name for path in written][:2] == ["memory_read-h200.json", "memory_read-h200.csv"]
    assert any(path.suffix == ".png" for path in written), "forced backends have colours too"
    assert json.loads(target.read_text())["targets"][0]["met"] is True
    assert run.write(rows, {**about, "gpu": None}, target, plots=False)[1:] == [target.with_suffix(".csv")]
    assert "targets" not in json.loads(target.read_text())


def test_jobs_name_what_there_is() -> None:
    there = {*OPERATOR.implementations, *OPERATOR.cuda_implementations}
    jobs = [(job, shape) for job in OPERATOR.cuda_everything for shape in job.shapes]
    for job, shape in jobs:
        assert shape in MEMORY_READ
        assert set(job.implementations) <= there
        assert "vosops" in job.implementations
    assert not {*OPERATOR.implementations} & {*OPERATOR.cuda_implementations}
    measured = {(shape, j.settings.dtype, j.settings.backward) for j, shape in jobs}
    for shape in memory_read.MEMORY_READ_GROUPS["standard"]:
        assert (shape, "bfloat16", False) in measured
    assert run.select_peers(OPERATOR, ["vosops_cuda", "eager"], "cuda") == ["vosops", "eager", "vosops_cuda"]
    with pytest.raises(ValueError, match="--peer must be one of eager, .*got 'vosops_cuda'"):
        run.select_peers(OPERATOR, ["vosops_cuda"], "cpu")


class OnGpu(MemoryReadCase):
    """A case that believes to be on a GPU, for the arithmetic only."""

    def __init__(self, shape: str, **settings: Any) -> None:
        self.shape = MEMORY_READ[shape]
        self.settings = Settings(device=torch.device("cuda"), **settings)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = measure.Ceilings(product=5e14, peak=7.9e14, copy=4.3e12)
    monkeypatch.setattr(measure, "ceilings", lambda *args: rates)


def test_floor_of_a_top_k_read_is_its_bytes(h200: None) -> None:
    milliseconds, words = OnGpu("stcn-t10-o1", dtype="bfloat16").limit_ms()
    elements = (1620 + 16200) * 64 + 16200 * 512 + 1620 * 512
    assert milliseconds == pytest.approx(1e3 * 2 * elements / 4.3e12)
    assert words.startswith("max of 3.4 GFLOP at 790 TFLOP/s and 20 MiB at 4.30 TB/s")
    double, _ = OnGpu("stcn-t10-o1", dtype="float32").limit_ms()
    assert double == pytest.approx(2 * milliseconds)


def test_floor_of_a_dense_read_is_its_operations(h200: None) -> None:
    milliseconds, _ = OnGpu("stm-t10-o2", dtype="bfloat16").limit_ms()
    assert milliseconds == pytest.approx(1e3 * 2 * 2 * 1620 * 16200 * (128 + 512) / 7.9e14)
    backward, _ = OnGpu("stm-t10-o2", dtype="bfloat16", backward=True).limit_ms()
    assert backward > 2.5 * milliseconds


def test_rows_gathered_are_counted_once_at_most(h200: None) -> None:
    """1080p keeps 30 x 8160 rows of 83,440: no more than all of them are read."""
    milliseconds, _ = OnGpu("xmem-1080p", dtype="bfloat16").limit_ms()
    operations = 2 * 8160 * 83440 * 64 * 2 / 7.9e14
    assert milliseconds == pytest.approx(1e3 * operations)


def test_what_raises_is_reported_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(memory_read._READS, "eager", broken)
    shape = "stcn-240p-t5-o1"
    arguments = (OPERATOR, shape, ("vosops", "eager"), Settings())
    rows = run.measure_case(*arguments, repeats=1, keep_going=True)
    assert rows[0].ms is not None
    assert rows[0].graph_ms is None
    assert rows[1].ms is None
    assert rows[1].note == "failed: RuntimeError: no kernel image"
    with pytest.raises(RuntimeError, match="no kernel image"):
        run.measure_case(*arguments, repeats=1)


def test_the_session_fits_its_ten_minutes() -> None:
    script = ROOT / "benchmarks" / "gpu_session.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    text = script.read_text()
    plan = dict(re.findall(r"^  ([a-z_-]+)=(\d+)$", text, re.MULTILINE))
    assert {f"benchmark-{name}" for name in run.OPERATORS} <= set(plan)
    total = re.search(r"^readonly total=(\d+)", text, re.MULTILINE)
    assert total is not None
    assert sum(map(int, plan.values())) <= int(total[1]) <= 560, "ten minutes, tables and plots included"


def test_a_session_of_chosen_steps(tmp_path: Path) -> None:
    """With an interpreter that does nothing: what runs, in which order, and where the logs are."""
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nif [ "$1" = - ]; then echo {} >"$2/$3-h200.json"; fi\necho "ran $*"\n')
    fake.chmod(0o755)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "identity-old.json").touch()

    def session(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ROOT / "benchmarks" / "gpu_session.sh"), str(tmp_path / "out"), *arguments],
            capture_output=True,
            text=True,
            env={"PATH": os.environ["PATH"], "PYTHON": str(fake)},
        )

    done = session("tests-triton", "benchmark-identity")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "benchmark-identity.log",
        "identity-h200.json",
        "identity-old.json",
        "tests-triton.log",
    ]
    assert re.search(r"== benchmark-identity \(at most 5\d\d s", done.stdout), (
        "a step may use what is left of the session"
    )
    assert f"ran -m benchmarks.gpu {tmp_path}/out/identity-h200.json\n" in done.stdout, "not the old one"
    assert "== build" not in done.stdout
    wrong = session("build", "tests")
    assert wrong.returncode == 2
    assert "no step 'tests'" in wrong.stderr
