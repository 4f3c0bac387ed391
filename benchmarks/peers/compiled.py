# SPDX-License-Identifier: Apache-2.0
"""The published formula, and the best plain PyTorch can do, through torch.compile."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import eager, smart_eager


def memory_read(query_key: Tensor, memory_key: Tensor, memory_value: Tensor, **options: object) -> Tensor:
    """`eager.memory_read`, compiled for these very shapes (dynamic=False), without graph breaks.

    Args, returns: as `eager.memory_read`.

    Note:
        The first call with new shapes or options compiles for ten seconds or more.
    """
    read: Tensor = _compiled_memory_read()(query_key, memory_key, memory_value, **options)
    return read


@cache
def _compiled_memory_read():  # type: ignore[no-untyped-def]
    return torch.compile(eager.memory_read, dynamic=False, fullgraph=True)


def memory_read_smart(
    query_key: Tensor, memory_key: Tensor, memory_value: Tensor, **options: object
) -> Tensor:
    """`smart_eager.memory_read`, compiled likewise.

    Args, returns, raises: as `smart_eager.memory_read`.

    Note:
        The first call with new shapes or options compiles for ten seconds or more.
    """
    read: Tensor = _compiled_smart_read()(query_key, memory_key, memory_value, **options)
    return read


@cache
def _compiled_smart_read():  # type: ignore[no-untyped-def]
    return torch.compile(smart_eager.memory_read, dynamic=False, fullgraph=True)
