# SPDX-License-Identifier: Apache-2.0
"""Replacing and putting back: all or none, wherever a name was imported, whatever the order of calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import vosops
from vosops.compat import NotImportedError, UnknownVersionError
from vosops.compat.patching import CodeBase, Target, source_digest


def weigh(x: int) -> int:
    return x + 1


def weigh_otherwise(x: int) -> int:
    return x + 2


class Reader:
    def read(self, x: int) -> int:
        return 10 * x


def _replacement(x: int) -> int:
    return -x


def _wrapping(published: Callable[[Any, int], int]) -> Callable[[Any, int], int]:
    def read(self: Any, x: int) -> int:
        return published(self, x) + 5

    return read


@pytest.fixture
def code() -> Iterator[CodeBase]:
    base = CodeBase(
        "Weigher",
        "example.org/weigher",
        "weigher.core",
        (
            Target("lib.scales", "weigh", _replacement, (source_digest(weigh),)),
            Target("lib.reading", "Reader.read", _wrapping, (source_digest(Reader.read),), wraps=True),
        ),
        kept=(("Core", "nothing to gain"),),
    )
    before = set(sys.modules)
    yield base
    base.disable()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def put(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def reader() -> type[Any]:
    """A class of its own with the source of Reader."""
    return type("Reader", (), dict(vars(Reader)))


def test_functions_are_replaced_wherever_they_were_imported_by_name(code: CodeBase) -> None:
    scales, user = put("pkg.lib.scales", weigh=weigh), put("user", renamed=weigh, other=1)
    report = code.enable()
    assert (scales.weigh(3), user.renamed(3), user.other) == (-3, -3, 1)
    assert set(report.replaced["weigh"]) >= {"pkg.lib.scales", "user"}
    assert "lib.reading is not imported" in report.kept["Reader.read"]
    assert report.kept["Core"] == "nothing to gain"
    assert "1 of 3" in str(report)
    assert "replaced  weigh (" in str(report)
    assert "kept      Core: nothing to gain" in str(report)
    code.disable()
    assert scales.weigh is user.renamed is weigh


def test_methods_are_replaced_on_the_class_so_that_objects_follow(code: CodeBase) -> None:
    kind = reader()
    put("lib.reading", Reader=kind)
    made_before = kind()
    with code.enable():
        assert (made_before.read(2), kind().read(2)) == (25, 25)
    assert made_before.read(2) == 20


def test_an_exception_inside_the_context_puts_everything_back(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)

    def fail() -> None:
        with code.enable():
            raise KeyError("inside")

    with pytest.raises(KeyError):
        fail()
    assert scales.weigh is weigh
    assert not code.enabled


def test_nested_contexts_end_with_the_outermost(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)
    with code.enable():
        with code.enable() as inner:
            assert list(inner.replaced) == ["weigh"]
        assert scales.weigh(1) == -1
    assert scales.weigh is weigh


def test_enable_twice_is_undone_by_one_disable_and_disable_alone_does_nothing(code: CodeBase) -> None:
    code.disable()
    scales = put("lib.scales", weigh=weigh)
    code.enable()
    code.enable()
    code.disable()
    code.disable()
    assert scales.weigh is weigh


def test_a_context_inside_enable_leaves_it_enabled(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)
    code.enable()
    with code.enable():
        pass
    assert scales.weigh(1) == -1


def test_disable_inside_a_context_ends_it(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)
    with code.enable():
        code.disable()
        assert scales.weigh is weigh
    assert scales.weigh is weigh


def test_modules_imported_later_join_at_the_next_enable_and_are_put_back(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)
    code.enable()
    late, kind = put("late", weigh=scales.weigh), reader()
    put("lib.reading", Reader=kind)
    assert set(code.enable().replaced) == {"weigh", "Reader.read"}
    assert kind().read(1) == 15
    code.disable()
    assert late.weigh is scales.weigh is weigh
    assert kind().read(1) == 10


def test_an_unknown_version_is_refused_and_nothing_is_replaced(code: CodeBase) -> None:
    kind = reader()
    scales = put("lib.scales", weigh=weigh_otherwise)
    put("lib.reading", Reader=kind)
    with pytest.raises(
        UnknownVersionError, match=r"nothing was replaced. Unknown: lib.scales.weigh \(source"
    ):
        code.enable()
    assert scales.weigh is weigh_otherwise
    assert kind().read(1) == 10


def test_a_class_without_the_method_is_an_unknown_version(code: CodeBase) -> None:
    put("lib.reading", Reader=type("Reader", (), {}))
    with pytest.raises(UnknownVersionError, match=r"Reader.read \(source no source"):
        code.enable()


def test_another_project_with_modules_of_the_same_name_is_left_alone(code: CodeBase) -> None:
    other, ours = put("other.lib.scales", weigh=weigh_otherwise), put("ours.lib.scales", weigh=weigh)
    code.enable()
    assert other.weigh is weigh_otherwise
    assert ours.weigh(1) == -1


def test_two_copies_of_the_code_are_both_replaced(code: CodeBase) -> None:
    kinds = [reader(), reader()]
    for name, kind in zip("ab", kinds, strict=True):
        put(f"{name}.lib.reading", Reader=kind)
    with code.enable():
        assert [kind().read(0) for kind in kinds] == [5, 5]
    assert [kind().read(0) for kind in kinds] == [0, 0]


def test_without_an_import_the_message_says_what_to_import(code: CodeBase) -> None:
    with pytest.raises(
        NotImportedError, match=r"no code of Weigher \(example.org/weigher\).*weigher.core first"
    ):
        code.enable()


def test_what_others_put_in_its_place_afterwards_stays(code: CodeBase) -> None:
    scales = put("lib.scales", weigh=weigh)
    code.enable()
    scales.weigh = weigh_otherwise
    code.disable()
    assert scales.weigh is weigh_otherwise


def test_a_replacement_that_fails_to_be_made_leaves_nothing_replaced() -> None:
    def failing(published: Any) -> Any:
        raise OSError("no")

    targets = (
        Target("lib.scales", "weigh", _replacement, (source_digest(weigh),)),
        Target("lib.reading", "Reader.read", failing, (source_digest(Reader.read),), wraps=True),
    )
    base = CodeBase("Weigher", "", "", targets)
    scales, _ = put("lib.scales", weigh=weigh), put("lib.reading", Reader=reader())
    try:
        with pytest.raises(OSError, match="no"):
            base.enable()
        assert scales.weigh is weigh
        assert not base.enabled
    finally:
        del sys.modules["lib.scales"], sys.modules["lib.reading"]


def test_the_digest_looks_past_layout_comments_docstrings_and_annotations() -> None:
    def one(x, y=1):  # type: ignore[no-untyped-def]
        return x * y

    first = source_digest(one)

    def one(x: float, y: int = 1) -> float:  # type: ignore[no-redef]
        """A docstring."""
        return x * y  # and a comment

    def three(x, y=1):  # type: ignore[no-untyped-def]
        return y * x

    assert len(first) == 12
    assert source_digest(torch.add) == "no source"
    assert source_digest(three) not in (first, source_digest(one))


@pytest.mark.parametrize("obj", [torch.nn.Linear(2, 2), 3, int, sys])
def test_accelerate_names_what_it_does_not_know(obj: Any) -> None:
    with pytest.raises(
        ValueError, match="obj must come from the published code of XMem, Cutie, STCN, STM, MiVOS"
    ):
        vosops.accelerate(obj)
