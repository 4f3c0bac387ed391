# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks.run` asks of an operator's benchmark: one `Operator` and one `Case` class per file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("channel_major", "position_major")


@dataclass(frozen=True)
class Settings:
    """How one case is set up.

    Args:
        dtype: of the inputs; a name in DTYPES.
        layout: of the memory. "channel_major" is contiguous (B, Ck, M), as the published code holds it;
            "position_major" are views of contiguous (B, M, Ck), as `vosops.memory.MemoryBank` stores it.
        backward: time forward and backward together.
        device: where everything runs.
    """

    dtype: str = "float32"
    layout: str = "channel_major"
    backward: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got '{self.dtype}'")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got '{self.layout}'")


class Case(Protocol):
    """One shape with its inputs drawn, ready to run by every implementation."""

    def facts(self) -> dict[str, object]:
        """The sizes, for the columns of a row: queries, memory, top_k and so on."""

    def refuses(self, implementation: str) -> str | None:
        """Why an implementation does not compute this case, or None."""

    def needs_bytes(self, implementation: str) -> int:
        """Estimate of the extra memory one call takes, so that none starts that cannot end."""

    def call(self, implementation: str) -> Callable[[], object]:
        """The timed call: forward without gradients, or forward and backward."""

    def error(self, implementation: str) -> float:
        """Largest relative error of result (and gradients) against the float64 reference."""

    def tolerance(self) -> float:
        """What `error` may be at most for the result to count as correct."""

    def limit_ms(self) -> tuple[float, str]:
        """The arithmetic limit in milliseconds, and how it comes about in words."""


@dataclass(frozen=True)
class Job:
    """A part of `--all`: shapes run under one setting by some implementations (none named: by all)."""

    shapes: Sequence[str]
    implementations: Sequence[str] = ()
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Operator:
    """An operator's benchmark.

    Args:
        name: of the operator.
        implementations: "vosops" first, then its peers.
        shapes: names of the shapes, in the order they are listed.
        groups: group name -> shape names; "standard" is the default of `--shape`, "frames" a sweep.
        case: (shape name, settings, seed) -> the case, its inputs drawn.
        everything: what `--all` runs.
        cuda_implementations: further ones that there are on CUDA devices only.
        cuda_everything: what `--all` runs on a CUDA device.
    """

    name: str
    implementations: tuple[str, ...]
    shapes: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]]
    case: Callable[[str, Settings, int], Case]
    everything: tuple[Job, ...]
    cuda_implementations: tuple[str, ...] = ()
    cuda_everything: tuple[Job, ...] = ()


def relative_error(result: Tensor, expected: Tensor) -> float:
    """max |result - expected| / max |expected|; inf where either is not finite."""
    difference = (result.to(expected.dtype) - expected).abs()
    if expected.numel() == 0:
        return 0.0
    error = float(difference.max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny))
    return error if error == error else float("inf")
