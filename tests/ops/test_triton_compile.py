# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel of the memory read and the aggregation, compiled ahead of time (`triton_compile`).

`VOSOPS_TEST_COMPILE=all` compiles every shape and type for every architecture, which takes some minutes for
each; otherwise what is in daily use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vosops.ops.memory_read.problem import Scores

from .triton_compile import EVERYTHING, Launch, check_cases, kernels_of, launch_of, needs_compiler, recorder

pytestmark = needs_compiler

READ = "vosops.ops.memory_read.triton"
MODULES = (
    *(f"{READ}.{name}" for name in ("match", "dense", "dense_backward", "gather", "best_query")),
    "vosops.ops.aggregate.triton",
)


@dataclass(frozen=True)
class Call:
    """One shape of the standard list, as `benchmarks/shapes.py` has it; `top_k` None reads densely."""

    name: str
    memory: int
    key_channels: int = 64
    width: tuple[int, int] = (1, 512)  # objects, value channels
    top_k: int | None = None
    batch: int = 1
    grid: tuple[int, int] = (30, 54)
    similarity: str = "l2"
    modulated: bool = False
    prior: bool = False
    mask: bool = False
    layout: str = "channel_major"
    backward: bool = False


STCN1 = Call("stcn-t10-o1", 16200, top_k=20)
STCN3 = Call("stcn-t20-o3", 32400, width=(3, 512), top_k=20, layout="position_major")
XMEM = Call("xmem-cap-o1", 26200, top_k=30, modulated=True)
STM = Call("stm-t10-o2", 16200, 128, batch=2, similarity="dot")
KMN = Call("kmn-t10-o1", 16200, 128, similarity="dot", prior=True)
MASKED = Call("stcn-t10-o1-mask", 16200, top_k=20, mask=True, layout="position_major")
DAILY = (
    STCN1,
    STCN3,
    XMEM,
    Call("stcn-t10-o1-dense", 16200),
    STM,
    KMN,
    Call("kmn-t10-o1-k50", 16200, 128, top_k=50, similarity="dot", prior=True),
    MASKED,
)
BACKWARD = (
    Call("stcn-t10-o1-backward", 16200, top_k=20, backward=True),
    Call("stm-t10-o2-backward", 16200, 128, batch=2, similarity="dot", backward=True),
)
MORE = (
    *BACKWARD,
    Call("xmem-cap-o3-dense-backward", 26200, width=(3, 512), modulated=True, backward=True),
    Call("kmn-t10-o1-backward", 16200, 128, similarity="dot", prior=True, backward=True),
    Call("xmem-1080p", 83440, top_k=30, modulated=True, grid=(68, 120), layout="position_major"),
    Call("cutie-fifo-o3", 8100, width=(3, 256), top_k=30, modulated=True, mask=True),
    Call("one query", 100_000, width=(1, 8), top_k=25, grid=(1, 1)),
    Call("long", 600_000, top_k=128, layout="position_major"),
    Call("crop", 16200, 33, (2, 37), top_k=6, modulated=True, mask=True, layout="crop"),
    Call("crop-dense", 16200, 33, (2, 37), modulated=True, mask=True, layout="crop"),
    Call("ck128", 16200, 128, top_k=20, layout="position_major"),
    Call("ck128-dense", 16200, 128, width=(3, 512), layout="position_major"),
    Call("ck16-one-channel", 1620, 5, width=(1, 1), top_k=3, backward=True),
)


def place(tensor: Tensor, layout: str) -> Tensor:
    """A memory tensor (..., M) in one of the layouts; "crop" takes three strides and starts anywhere."""
    if layout == "position_major":
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "crop":
        frames = tensor.unflatten(-1, (10, 30, 54))
        return torch.nn.functional.pad(frames, (1, 2, 1, 2))[..., 1:-2, 1:-2]
    return tensor


def launches(
    call: Call, dtype: torch.dtype, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> list[Launch]:
    """Every launch of a call's operators, without tensors of numbers and without a GPU."""
    recorded = recorder(MODULES, architecture, monkeypatch)
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    batch, memory = call.batch, call.memory
    objects, channels = call.width
    value = place(empty(batch, objects, channels, memory), call.layout)
    p = Scores(
        empty(batch, call.key_channels, *call.grid),
        place(empty(batch, call.key_channels, memory), call.layout),
        place(empty(batch, 1, memory), call.layout) if call.modulated else None,
        empty(batch, call.key_channels, *call.grid) if call.modulated else None,
        empty(batch, memory, dtype=torch.bool) if call.mask else None,
        call.similarity,
        call.key_channels**-0.5,
        empty(batch, memory, 2, dtype=torch.float32) if call.prior else None,
        empty(batch, memory, dtype=torch.float32) if call.prior else None,
    )
    if call.prior:
        modules["best_query"].best_query(p, None, None, 0)
        gain = empty(batch, memory, dtype=torch.float32)
        modules["best_query"].best_query(p, empty(batch, p.queries, dtype=torch.float32), gain, 7)
    if call.top_k is not None:
        indices, weights = modules["match"].match(p, call.top_k)
        read = modules["gather"].gather(indices, weights, value)
        if call.backward:
            modules["gather"].gather_backward(read, indices, weights, value, True)
    else:
        read, lse = modules["dense"].read(p, value)
        modules["dense"].usage(p, lse)
        if call.backward:
            modules["dense_backward"].backward(p, value, read, lse, lse)
    if call.mask:  # once is enough
        logits = modules["triton"].soft_aggregate(empty(1, objects, *call.grid))
        modules["triton"].soft_aggregate_backward(logits, empty(1, objects, *call.grid))
    assert recorded
    return recorded


LOW, HALF, FULL = torch.bfloat16, torch.float16, torch.float32
# float16 takes the code of bfloat16 except where keys are squared.
CASES: dict[int, list[tuple[Call, torch.dtype]]] = {
    80: [*((call, LOW) for call in DAILY), (STCN3, FULL), (STM, FULL)],
    90: [
        *((call, dtype) for call in DAILY for dtype in (LOW, FULL)),
        (XMEM, HALF),
        *((c, LOW) for c in BACKWARD),
    ],
    100: [*((call, LOW) for call in DAILY), (STCN3, FULL), (STM, FULL)],
}
if EVERYTHING:
    every = [(call, dtype) for call in (*DAILY, *MORE) for dtype in (LOW, HALF, FULL)]
    CASES = dict.fromkeys(CASES, every)


@pytest.mark.parametrize("architecture", CASES)
def test_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_cases(CASES[architecture], launches, architecture, monkeypatch, tmp_path)


def test_every_kernel_is_launched_by_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: set[str] = set()
    for call in (*DAILY, *BACKWARD):
        with monkeypatch.context() as patch:
            launched |= {one.kernel.__name__ for one in launches(call, torch.bfloat16, 90, patch)}
    assert launched == kernels_of(MODULES)


def test_the_specialisation_is_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch_of` says what Triton's own binder says of the same integers and floats."""
    jit = importlib.import_module("triton.runtime.jit")
    base = importlib.import_module("triton.backends.compiler").BaseBackend
    specialize: Callable[..., tuple[str, Any]] | None = getattr(jit, "native_specialize_impl", None)
    if specialize is None:
        pytest.skip("this Triton has its specialisation elsewhere")

    class Kernel:
        arg_names = ("argument",)

    for value in (0, 1, 2, 16, 24, -16, 2**31 - 1, 2**31, 2**35, 0.5, 1.0):
        ours = launch_of(Kernel, (value,), {})
        kind, key = specialize(base, value, False, True, True)
        assert ours.signature == (("argument", kind),), value
        assert (ours.aligned == (0,)) == (key == "D"), value
