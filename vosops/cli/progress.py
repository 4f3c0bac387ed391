# SPDX-License-Identifier: Apache-2.0
"""The progress bar of commands that work through many files."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, shown: bool = True) -> Progress:
    """Done of all and the time left, gone at the end; nothing where there is no terminal, or not `shown`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    )
