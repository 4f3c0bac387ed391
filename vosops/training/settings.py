# SPDX-License-Identifier: Apache-2.0
"""Dataclasses from YAML: nested, every value typed and overridable, every mistake named."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

DataclassT = TypeVar("DataclassT")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or key and says what there is."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, got {type(content).__name__}")
    return content


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with assignments such as "optim.lr=1e-4" or "data.sources.0.ratio=2" laid over it.

    Args:
        values: nested mappings and lists, as of `read_yaml`.
        assignments: KEY=VALUE, the key's parts joined by dots (a number picks from a list), the value YAML.

    Raises:
        ConfigError: an assignment without "=", a value that is no YAML, or a key below something that is no
            mapping or list. Whether the key exists, `build` says.
    """
    result = _copy(values)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"{assignment!r} must be KEY=VALUE, such as optim.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of {key} is no YAML: {text}") from error
        _assign(result, key, value)
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _assign(values: Any, key: str, value: Any) -> None:
    parts = key.split(".")
    target = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                at = ".".join(parts[:depth])
                raise ConfigError(f"{key}: {at} is a list of {len(target)}, it has no entry {part!r}")
            place: Any = int(part)
        elif isinstance(target, dict):
            place = part
            if not last and target.get(part) is None:
                target[part] = {}
        else:
            raise ConfigError(f"{key}: {'.'.join(parts[:depth])} is a value, it has no entry {part!r}")
        if last:
            target[place] = value
        target = target[place]


def build(kind: type[DataclassT], values: Mapping[str, Any], key: str = "") -> DataclassT:
    """An instance of a dataclass, its fields taken from `values` and checked against their annotations.

    Annotations may be bool, int, float, str, Path, Any, dataclasses, Literal, `X | None`, tuple[X, ...],
    list[X], dict[str, X]. An int serves as a float, and so does text such as 1e-4, which YAML leaves as text.

    Args:
        kind: the dataclass.
        values: by field; fields with a default may be missing.
        key: of `values` in the file, for errors.

    Raises:
        ConfigError: a key that is unknown (lists those that exist) or missing, a value of another type, or
            one that the dataclass itself refuses.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"unknown key {prefix}{name}; there are {', '.join(prefix + n for n in fields)}"
            )
    found = {}
    for name, field in fields.items():
        if name in values:
            found[name] = _convert(hints[name], values[name], prefix + name)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"key {prefix}{name} is missing: {_described(hints[name])}")
    try:
        return kind(**found)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}{error}") from error


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert(hint, value, key)
    if origin is Literal:
        # YAML reads a bare `no` and `off` as false; no choice is a bool.
        value = "no" if value is False and "no" in arguments else value
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(f"{key} must be {_described(hint)}, got {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping, got {value!r}")
        return build(hint, value, key)  # type: ignore[arg-type]
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be {_described(hint)}, got {value!r}")
        return origin(_convert(arguments[0], inner, f"{key}.{place}") for place, inner in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping, got {value!r}")
        return {str(name): _convert(arguments[1], inner, f"{key}.{name}") for name, inner in value.items()}
    return _convert_scalar(hint, value, key)


def _convert_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} must be {_described(hint)}, got {value!r}")


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _described(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        return f"a list of {_described(arguments[0])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    return names.get(hint, "a mapping")


def plain(value: Any) -> Any:
    """A dataclass as YAML and JSON write it: mappings, lists, numbers, text; `build` takes it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def differences(first: Any, second: Any, key: str = "") -> list[str]:
    """What differs between two results of `plain`: lines "key: first, second"."""
    if isinstance(first, dict) and isinstance(second, dict):
        lines = []
        for name in dict.fromkeys((*first, *second)):
            inner = f"{key}.{name}" if key else str(name)
            lines += differences(first.get(name), second.get(name), inner)
        return lines
    return [] if first == second else [f"{key}: {first!r}, {second!r}"]
