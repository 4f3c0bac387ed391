# SPDX-License-Identifier: Apache-2.0
"""Attention's launches of the memory read's Triton kernels, compiled ahead of time (`triton_compile`).

`VOSOPS_TEST_COMPILE=all` compiles every shape and type for every architecture, which takes some minutes for
each; otherwise what is in daily use.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .triton_compile import EVERYTHING, Launch, check_cases, needs_compiler, recorder

pytestmark = needs_compiler

READ = "vosops.ops.memory_read.triton"
MODULES = tuple(f"{READ}.{name}" for name in ("match", "dense", "dense_backward", "gather"))


@dataclass(frozen=True)
class Call:
    """One shape of the standard list, as `benchmarks/shapes.py` has it; `top_k` None attends densely."""

    name: str
    memory: int
    queries: int = 1674  # 31 x 54
    channels: int = 256
    values: tuple[int, ...] = (256,)
    heads: int = 8
    top_k: int | None = None
    batch: int = 1
    identity: bool = False
    gate: int = 0  # channels of the gate on the keys
    distance: bool = False
    layout: str = "sequence_first"
    usage: bool = False
    backward: bool = False


AOT = Call("lt-aotl-t10", 16740)
AOT_K32 = Call("lt-aotl-t10-k32", 16740, top_k=32)
DEAOT = Call("lt-deaot-t10", 16740, channels=128, values=(512, 512), heads=1)
SELF = Call("self-aotl", 1674)
AOT_BACKWARD = Call("lt-aotl-t10-backward", 16740, backward=True)
DEAOT_BACKWARD = Call("lt-deaot-t10-backward", 16740, channels=128, values=(512, 512), heads=1, backward=True)
DAILY = (AOT, AOT_K32, DEAOT, SELF)
BACKWARD = (AOT_BACKWARD, DEAOT_BACKWARD)
MORE = (
    *BACKWARD,
    Call("lstt-v2", 16740, identity=True, gate=8, usage=True, backward=True),
    Call("lstt-v2-k32", 16740, identity=True, gate=1, top_k=32, backward=True),
    Call("distance", 16740, distance=True, gate=1, usage=True, backward=True),
    Call("distance-k128", 16740, distance=True, gate=1, top_k=128),
    Call("contiguous", 16740, batch=2, layout="contiguous", usage=True),
    Call("channel-major", 16740, channels=1024, identity=True, layout="channel_major", backward=True),
    Call("deaot-usage", 16740, channels=128, values=(1024,), heads=1, layout="contiguous", usage=True),
    Call("one-query", 16740, queries=1),
    Call("one-channel", 1674, channels=8, values=(8,), backward=True),
    Call("odd", 1675, channels=36, values=(30, 9), heads=3, gate=3, batch=2, backward=True),
)


def launches(
    call: Call, dtype: torch.dtype, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> list[Launch]:
    """Every launch of a call's operators, without tensors of numbers and without a GPU."""
    recorded = recorder(MODULES, architecture, monkeypatch)
    ours = importlib.import_module("vosops.ops.attention.triton")
    gather = importlib.import_module(f"{READ}.gather")

    def empty(count: int, width: int) -> Tensor:
        shape = {
            "sequence_first": (count, call.batch, width),
            "contiguous": (call.batch, count, width),
            "channel_major": (call.batch, width, count),
        }[call.layout]
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        return {
            "sequence_first": tensor.transpose(0, 1),
            "contiguous": tensor,
            "channel_major": tensor.mT,
        }[call.layout]

    heads = call.heads
    values = [empty(call.memory, width) for width in call.values]
    identity = empty(call.memory, sum(call.values)) if call.identity else None
    scores = (
        empty(call.queries, call.channels),
        empty(call.memory, call.channels),
        empty(call.memory, call.gate) if call.gate else None,
        heads,
        call.distance,
        (call.channels // heads) ** -0.5,
    )
    if call.top_k is not None:
        indices, weights = ours.attention_match(*scores, call.top_k)
        of_head = values[0].unflatten(2, (heads, -1)).permute(0, 2, 3, 1)[0][:, None]  # [h, 1, Cv/h, M]
        read = gather.gather(indices[0], weights[0], of_head)
        if call.backward:
            gather.gather_backward(read, indices[0], weights[0], of_head, True)
        return recorded
    read, lse = ours.attention_dense(*scores, values, identity)
    if call.usage:
        ours.attention_usage(*scores, lse)
    if call.backward:
        whole = values[0] if len(values) == 1 else torch.cat(values, 2)
        grad = read.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)  # [B, h, Cv/h, Q]
        ours.attention_dense_backward(*scores, whole, identity, grad, lse, lse)
    return recorded


LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
CASES: dict[int, list[tuple[Call, torch.dtype]]] = {
    80: [(AOT, LOW), (DEAOT, LOW), (AOT, FULL)],
    90: [
        *((call, LOW) for call in (*DAILY, *BACKWARD)),
        *((call, FULL) for call in (AOT, DEAOT, AOT_BACKWARD)),
    ],
    100: [(AOT, LOW), (DEAOT, LOW)],
}
if EVERYTHING:
    every = [(call, dtype) for call in (*DAILY, *MORE) for dtype in (LOW, HALF, FULL)]
    CASES = dict.fromkeys(CASES, every)


@pytest.mark.parametrize("architecture", CASES)
def test_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_cases(CASES[architecture], launches, architecture, monkeypatch, tmp_path)
