# SPDX-License-Identifier: Apache-2.0
"""Replacing pieces of published code at run time, all or none, and putting them back.

A code base lists its pieces as `Target`s: functions, or methods of classes. They are looked for among the
modules that are imported, under whatever package they were put, and recognised by their source: only a
source that this library was written against is replaced. Methods are replaced on their class, so that
existing objects follow; functions wherever a module holds them, `from ... import *` included.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from .report import Entry, Report

_lock = threading.RLock()


class UnknownVersionError(RuntimeError):
    """The published code differs from every version this library was written against."""


class NotImportedError(RuntimeError):
    """No module of the published code is imported, so there is nothing to replace."""


@dataclass(frozen=True)
class Target:
    """One piece of published code and what takes its place.

    Args:
        module: the last parts of the dotted name of the module that defines it, "model.memory_util";
            whatever stands before is free, as people put the code into packages of their own.
        name: of a function, "do_softmax", or a method, "MemoryBank.add_memory".
        replacement: takes its place; with `wraps`, called with the published piece to make what does.
        digests: `source_digest` of the published pieces that it may replace.
        wraps: the replacement calls the published piece where vosops does not serve.
    """

    module: str
    name: str
    replacement: Callable[..., Any]
    digests: tuple[str, ...]
    wraps: bool = False

    def package(self, module_name: str) -> str | None:
        """What stands before `module` in a module's dotted name, "" for nothing; None for another module."""
        if module_name == self.module or module_name.endswith(f".{self.module}"):
            return module_name[: -len(self.module)]
        return None


@dataclass(frozen=True)
class _Change:
    """One attribute of a module or class that was replaced."""

    owner: Any
    attribute: str
    old: Any
    new: Any

    def undo(self) -> None:
        # Whoever replaced it after us keeps what they put there.
        if vars(self.owner).get(self.attribute) is self.new:
            setattr(self.owner, self.attribute, self.old)


@dataclass(frozen=True)
class _Found:
    """A piece in an imported module; `old` is what `owner` holds, a replacement of ours if `ours`."""

    target: Target
    package: str
    module: str
    owner: Any
    attribute: str
    old: Any
    ours: bool
    known: bool


@dataclass
class CodeBase:
    """The published code of one model, as far as it is replaced.

    Args:
        name: as people call it, "XMem".
        source: where the versions that the digests stand for were published.
        imports: what a user imports before `enable()`, for the message that says so.
        targets: its pieces.
        kept: (name, why) of pieces that stay as published, for the report.
    """

    name: str
    source: str
    imports: str
    targets: tuple[Target, ...]
    kept: tuple[tuple[str, str], ...] = ()
    _changes: list[_Change] = field(default_factory=list, init=False, repr=False)

    def enable(self) -> Report:
        """Replace every piece that is imported; pieces replaced before stay so.

        Returns:
            Report, which as a context manager undoes on leaving what this call replaced.

        Raises:
            NotImportedError: no piece is imported.
            UnknownVersionError: a piece has another source than those known; nothing is replaced.

        Note:
            Cost: one look into every imported module, some milliseconds.
        """
        with _lock:
            found = self._known()
            changes: list[_Change] = []
            try:
                for piece in found:
                    if not piece.ours:
                        changes += _replace(piece)
            except BaseException:
                _undo(changes)
                raise
            self._changes += changes
            return Report(self.name, self._entries(found), lambda: self._put_back(changes))

    def disable(self) -> None:
        """Put the published code back everywhere; nothing happens where nothing was replaced."""
        self._put_back(list(self._changes))

    @property
    def enabled(self) -> bool:
        """Whether any piece is replaced now."""
        return bool(self._changes)

    def recognises(self, module_names: set[str], *, version: bool = True) -> bool:
        """Whether one of these modules defines, or imported by name, a piece of this code base.

        Args:
            module_names: dotted names of imported modules.
            version: only a piece whose version is known.
        """
        owners = [
            vars(sys.modules[piece.module])[piece.target.name.partition(".")[0]]
            for piece in self._found()
            if piece.known or not version
        ]
        held = {id(value) for name in module_names for value in list(vars(sys.modules[name]).values())}
        return any(id(owner) in held for owner in owners)

    def _found(self) -> list[_Found]:
        """Every piece in an imported module, whatever its version."""
        result = []
        for target in self.targets:
            top, _, method = target.name.partition(".")
            for name, module in list(sys.modules.items()):
                package = target.package(name)
                if package is None or not isinstance(module, ModuleType) or top not in vars(module):
                    continue
                owner, attribute = (vars(module)[top], method) if method else (module, top)
                old = vars(owner).get(attribute)
                ours = any(change.new is old for change in self._changes)
                known = ours or source_digest(old) in target.digests
                result.append(_Found(target, package, name, owner, attribute, old, ours, known))
        return result

    def _known(self) -> list[_Found]:
        """The pieces to replace: those of every package whose versions are all known."""
        found = self._found()
        if not found:
            raise NotImportedError(
                f"no code of {self.name} ({self.source}) is imported: import {self.imports} first"
            )
        # Modules of other projects may have the same names: they have no piece that is known.
        packages = {piece.package for piece in found if piece.known} or {piece.package for piece in found}
        found = [piece for piece in found if piece.package in packages]
        unknown = [
            f"{piece.module}.{piece.target.name} (source {source_digest(piece.old)}, "
            f"known {', '.join(piece.target.digests)})"
            for piece in found
            if not piece.known
        ]
        if unknown:
            raise UnknownVersionError(
                f"{self.name}: the code imported is not the version published at {self.source}, so nothing "
                f"was replaced. Unknown: {'; '.join(unknown)}"
            )
        return found

    def _entries(self, found: list[_Found]) -> tuple[Entry, ...]:
        entries = []
        for target in self.targets:
            modules = []
            for piece in found:
                if piece.target is target:
                    new = vars(piece.owner)[piece.attribute]
                    modules += [_name(change.owner) for change in self._changes if change.new is new]
            reason = None if modules else f"{target.module} is not imported; import it, then enable() again"
            entries.append(Entry(target.name, tuple(dict.fromkeys(modules)), reason))
        return (*entries, *(Entry(name, (), reason) for name, reason in self.kept))

    def _put_back(self, changes: list[_Change]) -> None:
        with _lock:
            changes = [change for change in changes if any(change is held for held in self._changes)]
            _undo(changes)
            self._changes = [held for held in self._changes if all(held is not change for change in changes)]


def source_digest(piece: Any) -> str:
    """A short hash of what a function or method does: layout, comments, docstrings and annotations aside.

    Args:
        piece: the function; anything whose source cannot be read gives "no source".
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(piece)))
    except (OSError, TypeError, SyntaxError):
        return "no source"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def _replace(piece: _Found) -> list[_Change]:
    """Put the replacement in every place; gives back what changed."""
    target, old = piece.target, piece.old
    new = target.replacement(old) if target.wraps else target.replacement
    if not isinstance(piece.owner, ModuleType):
        setattr(piece.owner, piece.attribute, new)
        return [_Change(piece.owner, piece.attribute, old, new)]
    new = _copy(new)
    changes = []
    for module, attribute in _holders(old):
        setattr(module, attribute, new)
        changes.append(_Change(module, attribute, old, new))
    return changes


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """An object of its own, so that undoing finds the places of the published function and no others."""

    @functools.wraps(function)
    def replaced(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    return replaced


def _undo(changes: list[_Change]) -> None:
    for change in reversed(changes):
        change.undo()
    for change in changes:
        # Modules imported since then took our function by name.
        if isinstance(change.owner, ModuleType):
            for module, attribute in _holders(change.new):
                setattr(module, attribute, change.old)


def _holders(value: Any) -> list[tuple[ModuleType, str]]:
    """Every imported module and name that holds `value`."""
    return [
        (module, name)
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, held in list(vars(module).items())
        if held is value
    ]


def _name(owner: Any) -> str:
    return str(owner.__name__) if isinstance(owner, ModuleType) else str(owner.__module__)
