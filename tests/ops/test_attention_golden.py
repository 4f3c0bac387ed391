# SPDX-License-Identifier: Apache-2.0
"""Numbers of AOT's public MultiheadAttention (tests/golden/README.md), for every backend."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vosops
from vosops.ops import backends

from ..models.weights import Golden, value

CASES = ("distance", "distance_top_k", "length_ratio", "narrow_key", "no_linear", "plain", "top_k")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, backend: str) -> None:
    if reasons := backends.reasons_against(backend, {}):
        pytest.skip("; ".join(reasons))
    golden = Golden("ops_attention")
    params = golden.config["cases"][case]["params"]

    def linear(name: str, x: Tensor, width: int) -> Tensor:
        weight = torch.from_numpy(value(f"{name}.weight", (width, x.shape[-1])))
        return F.linear(x, weight, torch.from_numpy(value(f"{name}.bias", (width,))))

    # (N, B, C) as the published code holds them: transposed views, never copied.
    query, key, values = (golden[f"{case}.{name}"] for name in "QKV")
    if params.get("use_linear", True):
        query, key, values = (
            linear(f"linear_{name}", x, params["d_model"])
            for name, x in zip("QKV", (query, key, values), strict=True)
        )
    scale = None
    if "max_mem_len_ratio" in params:
        ratio = math.log(key.shape[0] / query.shape[0]) / math.log(params["max_mem_len_ratio"])
        scale = ratio / math.sqrt(query.shape[2] / params["num_head"])
    with vosops.use_backend(backend):
        read, usage = vosops.attention(
            *(x.transpose(0, 1) for x in (query, key, values)),
            num_heads=params["num_head"],
            scale=scale,
            top_k=params.get("top_k"),
            distance=params.get("use_dis", False),
            return_usage=True,
        )
    golden.check(f"{case}.out", linear("projection", read.transpose(0, 1), params["d_model"]))
    attn = golden[f"{case}.attn"]
    atol = golden.config["noise"][f"{case}.attn"]["atol"] * math.sqrt(attn[0, :, :, 0].numel())
    torch.testing.assert_close(usage, attn.sum((1, 2)), rtol=1e-4, atol=atol)
