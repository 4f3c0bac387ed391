# SPDX-License-Identifier: Apache-2.0
"""Leaving PyTorch: models whose runtime knows standard operators only.

torch.export needs nothing from here: every operator of this library is a node of its own in the graph, and
the program runs wherever the library is installed. A runtime without it wants `onnx_reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .ops.backends import use_backend


@contextmanager
def onnx_reference() -> Iterator[None]:
    """Inside, operators are traced as their definition in plain torch, with standard ONNX operators only.

    For torch.onnx.export (dynamo=True) and for torch.export with run_decompositions. It holds for the whole
    process, as `use_backend` does. What is traced outside keeps the fused operators.

    Note:
        The definitions store what the fused operators avoid: Q M scores in `memory_read` and `attention`,
        the windows of `local_attention` (window^2 times its input, and as many slices in the graph).
        Ties among the scores that `attention` keeps with top_k go to the lowest index in ONNX too.

    Example:
        >>> with vosops.export.onnx_reference():
        ...     torch.onnx.export(model, (query_key, memory_key, memory_value), "read.onnx", dynamo=True)
    """
    with use_backend("reference"), _Standard():
        yield


class _Standard(TorchFunctionMode):
    """A stable sort has no ONNX translation; the one of a plain sort is stable: equal values by index."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is Tensor.sort:
            options.pop("stable", None)
        return func(*args, **options)
