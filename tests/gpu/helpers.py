# SPDX-License-Identifier: Apache-2.0
"""Problems on the device under test, and what the backends refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops import backends
from vosops.ops.memory_read import limits

from ..ops import helpers

Arguments = dict[str, Any]


def problem(variant: str, device: torch.device, **options: Any) -> Arguments:
    """`helpers.problem` with sizes that no block divides; small where the interpreter runs it."""
    small = {"grid": (3, 4), "frames": 5, "channels": 12, "value_channels": 18}
    large = {"grid": (13, 21), "frames": 5, "channels": 40, "value_channels": 70}
    sizes = small if device.type == "cpu" else large
    return helpers.problem(variant, **{**sizes, **options})


def on(device: torch.device, arguments: Arguments) -> Arguments:
    """The arguments on a device, with their strides."""
    return {name: moved(device, value) for name, value in arguments.items()}


def moved(device: torch.device, value: Any) -> Any:
    """A tensor on a device, with its strides (`Tensor.to` would make a crop contiguous)."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if value.is_contiguous() or value.numel() == 0:
        return value.to(device)
    reach = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)) + 1
    flat = value.as_strided((reach,), (1,), value.storage_offset()).to(device)
    return flat.as_strided(value.shape, value.stride())


def skip_if_refused(backend: str, arguments: Arguments, top_k: int | None, prior: Any = None) -> None:
    """Skips with the backend's own reasons where it says that it cannot serve the call."""
    p = helpers.scores_of(arguments)
    tensors = p.tensors()
    if "memory_value" in arguments:
        tensors["memory_value"] = arguments["memory_value"]
    if top_k is not None and top_k >= p.memory and "memory_value" in arguments:
        top_k = None
    reasons = backends.reasons_against(backend, tensors) + limits.reasons_against(
        backend, tensors, top_k, prior
    )
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def layout(x: Tensor, name: str) -> Tensor:
    """The same numbers in other memory; x is (B, C, *positions) or (B, *positions)."""
    if name == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if name == "objects":  # as MemoryBank stores values: all channels of all objects contiguous at a position
        spatial = x.dim() - 3
        order = (0, *range(3, 3 + spatial), 1, 2)
        back = (0, spatial + 1, spatial + 2, *range(1, spatial + 1))
        return x.permute(order).contiguous().permute(back) if x.dim() == 6 else layout(x, "channels_last")
    if name == "strided":
        return torch.stack((x, x + 7), -1).flatten(-2)[..., ::2]
    return torch.nn.functional.pad(x, (2, 3, 1, 2))[..., 1:-2, 2:-3]  # "crop"


def eager(arguments: Arguments, top_k: int | None) -> Tensor:
    """The published composition in plain torch, in the inputs' dtype."""
    q, k = arguments["query_key"].flatten(2), arguments["memory_key"].flatten(2)
    if arguments["similarity"] == "dot":
        s = k.mT @ q
    elif "selection" in arguments:
        e = arguments["selection"].flatten(2)
        s = 2 * k.mT @ (q * e) - k.square().mT @ e - (e * q.square()).sum(1, keepdim=True)
    else:
        s = 2 * k.mT @ q - k.square().sum(1)[..., None]
    if "shrinkage" in arguments:
        s = s * arguments["shrinkage"].flatten(2).mT
    s = s / q.shape[1] ** 0.5
    if top_k is not None:
        s = s.masked_fill(s < s.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    read = torch.einsum("bocm,bmq->bocq", arguments["memory_value"].flatten(3), s.softmax(1))
    return read.unflatten(3, arguments["query_key"].shape[2:])


def has_kernel(operator: str) -> bool:
    """Whether the CUDA library brought a kernel of this operator."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"vosops::{operator}", "CUDA"))


def read64(arguments: Arguments, **options: Any) -> Any:
    """The float64 reference on the CPU; results in float64 there."""
    cpu = on(torch.device("cpu"), helpers.widened(arguments))
    with vosops.use_backend("reference"):
        return vosops.memory_read(**cpu, **options)


def score_band(scores: Tensor) -> float:
    """How far float32 sums of these scores may be off, with the matrix units' order of adding."""
    largest = scores.masked_fill(scores.isinf(), 0).abs().max()
    return max(2e-5, 4e-6 * float(largest))


def check_match(match: vosops.Match, arguments: Arguments, top_k: int, scale: float | None = None) -> None:
    """`helpers.check_match` against float64 scores of the same numbers."""
    cpu = on(torch.device("cpu"), {k: v for k, v in arguments.items() if k != "memory_value"})
    scores = helpers.scores64(cpu, scale)
    there = vosops.Match(match.indices.cpu(), match.weights.cpu(), match.query_shape)
    helpers.check_match(there, scores, top_k, score_band(scores))


def gathered64(match: vosops.Match, value: Tensor) -> Tensor:
    """The read of a match in float64, on the CPU.  # [B, O, Cv, Q]"""
    from vosops.ops.memory_read import reference

    return reference.gather(
        match.indices.cpu(), match.weights.cpu().double(), value.cpu().double(), torch.float64
    )
