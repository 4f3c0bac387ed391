# SPDX-License-Identifier: Apache-2.0
"""Numbers of the public reference implementations (tests/golden/README.md), for every backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops import backends

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    reasons = backends.reasons_against(request.param, {})
    if reasons:
        pytest.skip("; ".join(reasons))
    with vosops.use_backend(request.param):
        yield


class Golden:
    """The arrays of one case, and comparison within the file's own measured tolerance."""

    def __init__(self, file: str, case: str) -> None:
        self.arrays = np.load(GOLDEN / f"{file}.npz")
        config = json.loads(str(self.arrays["config"]))
        self.params, self.noise = config["cases"][case]["params"], config["noise"]
        self.case = case

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[f"{self.case}.{name}"])

    def check(self, result: Tensor, name: str) -> None:
        expected = self[name]
        atol = self.noise[f"{self.case}.{name}"]["atol"]
        torch.testing.assert_close(result.reshape(expected.shape), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("case", ["case0", "case1"])
def test_stm(case: str) -> None:
    golden = Golden("ops_memory_read_stm", case)
    value = golden["memory_value"][:, None]  # one object per batch entry
    read = vosops.memory_read(golden["query_key"], golden["memory_key"], value)
    golden.check(read, "read")


@pytest.mark.parametrize("case", ["case0", "case1", "case2"])
def test_stcn(case: str) -> None:
    golden = Golden("ops_memory_read_stcn", case)
    memory_key = golden["memory_key"].transpose(0, 1)[None]  # [1, Ck, T, H, W]
    memory_value = golden["memory_value"].permute(1, 2, 0, 3, 4)[None]  # [1, O, Cv, T, H, W]
    options = {"similarity": "l2", "top_k": golden.params["top_k"]}
    if golden.params["temp"]:  # only the newest temporary memory counts
        frames = [*range(golden.params["T"]), memory_key.shape[2] - 1]
        memory_key, memory_value = memory_key[:, :, frames], memory_value[:, :, :, frames]
    read, usage = vosops.memory_read(
        golden["query_key"], memory_key, memory_value, return_usage=True, **options
    )
    golden.check(read, "read")
    torch.testing.assert_close(usage.flatten(1), golden["affinity"].sum(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [f"case{i}" for i in range(5)])
def test_xmem_and_cutie(case: str) -> None:
    golden = Golden("ops_memory_read_xmem", case)
    params = golden.params
    keys = (golden["query_key"], golden["memory_key"], golden["memory_value"][:, None])
    options = {
        "similarity": "l2",
        "shrinkage": golden["shrinkage"] if params["shrinkage"] else None,
        "selection": golden["selection"] if params["selection"] else None,
        "return_usage": True,
    }
    for top_k, suffix in ((params["top_k"], ""), (None, "_no_top_k")):
        read, usage = vosops.memory_read(*keys, top_k=top_k, **options)
        golden.check(read, f"read{suffix}")
        golden.check(usage, f"usage{suffix}")


@pytest.mark.parametrize("case", [f"kernel{i}" for i in range(6)])
def test_kernelized_and_plain_mivos(case: str) -> None:
    golden = Golden("ops_memory_read_kernel", case)
    sigma, top_k = golden.params["sigma"], golden.params["top_k"]
    read = vosops.memory_read(
        golden["query_key"],
        golden["memory_key"],
        golden["memory_value"][:, None],
        top_k=top_k,
        prior=vosops.KernelPrior(sigma) if sigma else None,
    )
    golden.check(read, "read")


@pytest.mark.parametrize("case", ["hmmn0", "hmmn1", "hmmn2"])
def test_hmmn(case: str) -> None:
    """The windowed form is checked on the first read: later ones chain the argmax outside the operator."""
    golden = Golden("ops_memory_read_kernel", case)
    params = golden.params
    keys, values = golden["memory_key"], golden["memory_value"]
    windowed = params["window"] > 0
    prior = vosops.KernelPrior(params["sigma"], window=params["window"] if windowed else None)
    reads = []
    for t in range(1, 2 if windowed else params["frames"]):
        bank = sorted({f for f in range(t) if f % params["mem_every"] == 0} | {t - 1})
        key, value = keys[bank].permute(1, 2, 0, 3, 4), values[bank].permute(1, 2, 0, 3, 4)[:, None]
        reads.append(vosops.memory_read(golden["query_key"][t], key, value, prior=prior)[:, 0])
    read, expected = torch.stack(reads), golden["read"]
    atol = golden.noise[f"{case}.read"]["atol"]
    torch.testing.assert_close(read, expected[: len(reads)], rtol=1e-4, atol=atol)


def test_soft_aggregation() -> None:
    golden = Golden("ops_soft_aggregate", "probabilities")
    logits = vosops.soft_aggregate(golden["prob"][None])
    golden.check(logits.softmax(1)[0], "stcn_prob")
    golden.check(logits.softmax(1)[0], "xmem_prob")
    golden.check(logits[0], "xmem_logits")
    golden.check(logits[0], "stm_logits")
