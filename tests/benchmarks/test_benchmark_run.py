# SPDX-License-Identifier: Apache-2.0
"""The command line: table, JSON, CSV, plots, and what it says when something cannot run."""

from __future__ import annotations

import ast
import csv
import json
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import vosops
from benchmarks import measure, memory_read, plot, run
from benchmarks.case import Settings, relative_error
from benchmarks.shapes import MemoryReadShape
from vosops.cli.bench import bench

FIELDS = {
    *("operator", "shape", "batch", "queries", "memory", "key_channels", "value_channels", "objects"),
    *("top_k", "similarity", "prior_sigma", "dtype", "layout", "direction", "implementation"),
    *("ms", "p20_ms", "p80_ms", "graph_ms", "repeats", "ratio", "extra_mib", "error", "tolerance", "correct"),
    *("limit_ms", "limit_basis", "over_limit", "note"),
}
ENVIRONMENT = {
    *("cpu", "isa", "cores", "threads", "gpu", "driver", "python", "torch", "triton", "vosops"),
    *("backends", "revision", "date"),
}
ACTIVE = ["--peer", "eager", "--peer", "smart_eager", "--peer", "sdpa"]


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    """Shapes small enough for a test, in place of the standard ones."""
    tiny = [
        MemoryReadShape(f"stcn-t{t}-o1", "test", 40 * t, 8, 4, 1, 5, similarity="l2", grid=(5, 8))
        for t in (1, 2, 10)
    ]
    tiny.append(MemoryReadShape("kmn", "test", 80, 8, 4, sigma=1.5, grid=(5, 8)))
    tiny.append(MemoryReadShape("xmem", "test", 80, 8, 4, 2, 5, "l2", modulated=True, grid=(5, 8)))
    shapes = {shape.name: shape for shape in tiny}
    groups = {"standard": ("stcn-t10-o1", "kmn"), "frames": ("stcn-t1-o1", "stcn-t2-o1", "stcn-t10-o1")}
    operator = run.dataclasses.replace(
        memory_read.OPERATOR,
        shapes=tuple(shapes),
        groups=groups,
        everything=(
            run.Job(("kmn",), ("vosops", "eager")),
            run.Job(("stcn-t10-o1",), ("vosops", "eager"), Settings(backward=True)),
            run.Job(groups["frames"], ("vosops", "eager")),
        ),
    )
    monkeypatch.setattr(memory_read, "MEMORY_READ", shapes)
    monkeypatch.setattr(memory_read, "OPERATOR", operator)
    ceilings = measure.Ceilings(product=1e10, peak=2e10, copy=1e10)
    monkeypatch.setattr(measure, "ceilings", lambda *args: ceilings)


def _bench(*arguments: str):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner().invoke(app, ["memory_read", "--repeats", "3", *arguments])


def test_table_json_csv_and_plots(tmp_path):
    target = tmp_path / "new" / "result.json"
    done = _bench(*ACTIVE, "--shape", "frames", "--json", str(target))
    assert done.exit_code == 0, done.output
    assert "memory_read stcn-t10-o1: forward, float32, channel_major" in done.output
    assert "limit" in done.output
    assert "✓" in done.output

    result = json.loads(target.read_text())
    assert set(result["environment"]) == ENVIRONMENT
    assert result["environment"]["torch"] == torch.__version__
    assert len(result["rows"]) == 3 * 4
    for row in result["rows"]:
        assert set(row) == FIELDS
        assert row["correct"] is True
        assert row["error"] <= row["tolerance"]
        assert 0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        assert row["repeats"] == 3
        assert row["over_limit"] == pytest.approx(row["ms"] / row["limit_ms"])
    ours = {row["shape"]: row["ms"] for row in result["rows"] if row["implementation"] == "vosops"}
    assert all(row["ratio"] == pytest.approx(row["ms"] / ours[row["shape"]]) for row in result["rows"])

    with target.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert set(rows[0]) >= FIELDS | {"cpu", "isa", "threads", "torch", "revision", "date"}
    for name in ("result-frames.png", "result-ratios.png"):
        assert (target.parent / name).read_bytes().startswith(b"\x89PNG")
        assert name in done.output


def test_all_writes_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    done = _bench("--all")
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "memory_read.json",
        "memory_read.csv",
        "memory_read-frames.png",
        "memory_read-ratios.png",
        "memory_read-ratios-other.png",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("direction", [[], ["--backward"]])
def test_dtypes_and_directions(dtype, direction, tmp_path):
    target = tmp_path / "result.json"
    done = _bench(*ACTIVE, "--shape", "xmem", "--dtype", dtype, *direction, "--json", str(target))
    assert done.exit_code == 0, done.output
    rows = json.loads(target.read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["vosops", "eager", "smart_eager", "sdpa"]
    assert all(row["error"] < float("inf") for row in rows)
    assert rows[0]["correct"]


def test_position_major_is_a_view_of_positions_first():
    case = memory_read.OPERATOR.case("stcn-t2-o1", Settings(layout="position_major"), 0)
    assert case.inputs.memory_key.stride(1) == 1
    assert case.inputs.memory_value.movedim(-1, 1).is_contiguous()
    plain = memory_read.OPERATOR.case("stcn-t2-o1", Settings(), 0)
    assert plain.inputs.memory_value.is_contiguous()
    assert torch.equal(plain.inputs.memory_value, case.inputs.memory_value)


def test_reasons_for_what_does_not_run(monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda device: 50_000)
    rows = {}
    for shape in ("kmn", "stcn-t10-o1"):
        for row in run.measure_case(
            memory_read.OPERATOR,
            shape,
            run.select_peers(memory_read.OPERATOR, ACTIVE[1::2]),
            Settings(),
            repeats=1,
        ):
            rows[shape, row.implementation] = row
    assert rows["kmn", "smart_eager"].note == "n/a: a dense read has nothing to gather"
    assert rows["stcn-t10-o1", "eager"].note.startswith("n/a: needs 0.0 GB, 0.0 GB are free")
    assert rows["stcn-t10-o1", "eager"].ms is None
    assert "needs" in _text(run.table([rows["stcn-t10-o1", "vosops"], rows["stcn-t10-o1", "eager"]]))
    case = memory_read.OPERATOR.case("kmn", Settings(backward=True), 0)
    assert case.refuses("flex") == "FlexAttention has no backward on the CPU"
    low = memory_read.OPERATOR.case("kmn", Settings(dtype="bfloat16"), 0)
    assert "does not survive bfloat16" in low.refuses("sdpa")


def test_a_wrong_result_is_marked(monkeypatch):
    right = vosops.memory_read
    monkeypatch.setitem(memory_read._READS, "eager", lambda *args, **options: 1.01 * right(*args, **options))
    rows = run.measure_case(memory_read.OPERATOR, "stcn-t2-o1", ("vosops", "eager"), Settings(), repeats=1)
    assert [row.correct for row in rows] == [True, False]
    assert rows[1].error == pytest.approx(0.01, rel=0.01)
    assert "✗" in _text(run.table(rows))
    assert plot.ratio_groups([row.flat() for row in rows]) == {
        "stcn-t2-o1": {"eager": (rows[1].ratio, False)}
    }


def test_a_wrong_gradient_is_marked(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, key):
            return key.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    def wrong(query_key, memory_key, memory_value, **options):
        return vosops.memory_read(query_key, Halved.apply(memory_key), memory_value, **options)

    monkeypatch.setitem(memory_read._READS, "eager", wrong)
    case = memory_read.OPERATOR.case("stcn-t2-o1", Settings(backward=True), 0)
    assert case.error("eager") == pytest.approx(0.5, rel=0.01)
    assert case.error("vosops") <= case.tolerance()


def test_reference_on_a_subset_of_queries(monkeypatch):
    whole = memory_read.OPERATOR.case("stcn-t10-o1", Settings(backward=True), 0)
    assert whole._reference(dense=False).queries.numel() == 40
    monkeypatch.setattr(memory_read, "_REFERENCE_ELEMENTS", 8 * 400)
    part = memory_read.OPERATOR.case("stcn-t10-o1", Settings(backward=True), 0)
    assert part.error("vosops") <= part.tolerance()
    assert part.error("smart_eager") <= part.tolerance()
    assert part._reference(dense=False).queries.numel() == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "stm-t99"], "--shape must be one of"),
        (["--peer", "natten"], "--peer must be one of"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--layout", "frames_first"], "layout must be one of"),
        (["--device", "tpu"], "--device must be cpu"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--all", "--backward"], "--all chooses shapes"),
    ],
)
def test_bad_options(arguments, message):
    done = _bench(*arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_unknown_operator():
    with pytest.raises(ValueError, match="OPERATOR must be one of memory_read, .*, got 'conv'"):
        run.run("conv")


def test_installed_without_the_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["vosops.cli.bench"], "_ROOT", tmp_path)
    done = _bench()
    assert done.exit_code == 2
    assert "the benchmarks come with the source" in done.output


def test_nothing_in_the_wheel_imports_the_benchmarks():
    package = Path(vosops.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "benchmarks" for name in names), path


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.empty(0), torch.empty(0)) == 0


def _text(table) -> str:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    Console(file=stream, width=100).print(table)
    return stream.getvalue()
