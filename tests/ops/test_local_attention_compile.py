# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of local attention and the identity embedding, compiled ahead of time.

`VOSOPS_TEST_COMPILE=all` compiles every shape and type for every architecture.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .triton_compile import EVERYTHING, Launch, check, kernels_of, needs_compiler, recorder

pytestmark = needs_compiler

LOCAL = "vosops.ops.local_attention.triton"
IDENTITY = "vosops.ops.identity.triton"
MODULES = (f"{LOCAL}.forward", f"{LOCAL}.backward", IDENTITY)
LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Local:
    """One shape of the standard list, as `benchmarks/shapes.py` has it."""

    name: str
    channels: int = 256
    value_channels: int = 256
    heads: int = 8
    grid: tuple[int, int] = (31, 54)
    window: int = 15
    relative: str = "weight"  # "weight", "bias" or "none"
    positions_last: bool = False  # (B, C, H, W) contiguous, where AOT has (H W, B, C)
    backward: bool = False


AOT = Local("st-aot-480p")
DEAOT = Local("st-deaot-480p", 128, 1024, 1)
AOT_BACKWARD = Local("st-aot-480p-backward", backward=True)
DEAOT_BACKWARD = Local("st-deaot-480p-backward", 128, 1024, 1, backward=True)
DAILY = (AOT, DEAOT)
MORE = (
    AOT_BACKWARD,
    DEAOT_BACKWARD,
    Local("st-aot-1080p", grid=(68, 121), backward=True),
    Local("planes", positions_last=True, backward=True),
    Local("bias", relative="bias", backward=True),
    Local("wide-window", 8, 8, 1, window=33, backward=True),
    Local("odd", 70, 70, 1, (9, 20), 7, "none", True, True),
    Local("wide-heads", 256, 256, 2, backward=True),
)
# float16 takes the code of bfloat16.
CASES: dict[int, list[tuple[Local, torch.dtype]]] = {
    80: [(AOT, LOW), (DEAOT, FULL), (AOT_BACKWARD, LOW)],
    90: [
        *product(DAILY, (LOW, FULL)),
        *product((AOT_BACKWARD, DEAOT_BACKWARD), (LOW,)),
        (AOT_BACKWARD, FULL),
    ],
    100: [(AOT, LOW), (DEAOT, LOW), (AOT_BACKWARD, LOW)],
}
if EVERYTHING:
    CASES = {key: [*product((*DAILY, *MORE), (LOW, HALF, FULL))] for key in CASES}


def empty(*shape: int, dtype: torch.dtype = FULL) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def run_local(call: Local, dtype: torch.dtype) -> None:
    def cells(channels: int) -> Tensor:
        map_ = empty(1, *call.grid, channels, dtype=dtype).permute(0, 3, 1, 2)
        return map_.contiguous() if call.positions_last else map_

    operators = importlib.import_module(LOCAL)
    offsets, weight = call.window**2, call.relative == "weight"
    arguments = (
        *(cells(call.channels), cells(call.channels), cells(call.value_channels)),
        empty(1, call.heads, offsets, *call.grid, dtype=dtype) if call.relative == "bias" else None,
        empty(call.heads * offsets, call.channels // call.heads) if weight else None,
        empty(call.heads * offsets) if weight else None,
        empty(call.heads, call.value_channels // call.heads, offsets) if call.heads > 1 else None,
        *(call.heads, call.window, 1, 0.2),
    )
    read, lse = operators.local_attention(*arguments)
    if call.backward:
        operators.local_attention_backward(read, lse, lse, *arguments)


def run_identity(weight: torch.dtype) -> None:
    operators = importlib.import_module(IDENTITY)
    labels, table = empty(1, 481, 849, dtype=torch.uint8), empty(256, 11, 17, 17, dtype=weight)
    result = operators.identity_embedding(labels, table, empty(256), 16, 8)
    operators.identity_embedding_backward(result, labels, table, 16, 8)


def distinct_launches(
    runs: list[tuple[str, Callable[[], None]]], architecture: int, monkeypatch: pytest.MonkeyPatch
) -> dict[Launch, str]:
    """What the runs launch -> which of them does."""
    distinct: dict[Launch, str] = {}
    recorded = recorder(MODULES, architecture, monkeypatch)
    for name, run in runs:
        run()
        assert recorded
        for launch in recorded:
            distinct.setdefault(launch, name)
        recorded.clear()
    return distinct


def runs_of(architecture: int) -> list[tuple[str, Callable[[], None]]]:
    kinds = (LOW, HALF, FULL) if EVERYTHING else (LOW,)
    return [
        *((f"{call.name}, {kind}", partial(run_local, call, kind)) for call, kind in CASES[architecture]),
        *((f"identity-480p, {kind}", partial(run_identity, kind)) for kind in kinds),
    ]


@pytest.mark.parametrize("architecture", CASES)
def test_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check(
        distinct_launches(runs_of(architecture), architecture, monkeypatch),
        architecture,
        monkeypatch,
        tmp_path,
    )


def test_every_kernel_is_launched_by_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = distinct_launches(runs_of(90), 90, monkeypatch)
    assert {launch.kernel.__name__ for launch in launched} == kernels_of(MODULES)
