# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


class WriteError(OSError):
    """A file that could not be written (disk full, no permission, ...); the message names it."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on leaving it takes the place of `path`; a failure removes it.

    Raises:
        WriteError: writing or renaming failed; names `path`, not the temporary file.
    """
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes `path` atomically through `write(file)`.

    Raises:
        WriteError: the file cannot be written; names it.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        write(file)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files that a killed program left in `folder`."""
    for file in folder.glob(".*.tmp*"):
        file.unlink()
