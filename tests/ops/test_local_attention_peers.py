# SPDX-License-Identifier: Apache-2.0
"""The peers of local attention compute the same; extensions that may be absent are stood in for.

FlexAttention compiles for half a minute: the benchmark itself checks it.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vosops
from benchmarks import local_attention as benchmark
from benchmarks.case import Settings
from benchmarks.peers import window

from .test_local_attention import arguments

PEERS = ("unfold", "dense_scatter", "masked_dense", "sdpa")


def call(relative: str, **changes: Any) -> dict[str, Any]:
    options = arguments(2, 16, 16, 6, 9, 2, 5, relative=relative) | changes
    del options["dilation"]
    return options


def correlation(q: Tensor, k: Tensor, *, patch_size: int, **options: int) -> Tensor:
    """The interface of spatial_correlation_sample.  # [N, C, H, W] twice -> [N, n, n, H, W]"""
    assert options == {"kernel_size": 1, "stride": 1, "padding": 0}
    columns = F.unfold(k, patch_size, padding=patch_size // 2).view(*k.shape[:2], -1, *k.shape[2:])
    return (q[:, :, None] * columns).sum(1).unflatten(1, (patch_size, patch_size))


def na2d(q: Tensor, k: Tensor, v: Tensor, *, kernel_size: int, scale: float) -> Tensor:
    """Neighbourhood attention as NATTEN defines it: a window at the border is shifted inwards."""
    out = torch.zeros_like(v)
    for y, x in torch.cartesian_prod(torch.arange(q.shape[1]), torch.arange(q.shape[2])).tolist():
        y0 = min(max(y - kernel_size // 2, 0), q.shape[1] - kernel_size)
        x0 = min(max(x - kernel_size // 2, 0), q.shape[2] - kernel_size)
        keys, values = (t[:, y0 : y0 + kernel_size, x0 : x0 + kernel_size].flatten(1, 2) for t in (k, v))
        s = scale * torch.einsum("bhc,bkhc->bhk", q[:, y, x], keys)
        out[:, y, x] = torch.einsum("bhk,bkhc->bhc", s.softmax(-1), values)
    return out


@pytest.mark.parametrize("relative", ["weight", "none"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_the_same(peer: str, relative: str) -> None:
    options = call(relative)
    if peer == "sdpa":
        options.pop("relative_value", None)
    read = getattr(window, peer)(**options)
    torch.testing.assert_close(read, vosops.local_attention(**options), rtol=1e-4, atol=1e-5)


def test_peers_of_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, members in (
        ("spatial_correlation_sampler", {"spatial_correlation_sample": correlation}),
        ("natten", {}),
        ("natten.functional", {"na2d": na2d}),
    ):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    assert window.has_sampler()
    assert window.has_natten()
    options = call("weight")
    expected = vosops.local_attention(**options)
    torch.testing.assert_close(window.sampler(**options), expected, rtol=1e-4, atol=1e-5)
    options = call("none")
    expected = vosops.local_attention(**options)
    torch.testing.assert_close(window.natten(**options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("relative", ["both", "key"])
def test_benchmark_case(relative: str, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = benchmark.LocalShape("tiny", "a test", (5, 7), 8, 12, 2, relative, 3)
    monkeypatch.setattr(benchmark, "_REFERENCE_CHANNELS", 4)  # two channels at a time
    case = benchmark.LocalAttentionCase(shape, Settings(backward=backward, layout="position_major"), 0)
    for peer in ("vosops", "unfold", "masked_dense"):
        assert case.refuses(peer) is None
        assert case.error(peer) < 1e-5
        assert case.needs_bytes(peer) > 0
    assert case.facts()["queries"] == 35
    assert ("relative_value" in (case.refuses("sdpa") or "")) == (relative == "both")
    case.tensors["key"] = 1.01 * case.tensors["key"]
    assert case.error("vosops") > 1e-4
