# SPDX-License-Identifier: Apache-2.0
"""What `enable()` tells: every piece of published code it knows, whether it was replaced, and why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Entry:
    """One piece of published code.

    name: as the published code calls it, "MemoryManager.match_memory".
    modules: the modules where it was replaced; functions are, wherever they were imported by name.
    reason: why it was not replaced; None if it was.
    """

    name: str
    modules: tuple[str, ...]
    reason: str | None


class Report:
    """The result of `enable()`, and a context manager that undoes what that call replaced.

    Args:
        code_base: whose code, "XMem".
        entries: one per piece, in the order in which the code base lists them.
        undo: puts back what this call replaced; called by leaving the context.

    Example:
        >>> with vosops.compat.xmem.enable() as report:
        ...     print(report)
    """

    def __init__(self, code_base: str, entries: tuple[Entry, ...], undo: Callable[[], None]) -> None:
        self.code_base = code_base
        self.entries = entries
        self._undo = undo

    @property
    def replaced(self) -> dict[str, tuple[str, ...]]:
        """Name -> modules where vosops stands in its place, by this call or an earlier one."""
        return {entry.name: entry.modules for entry in self.entries if entry.reason is None}

    @property
    def kept(self) -> dict[str, str]:
        """Name -> why it was left as published."""
        return {entry.name: entry.reason for entry in self.entries if entry.reason is not None}

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()

    def __str__(self) -> str:
        lines = [f"vosops in {self.code_base}: {len(self.replaced)} of {len(self.entries)} pieces"]
        for entry in self.entries:
            if entry.reason is None:
                lines.append(f"  replaced  {entry.name} ({', '.join(entry.modules)})")
            else:
                lines.append(f"  kept      {entry.name}: {entry.reason}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Report({self.code_base!r}, replaced={list(self.replaced)}, kept={list(self.kept)})"
