# SPDX-License-Identifier: Apache-2.0
"""Local attention against its peers: inputs, correctness, memory estimates, arithmetic limit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops.ops.local_attention import limits
from vosops.ops.local_attention.problem import build_window

from . import cuda, measure
from .case import DTYPES, Job, Operator, Settings, relative_error
from .peers import window

_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "vosops": vosops.local_attention,
    "unfold": window.unfold,
    "dense_scatter": window.dense_scatter,
    "sampler": window.sampler,
    "masked_dense": window.masked_dense,
    "sdpa": window.sdpa,
    "flex": window.flex,
    "natten": window.natten,
    **cuda.forced(vosops.local_attention),
}
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # relative to the largest element

_REFERENCE_CHANNELS = 256


@dataclass(frozen=True)
class LocalShape:
    """One short-term attention. Sizes count elements.

    Args:
        name: what `--shape` takes.
        stands_for: the published model whose layer this is.
        grid: (height, width) in stride-16 cells.
        channels: C, of query and key.
        value_channels: Cv.
        heads: h.
        relative: the relative terms: "key" (relative_weight and relative_offset), "both" (relative_value
            too) or "none".
        window: side of the window.
    """

    name: str
    stands_for: str
    grid: tuple[int, int]
    channels: int
    value_channels: int
    heads: int
    relative: str = "none"
    window: int = 15

    @property
    def queries(self) -> int:
        """Q, positions of one batch entry."""
        return self.grid[0] * self.grid[1]


_STANDARD = (
    LocalShape("st-aot-480p", "AOT short-term attention", (31, 54), 256, 256, 8, "both"),
    LocalShape("st-deaot-480p", "DeAOT short-term attention", (31, 54), 128, 1024, 1, "key"),
    LocalShape("st-plain-480p", "AOT's widths without relative terms", (31, 54), 256, 256, 8),
)
_SMALL = (
    LocalShape("st-aot-240p", "AOT short-term attention, 240p video", (16, 28), 256, 256, 8, "both"),
    LocalShape("st-deaot-240p", "DeAOT short-term attention, 240p video", (16, 28), 128, 1024, 1, "key"),
)
_LARGE = (  # what fills a GPU
    LocalShape("st-aot-1080p", "AOT short-term attention, 1080p video", (68, 121), 256, 256, 8, "both"),
    LocalShape("st-deaot-1080p", "DeAOT short-term attention, 1080p video", (68, 121), 128, 1024, 1, "key"),
    LocalShape("st-plain-1080p", "AOT's widths without relative terms, 1080p", (68, 121), 256, 256, 8),
)
SHAPES = {shape.name: shape for shape in (*_STANDARD, *_SMALL, *_LARGE)}


class LocalAttentionCase:
    """One short-term attention with its inputs drawn; see `case.Case`."""

    def __init__(self, shape: LocalShape, settings: Settings, seed: int) -> None:
        self.shape, self.settings = shape, settings
        generator = torch.Generator().manual_seed(seed)

        def randn(*sizes: int) -> Tensor:
            drawn = torch.randn(*sizes, generator=generator)
            return drawn.to(settings.device, DTYPES[settings.dtype])

        def placed(*sizes: int) -> Tensor:
            drawn = randn(*sizes)
            if settings.layout == "position_major":
                return drawn.movedim(1, -1).contiguous().movedim(-1, 1)
            return drawn

        offsets = shape.window**2
        self.tensors = {
            "query": placed(1, shape.channels, *shape.grid),
            "key": placed(1, shape.channels, *shape.grid),
            "value": placed(1, shape.value_channels, *shape.grid),
        }
        if shape.relative != "none":
            width = shape.channels // shape.heads
            self.tensors["relative_weight"] = randn(shape.heads * offsets, width) * width**-0.5
            self.tensors["relative_offset"] = randn(shape.heads * offsets)
        if shape.relative == "both":
            self.tensors["relative_value"] = randn(shape.heads, shape.value_channels // shape.heads, offsets)
        self._upstream = randn(1, shape.value_channels, *shape.grid)
        self._expected: list[Tensor] | None = None

    def facts(self) -> dict[str, object]:
        shape = self.shape
        return {
            "queries": shape.queries,
            "window": shape.window,
            "channels": shape.channels,
            "value_channels": shape.value_channels,
            "heads": shape.heads,
            "relative": shape.relative,
        }

    def refuses(self, implementation: str) -> str | None:
        if implementation in ("sdpa", "flex") and self.shape.relative == "both":
            return "relative_value needs the weights, which it does not return"
        if implementation == "natten" and self.shape.relative != "none":
            return "it has no relative terms of the query"
        if implementation == "natten" and not window.has_natten():
            return "NATTEN is not installed"
        if implementation == "sampler" and not window.has_sampler():
            return "spatial_correlation_sampler is not installed"
        if implementation == "flex" and self.settings.device.type == "cpu":
            if self.settings.backward:
                return "FlexAttention has no backward on the CPU"
            if shutil.which("g++") is None:
                return "torch.compile needs g++"
        return self._refused_by(implementation) if implementation in cuda.FORCED else None

    def _refused_by(self, implementation: str) -> str | None:
        given, shape = self.tensors, self.shape
        weight, offset, value = (given.get(f"relative_{name}") for name in ("weight", "offset", "value"))
        p = build_window(
            given["query"],
            given["key"],
            given["value"],
            shape.heads,
            shape.window,
            dilation=1,
            relative_bias=None,
            relative_weight=weight,
            relative_offset=offset,
            relative_value=value,
            scale=None,
        )
        return cuda.refused_by(
            implementation, p.tensors(), lambda backend: limits.reasons_against(backend, p)
        )

    def needs_bytes(self, implementation: str) -> int:
        shape, size = self.shape, max(4, DTYPES[self.settings.dtype].itemsize)
        unfolded = shape.queries * shape.window**2 * size
        matrix = shape.heads * shape.queries**2 * size
        needed = {
            "unfold": 2 * unfolded * (shape.channels + shape.value_channels),
            "dense_scatter": 2 * unfolded * shape.channels + 3 * matrix,
            "sampler": 3 * matrix,
            "masked_dense": 4 * matrix,
            "sdpa": 3 * matrix,
        }.get(implementation, 2 * shape.queries * (shape.channels + shape.value_channels) * size)
        return 2 * needed if self.settings.backward else needed

    def call(self, implementation: str) -> Callable[[], object]:
        return lambda: self._run(implementation, self.tensors, self._upstream)

    def _run(self, implementation: str, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
        """The read and, with backward, the gradients of all tensors in their order."""
        shape = self.shape
        options: dict[str, Any] = {"num_heads": shape.heads, "window": shape.window}
        if not self.settings.backward:
            with torch.no_grad():
                return [_IMPLEMENTATIONS[implementation](**tensors, **options)]
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with torch.enable_grad():
            read = _IMPLEMENTATIONS[implementation](**leaves, **options)
            return [read.detach(), *torch.autograd.grad(read, list(leaves.values()), upstream.to(read.dtype))]

    def error(self, implementation: str) -> float:
        if self._expected is None:
            self._expected = self._reference()
        results = self._run(implementation, self.tensors, self._upstream)
        return max(relative_error(*pair) for pair in zip(results, self._expected, strict=True))

    def _reference(self) -> list[Tensor]:
        """In float64, some value channels at a time: the reference writes all windows out, 3 GB for DeAOT.

        The read of a channel depends on no other, and gradients are linear in that of the read.
        """
        heads = self.shape.heads
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        value, upstream = (x.unflatten(1, (heads, -1)) for x in (wide["value"], self._upstream.double()))
        parts = []
        for channels in torch.arange(value.shape[2]).split(max(1, _REFERENCE_CHANNELS // heads)):
            wide["value"] = value[:, :, channels].flatten(1, 2)
            if "relative_value" in self.tensors:
                wide["relative_value"] = self.tensors["relative_value"].double()[:, channels]
            with vosops.use_backend("reference"):
                parts.append(self._run("vosops", wide, upstream[:, :, channels].flatten(1, 2)))
        names = ("read", *wide)[: len(parts[0])]
        combined = []
        for name, found in zip(names, zip(*parts, strict=True), strict=True):
            if name in ("read", "value"):
                combined.append(torch.cat([x.unflatten(1, (heads, -1)) for x in found], 2).flatten(1, 2))
            else:
                combined.append(torch.cat(found, 1) if name == "relative_value" else sum(found[1:], found[0]))
        return combined

    def tolerance(self) -> float:
        return _TOLERANCE[self.settings.dtype]

    def limit_ms(self) -> tuple[float, str]:
        """The least a machine can spend: the products of every query with its window.

        2 Q n^2 (C + Cv) operations at the measured peak rate, with relative_weight C and with
        relative_value Cv counted again; backward adds the scores and two products of each kind (dL/da and
        dv, dq and dk). Offsets outside of the frame are counted: a kernel that skips them may go below by
        a tenth. Besides, every input is read and the result written once.

        On a GPU the larger of the two, only offsets inside the frame counted, and relative tensors read too.
        """
        shape, dtype = self.shape, DTYPES[self.settings.dtype]
        rates = measure.ceilings(64, dtype, self.settings.device, torch.get_num_threads())
        key = shape.channels * (1 if shape.relative == "none" else 2)
        value = shape.value_channels * (2 if shape.relative == "both" else 1)
        on_gpu = self.settings.device.type == "cuda"
        pairs = _inside(shape) if on_gpu else shape.queries * shape.window**2
        operations = 2 * pairs * (key + value)
        moved = 2 * shape.queries * (shape.channels + shape.value_channels) * dtype.itemsize
        if self.settings.backward:
            operations += 2 * pairs * (3 * key + 2 * value)
            moved *= 3
        if on_gpu:
            read = shape.queries * shape.value_channels
            inputs = sum(x.numel() for x in self.tensors.values())
            elements = 3 * inputs + 2 * read if self.settings.backward else inputs + read
            return cuda.floor_ms(operations, elements * dtype.itemsize, rates)
        milliseconds = 1e3 * (operations / rates.peak + moved / rates.copy)
        return milliseconds, (
            f"{operations / 1e9:.2f} GFLOP at {rates.peak / 1e9:.0f} GFLOP/s "
            f"+ {moved / 2**20:.1f} MiB at {rates.copy / 2**30:.0f} GiB/s"
        )


def _inside(shape: LocalShape) -> int:
    """Pairs of a position and a cell of its window that lies in the frame."""
    reach, pairs = shape.window // 2, 1
    for size in shape.grid:
        pairs *= sum(min(size, i + reach + 1) - max(0, i - reach) for i in range(size))
    return pairs


def _make_case(shape: str, settings: Settings, seed: int) -> LocalAttentionCase:
    return LocalAttentionCase(SHAPES[shape], settings, seed)


_AOT = ("st-aot-480p", "st-deaot-480p")
_EAGER = ("vosops", "unfold", "dense_scatter", "masked_dense", "sdpa")
_NAMES = tuple(name for name in _IMPLEMENTATIONS if name not in cuda.FORCED)
_OURS = ("vosops", *cuda.FORCED)
_TOKENS = "position_major"  # how the models hold maps


def _cuda_everything() -> tuple[Job, ...]:
    """Ordered by weight: a session that is cut short has measured the targets first."""
    standard = tuple(shape.name for shape in _STANDARD)
    large = tuple(shape.name for shape in _LARGE)
    published = ("unfold", "dense_scatter", "sampler")
    peers = (*published, "masked_dense", "sdpa", "flex", "natten")
    backward = (*_OURS, "dense_scatter", "masked_dense", "sdpa", "flex", "natten")
    return (
        Job(standard, (*_OURS, *peers), Settings("bfloat16", _TOKENS)),
        Job(large, (*_OURS, "masked_dense", "sdpa", "flex", "natten"), Settings("bfloat16", _TOKENS)),
        *(Job(standard, (*_OURS, *peers), Settings(dtype, _TOKENS)) for dtype in ("float32", "float16")),
        Job(standard, backward, Settings("bfloat16", _TOKENS, backward=True)),
        Job(standard, (*_OURS, *peers), Settings("bfloat16")),
        Job(standard, backward, Settings("float32", _TOKENS, backward=True)),
        Job(large, _OURS, Settings("bfloat16", _TOKENS, backward=True)),
        Job(large, _OURS, Settings("float32", _TOKENS)),
        Job(_AOT, (*_OURS, *published), Settings()),
        Job(_AOT, _OURS, Settings("float16", _TOKENS, backward=True)),
    )


OPERATOR = Operator(
    name="local_attention",
    implementations=_NAMES,
    shapes=tuple(SHAPES),
    groups={
        "standard": tuple(shape.name for shape in _STANDARD),
        "small": tuple(shape.name for shape in _SMALL),
        "large": tuple(shape.name for shape in _LARGE),
    },
    case=_make_case,
    everything=(
        Job(tuple(shape.name for shape in _STANDARD)),
        Job(_AOT, _EAGER, Settings(backward=True)),
        Job(_AOT, _EAGER, Settings(dtype="bfloat16")),
        Job(_AOT, ("vosops",), Settings(layout="position_major")),
    ),
    cuda_implementations=tuple(cuda.FORCED),
    cuda_everything=_cuda_everything(),
)
