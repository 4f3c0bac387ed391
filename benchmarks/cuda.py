# SPDX-License-Identifier: Apache-2.0
"""What the cases of several operators share on a CUDA device: forced backends, the floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import vosops
from vosops.ops import backends

from . import measure

FORCED = {"vosops_triton": "triton", "vosops_cuda": "cuda"}
"""Implementation -> the backend it forces; "vosops" is the automatic choice."""


def forced(operator: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Implementation -> the operator with its backend forced; raises BackendError where that cannot serve."""

    def through(backend: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with vosops.use_backend(backend):
                return operator(*arguments, **options)

        return call

    return {name: through(backend) for name, backend in FORCED.items()}


def refused_by(
    implementation: str, tensors: dict[str, Tensor], limits: Callable[[str], list[str]]
) -> str | None:
    """Why a forced backend does not serve a call, in its own words, or None.

    Args:
        implementation: a key of FORCED.
        tensors: name -> tensor of the call.
        limits: backend -> the operator's own reasons against the call, as `backends.choose` takes them.
    """
    backend = FORCED[implementation]
    reasons = backends.reasons_against(backend, tensors)
    return "; ".join(reasons or limits(backend)) or None


def floor_ms(operations: float, moved: int, rates: measure.Ceilings) -> tuple[float, str]:
    """The floor of a call on a GPU, which moves and multiplies at once: the larger of the two times.

    Args:
        operations: multiplications and additions that no implementation can leave out.
        moved: bytes of every input that is needed and of every result, each once.
        rates: measured in this run.

    Returns:
        (milliseconds, how it comes about).
    """
    gigas, mebibytes = operations / 1e9, moved / 2**20
    words = (
        f"max of {gigas:.{1 if gigas >= 1 else 3}f} GFLOP at {rates.peak / 1e12:.0f} TFLOP/s "
        f"and {mebibytes:.{0 if mebibytes >= 10 else 1}f} MiB at {rates.copy / 1e12:.2f} TB/s"
    )
    return 1e3 * max(operations / rates.peak, moved / rates.copy), words
