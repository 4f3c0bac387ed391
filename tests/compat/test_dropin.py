# SPDX-License-Identifier: Apache-2.0
"""The drop-in benchmark: its clip, its arguments and its table; test_checkouts runs the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
typer_testing = pytest.importorskip("typer.testing")

import typer  # noqa: E402

from benchmarks import dropin  # noqa: E402
from benchmarks.peers import checkouts  # noqa: E402


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(dropin.main)
    return typer_testing.CliRunner().invoke(app, arguments)


def test_the_clip_moves_its_objects_and_is_the_same_every_time() -> None:
    clip = checkouts.moving_clip(3, (64, 96), 3)
    assert clip.frames.shape == (3, 3, 64, 96)
    assert clip.masks.shape == (3, 64, 96)
    assert clip.masks.sum(0).max() == 1  # no pixel in two objects
    assert clip.masks.flatten(1).sum(1).min() > 100
    assert not torch.equal(clip.frames[0], clip.frames[1])
    assert torch.equal(clip.frames, checkouts.moving_clip(3, (64, 96), 3).frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "--model must be of xmem, xmem-long"),
        ((), "got none"),
        (("--model", "stm", "--frames", "1"), "--frames from 3"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = invoke("--peers", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_missing_checkout_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkout STCN"):
        checkouts.Checkout("stcn", tmp_path)
    with pytest.raises(ValueError, match="name must be one of xmem"):
        checkouts.Checkout("STCN", tmp_path)


def test_the_table_says_what_is_not_equal() -> None:
    row: dict[str, Any] = {
        "model": "stcn",
        "filled_frames": 19,
        "published_s_per_frame": 2.0,
        "vosops_s_per_frame": 1.0,
        "speedup": 2.0,
        "published_peak_bytes": None,
        "vosops_peak_bytes": 2**20,
        "mask_agreement": 0.99,
        "largest_difference": 1e-3,
        "own_largest_difference": 2e-5,
        "equal": False,
    }
    table = dropin.table([row])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:6] == ["stcn t19", "0.500", "1.000", "2.00", "", "1"]
    assert cells[-4:] == ["99.0000%", "1e-03", "2e-05", "[red]✗[/]"]


@pytest.mark.parametrize(
    ("after", "noisy", "equal"),
    [(5e-5, 0.0, True), (2e-3, 0.0, False), (2e-3, 5e-3, True), (2e-3, 1e-3, False)],
)
def test_the_published_codes_own_sensitivity_is_the_measure(after: float, noisy: float, equal: bool) -> None:
    before = torch.full((4, 8, 8), 0.25)

    def run(change: float) -> dict[str, Any]:
        probabilities = before.clone()
        probabilities[1, 3, 3] += change
        return {"probabilities": probabilities, "masks": before.argmax(0)}

    found = dropin._compared(run(0.0), run(after), run(noisy))
    assert found["equal"] is equal
    assert found["mask_agreement"] == 1
