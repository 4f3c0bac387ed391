# SPDX-License-Identifier: Apache-2.0
"""What a training step of STCN costs: `python -m benchmarks.run train-step`.

Forward and backward on clips of three frames at 384 x 384 with two objects, without the optimizer, each
implementation in a process of its own with the same weights and clips:

- vosops: the model's `forward`, as `vosops train` runs it;
- vosops_recompute: the same with `recompute: true`;
- published: the published formulas (`peers/stcn_step.py`): a dense affinity that autograd keeps, and objects
  joined with the image features they share before every convolution.

Weights are random: the cost does not depend on them. Tests hold the gradients of all three together.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vosops import models
from vosops.training.config import LossConfig
from vosops.training.losses import clip_loss
from vosops.training.recompute import recompute_blocks

from . import environment, measure
from .peers import stcn_step

RESULTS = Path(__file__).parent / "results" / "train_step.json"
IMPLEMENTATIONS = ("vosops", "vosops_recompute", "published")
FRAMES, OBJECTS = 3, 2
_CPU = torch.device("cpu")


def make_step(implementation: str, batch: int, size: int, device: torch.device = _CPU) -> tuple[Any, Any]:
    """A training step and its model, drawn from seed 0.

    Args:
        implementation: of `IMPLEMENTATIONS`.
        batch, size: clips, and their sides in pixels, a multiple of 16.
        device: where it runs.

    Returns:
        (step, model): step() does a forward and backward pass and returns the loss; gradients are new ones.
    """
    torch.manual_seed(0)
    model: Any = models.create("stcn").to(device).train()
    with torch.no_grad():
        for parameter in model.parameters():  # features keep their size from layer to layer
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    if device.type == "cpu":  # what `vosops train` does
        model = model.to(memory_format=torch.channels_last)
    if implementation == "vosops_recompute":
        recompute_blocks(model)
    frames = torch.rand(batch, FRAMES, 3, size, size, device=device)
    coarse = torch.randint(0, OBJECTS + 1, (batch, FRAMES, size // 16, size // 16), device=device)
    labels = coarse.repeat_interleave(16, 2).repeat_interleave(16, 3)
    masks = torch.stack([(labels[:, 0] == i).float() for i in range(1, OBJECTS + 1)], 1)
    objects = torch.full((batch,), OBJECTS)
    forward: Callable[[Tensor, Tensor], Tensor] = model
    if implementation == "published":
        forward = lambda *clip: stcn_step.forward(model, *clip)  # noqa: E731

    def step() -> float:
        model.zero_grad(set_to_none=True)
        logits = forward(frames, masks)
        loss = clip_loss(logits, labels[:, 1:], objects, LossConfig("stcn"), 0.0).total
        loss.backward()
        return loss.item()

    return step, model


def measure_one(implementation: str, batch: int, size: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and bytes of one implementation, in this process.

    `peak_bytes` is the most that a step held beyond weights and clips: activations, gradients, scratch.
    """
    step, model = make_step(implementation, batch, size)
    loss = step()  # the first call fills caches
    timing = measure.interleaved({"step": step}, _CPU, repeats=repeats, budget_s=120)["step"]
    model.zero_grad(set_to_none=True)
    return {
        "implementation": implementation,
        "batch": batch,
        "size": size,
        "frames": FRAMES,
        "objects": OBJECTS,
        "loss": loss,
        "ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "repeats": timing.repeats,
        "peak_bytes": measure.peak_extra_bytes(step, _CPU),
    }


def _in_process(implementation: str, batch: int, size: int, repeats: int, threads: int) -> dict[str, Any]:
    options = {"--one": implementation, "--batch": batch, "--size": size, "--repeats": repeats}
    command = [sys.executable, "-m", "benchmarks.train_step", "--threads", str(threads)]
    for name, value in options.items():
        command += [name, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{implementation}, batch {batch}, failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one batch size."""
    first = rows[0]
    title = (
        f"STCN, forward + backward, {first['batch']} x {FRAMES} frames of {first['size']} x {first['size']}"
    )
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("")
    for name in ("ms", "x vosops", "peak MiB", "x vosops"):
        result.add_column(name, justify="right")
    for row in rows:
        peak, ours = row["peak_bytes"], first["peak_bytes"]
        known = peak is not None and ours is not None
        result.add_row(
            row["implementation"],
            f"{row['ms']:.0f}",
            f"{row['ms'] / first['ms']:.2f}",
            f"{peak / 2**20:.0f}" if known else "not known",
            f"{peak / ours:.2f}" if known else "",
        )
    return result


def main(
    batch: Annotated[
        list[int] | None, typer.Option(help="Clips in a step; repeatable. Default: 1 and 4.")
    ] = None,
    size: Annotated[int, typer.Option(help="Sides of the frames, pixels, a multiple of 16.")] = 384,
    repeats: Annotated[int, typer.Option(help="Timed steps; medians are reported.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--json", help="Write this JSON file; --all: the one in benchmarks/results."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Write benchmarks/results/train_step.json.")
    ] = False,
    one: Annotated[str | None, typer.Option(help="Print one implementation, in this process.")] = None,
) -> None:
    """Time a training step of STCN against the published formulas."""
    batches = batch or [1, 4]
    for name, value in (("--batch", min(batches)), ("--repeats", repeats), ("--threads", threads or 1)):
        if value < 1:
            raise typer.BadParameter(f"{name} must be at least 1, got {value}")
    if size < 32 or size % 16:
        raise typer.BadParameter(f"--size must be a multiple of 16, at least 32, got {size}")
    if one is not None and one not in IMPLEMENTATIONS:
        raise typer.BadParameter(f"--one must be one of {', '.join(IMPLEMENTATIONS)}, got {one}")
    if threads is not None:
        torch.set_num_threads(threads)
    if one is not None:
        print(json.dumps(measure_one(one, batches[0], size, repeats)))
        return
    console = Console()
    record: dict[str, Any] = {"environment": environment.collect(_CPU), "rows": []}
    for number in batches:
        rows = [_in_process(name, number, size, repeats, torch.get_num_threads()) for name in IMPLEMENTATIONS]
        record["rows"] += rows
        console.print(table(rows))
    target = output or (RESULTS if everything else None)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {target}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
