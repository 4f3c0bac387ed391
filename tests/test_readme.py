# SPDX-License-Identifier: Apache-2.0
"""The README's example runs, its links exist, and its figures are those of the committed benchmarks."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def table(first_column: str) -> list[list[str]]:
    """Rows of the README's table whose header begins with `first_column`."""
    lines = iter(README.splitlines())
    for line in lines:
        if line.startswith(f"| {first_column} |"):
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len(rows) > 1, first_column
    return rows[1:]


def test_speed_figures() -> None:
    rows = json.loads((RESULTS / "memory_read.json").read_text())["rows"]
    measured = {
        (row["shape"], row["direction"], row["implementation"]): row
        for row in rows
        if (row["dtype"], row["layout"]) == ("float32", "channel_major")
    }

    def cell(shape: str, direction: str, implementation: str, field: str, form: str) -> str:
        value = measured.get((shape, direction, implementation), {}).get(field)
        return "" if value is None else form.format(value)

    for shape, direction, *figures in table("shape"):
        at = (shape.strip("`"), direction)
        expected = [cell(*at, peer, "ratio", "{:.1f}x") for peer in ("eager", "smart_eager", "sdpa")]
        expected += [cell(*at, name, "extra_mib", "{:.0f}") for name in ("vosops", "eager")]
        assert figures == expected, at


def test_segmentation_figures() -> None:
    means = json.loads((RESULTS / "propagation.json").read_text())["means"]
    for method, *figures in table("method"):
        expected = [f"{100 * means[f'{method}|single'][name]:.1f}" for name in ("j", "f", "jf")]
        union = means.get(f"{method}|multi")
        assert figures == [*expected, f"{100 * union['jf']:.1f}" if union else ""], method


def test_frame_figures() -> None:
    record = json.loads((RESULTS / "frames.json").read_text())
    measured = {
        (row["case"], row["implementation"]): row
        for row in record["rows"]
        if row["model"] in ("stcn", "xmem")
    }
    rows = table("frame")
    assert {row[0].strip("`") for row in rows} == {case for case, _ in measured}
    for case, *figures in rows:
        ours, published, eager_read = (
            measured[case.strip("`"), name] for name in ("vosops", "published", "eager_read")
        )
        expected = [str(ours["positions"]), str(ours["objects"])]
        expected += [f"{row['ratio']:.2f}x" for row in (published, eager_read)]
        assert figures == [*expected, f"{100 * ours['read_share']:.1f}%"], case
    (peak,) = (row for row in record["peak"] if row["model"] == "xmem")
    assert f"at its memory cap with three objects peaks at {peak['frame_peak_bytes'] / 1e9:.1f} GB" in README
    stages = {(row["stage"], row["dtype"]): row["ms"] for row in record["formats"] if "last" in row["layout"]}
    gains = [ms / stages[stage, "bfloat16"] for (stage, dtype), ms in stages.items() if dtype == "float32"]
    assert f"{min(gains):.1f} to {max(gains):.1f} times as fast" in README


def test_lstt_frame_figures() -> None:
    record = json.loads((RESULTS / "frames.json").read_text())
    measured = {
        (row["case"], row["implementation"], row["pages_kept"]): row
        for row in record["rows"]
        if "propagate_share" in row
    }
    rows = table("LSTT frame")
    assert {row[0].strip("`") for row in rows} == {case for case, *_ in measured}
    waited = []
    for case, *figures in rows:
        at = case.strip("`")
        ours = measured[at, "vosops", False]
        expected = [str(ours["positions"]), str(ours["objects"])]
        for peer in ("published", "published_sdpa"):
            plain, kept = (measured[at, peer, pages_kept] for pages_kept in (False, True))
            expected += [f"{row['ratio']:.2f}x" for row in (plain, kept)]
            waited.append(1 - kept["frame_ms"] / plain["frame_ms"])
        assert figures == [*expected, f"{100 * ours['propagate_share']:.1f}%"], case
    assert 0.3 < min(waited) < max(waited) < 0.7  # "a third to two thirds"
    (peak,) = (row for row in record["peak"] if row["model"] == "aotl")
    assert f"ten memory frames peaks at {peak['frame_peak_bytes'] / 1e9:.1f} GB" in README
    stored = peak["published_matrices_bytes"]
    assert f"would be {(stored['scores'] + stored['weights']) / 1e9:.1f} GB" in README


def test_lstt_figures() -> None:
    for shape, operator, *figures in table("LSTT shape"):
        rows = json.loads((RESULTS / f"{operator}.json").read_text())["rows"]
        measured = {
            row["implementation"]: row
            for row in rows
            if (row["shape"], row["dtype"], row["direction"]) == (shape.strip("`"), "float32", "forward")
        }

        def ratio(*names: str, among: dict = measured) -> str:
            known = [among[name]["ratio"] for name in names if name in among and among[name]["ratio"]]
            return f"{known[0]:.1f}x" if known else ""

        expected = [ratio("eager", "unfold"), ratio("dense_scatter", "smart_eager")]
        expected += [ratio("masked_dense"), ratio("sdpa"), f"{measured['vosops']['extra_mib']:.0f}"]
        assert figures == expected, shape
