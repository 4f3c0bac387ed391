# SPDX-License-Identifier: Apache-2.0
"""Tiny runs on rendered clips; `python -m tests.training.runs CONFIG FILE` writes the gradients of one."""

import sys
from pathlib import Path

import torch
from rich.console import Console

from vosops.data.rendered_clip import render_clip, write_clip
from vosops.training import loop
from vosops.training.config import load_config
from vosops.training.record import read_log
from vosops.training.settings import build, override


def write_clips(folder):
    """Two rendered clips of two objects and one, in the DAVIS layout."""
    for scene in ("passing", "pillar"):
        write_clip(render_clip(6, (120, 200), scene=scene), folder)


def tiny_config(run, data, *assignments, model="stcn_tiny"):
    """A run of some seconds; `data` is of `write_clips`."""
    values = {
        "run": str(run),
        "model": {"name": model},
        "data": {
            "sources": [{"layout": "davis", "path": str(data), "max_gap": 1}],
            "clips_per_epoch": 6,
            "merge": 0.0,
        },
        "loss": {"kind": "aot" if model == "aot_tiny" else "stcn", "hard_fraction": 1.0},
        "optim": {"lr": 1e-3, "encoder_lr": 1.0},
        "aot": {"reference": 0.0},
        "steps": 8,
        "batch": 2,
        "frames": 3,
        "crop": 64,
        "workers": 0,
        "threads": 1,
        "log_every": 1,
        "overlay_every": 1000,
        "checkpoint_every": 3,
    }
    return build(loop.TrainConfig, override(values, assignments))


def train(config, **options):
    """`vosops.training.loop.train` without a word."""
    return loop.train(config, console=Console(quiet=True), **options)


def losses(run, *columns):
    """The log's columns (the loss by default), as text: equal only if every bit is."""
    return [tuple(row[name] for name in columns or ("loss", "gradient_norm")) for row in read_log(run)]


def first_gradients(config):
    """The gradients of a run's first step, by name; those of all processes together."""
    run = loop._Run(config, False, Console(quiet=True))
    loss, _ = run._forward(next(run.batches.since(0)), 0.0)
    run.accelerator.backward(loss.total)
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return gradients if run.accelerator.is_main_process else None


if __name__ == "__main__":
    found = first_gradients(load_config(Path(sys.argv[1])))
    if found is not None:
        torch.save(found, sys.argv[2])
