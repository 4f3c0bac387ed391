# SPDX-License-Identifier: Apache-2.0
"""`vosops models`: the models that `vosops segment --model` knows."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

from vosops.models import MODELS, ModelInfo
from vosops.models.registry import shipped_weights


def models() -> None:
    """List the models: source, parameters, operators used, checkpoint read."""
    # Piped output is for logs and scripts: one line per model that does not wrap at 80 columns.
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else 240)
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("source")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("operators used")
    table.add_column("checkpoint it reads")
    for info in MODELS.values():
        shipped = "" if shipped_weights(info.name) is None else "; comes with weights"
        operators = ", ".join(info.operators)
        table.add_row(info.name, info.source, _parameters(info), operators, info.checkpoint + shipped)
    console.print(table, markup=False, highlight=False)


def _parameters(info: ModelInfo) -> str:
    try:
        return f"{info.parameters() / 1e6:.1f} M"
    except ImportError as error:
        return str(error)
