# SPDX-License-Identifier: Apache-2.0
"""The published code of video object segmentation models, made to call vosops without editing it."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from torch import nn

from .patching import CodeBase, NotImportedError, UnknownVersionError
from .report import Entry, Report

# Modules of this package that have a `CODE_BASE`, enable() and disable().
CODE_BASES = ("xmem", "cutie", "stcn", "stm", "mivos", "aot")

__all__ = ["CODE_BASES", "Entry", "NotImportedError", "Report", "UnknownVersionError", "accelerate"]


def accelerate(obj: Any) -> Report:
    """Make published code call vosops: the code that a model, an inference engine or a module comes from.

    It is `vosops.compat.<name>.enable()` of the code base that `obj` is recognised as, so it changes that
    code base in the whole process, other objects of it included, until `disable()` or until the context
    that the report is ends.

    Args:
        obj: a model (nn.Module, wrapped in DataParallel or not), an engine such as an InferenceCore, a
            class of theirs, or a module or package of the published code.

    Returns:
        Report: what was replaced, what was not and why.

    Raises:
        ValueError: no code base is recognised in obj.
        UnknownVersionError: one is, in a version that is not known; nothing is replaced.

    Example:
        >>> network = XMem(config, "XMem.pth").eval()
        >>> print(vosops.accelerate(network))
    """
    names = _modules_of(obj)
    code_bases = [importlib.import_module(f".{name}", __package__).CODE_BASE for name in CODE_BASES]
    chosen: list[CodeBase] = [code for code in code_bases if code.recognises(names)]
    if not chosen:
        chosen = [code for code in code_bases if code.recognises(names, version=False)]
    if not chosen:
        known = ", ".join(code.name for code in code_bases)
        what = obj.__name__ if isinstance(obj, ModuleType | type) else f"a {type(obj).__qualname__}"
        raise ValueError(f"obj must come from the published code of {known}; {what} is of none of them")
    reports = [code.enable() for code in chosen]
    if len(reports) == 1:
        return reports[0]

    def undo() -> None:
        for report in reports:
            report.__exit__(None, None, None)

    entries = tuple(entry for report in reports for entry in report.entries)
    return Report(", ".join(report.code_base for report in reports), entries, undo)


def _modules_of(obj: Any) -> set[str]:
    """Names of the imported modules that obj, and what it is made of, come from."""
    if isinstance(obj, ModuleType):
        inside = f"{obj.__name__}."
        names = {obj.__name__, *(name for name in list(sys.modules) if name.startswith(inside))}
    else:
        parts = (
            [obj, *vars(obj).values()] if hasattr(obj, "__dict__") and not isinstance(obj, type) else [obj]
        )
        modules = [inner for part in parts if isinstance(part, nn.Module) for inner in part.modules()]
        types = {part if isinstance(part, type) else type(part) for part in (obj, *modules)}
        names = {base.__module__ for kind in types for base in kind.__mro__}
    return {name for name in names if isinstance(sys.modules.get(name), ModuleType)}


def __getattr__(name: str) -> ModuleType:
    if name in (*CODE_BASES, "correlation"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
