# SPDX-License-Identifier: Apache-2.0
"""Peak extra memory, growth over repeated calls, and no code that crosses instruction sets."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vosops
from vosops.ops.memory_read.problem import Scores

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
MIB = 1 << 20


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes of resident memory that `call` needs beyond what is there before it, its result included."""
    call()  # thread pools and code are loaded once
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def xmem(queries: tuple[int, int], memory: int, objects: int = 1) -> dict:
    return {
        "query_key": torch.randn(1, 64, *queries),
        "memory_key": torch.randn(1, 64, memory),
        "memory_value": torch.randn(1, objects, 512, memory),
        "similarity": "l2",
        "shrinkage": 1 + torch.rand(1, 1, memory),
        "selection": torch.rand(1, 64, *queries),
        "top_k": 30,
    }


def test_top_k_at_the_memory_cap_needs_a_twentieth_of_eager() -> None:
    """Eager holds five matrices of Q x M floats while it computes the similarity."""
    arguments = xmem((30, 54), 26_200)
    one_matrix = 1620 * 26_200 * 4
    assert peak_extra(lambda: vosops.memory_read(**arguments)) < 5 * one_matrix / 20


def test_1080p_at_the_memory_cap_needs_less_than_a_gigabyte() -> None:
    arguments = xmem((68, 120), 83_440)
    assert peak_extra(lambda: vosops.memory_read(**arguments)) < 200 * MIB


@pytest.mark.parametrize("dense", [False, True])
def test_backward_never_holds_the_whole_matrix(dense: bool) -> None:
    q = torch.randn(1, 8, 8000, requires_grad=True)
    k = torch.randn(1, 8, 20_000, requires_grad=True)
    v = torch.randn(1, 1, 8, 20_000, requires_grad=True)
    matrix = 8000 * 20_000 * 4

    def step() -> None:
        vosops.memory_read(q, k, v, top_k=None if dense else 20).sum().backward()

    assert peak_extra(step) < matrix / 3


@pytest.mark.parametrize("top_k", [None, 20])
def test_memory_does_not_grow(top_k: int | None) -> None:
    q, k = torch.randn(1, 8, 300), torch.randn(1, 8, 2000)
    v = torch.randn(1, 1, 64, 2000, requires_grad=True)

    def step() -> None:
        vosops.memory_read(q, k, v, top_k=top_k, prior=None).sum().backward()
        v.grad = None

    def settled() -> int:
        for _ in range(30):
            step()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return resident("VmRSS")

    settled()
    before = settled()
    settled()
    # One leaked read a step would be 30 x 75 KiB of output and 30 x 2.3 MiB of weights.
    assert settled() - before < MIB


def test_offsets_beyond_2_31(isa: str) -> None:
    """A memory that is a view with a stride so large that positions lie more than 2^31 elements apart."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # or all of it would be touched
    stride = 1_100_000_000
    try:
        storage = torch.empty(
            2 * stride + 64, dtype=torch.bfloat16
        )  # 4.4 GB of address space, touched sparsely
    except RuntimeError:
        pytest.skip("no address space for 4.4 GB")
    keys = storage.as_strided((1, 8, 3), (0, 1, stride))
    values = storage.as_strided((1, 1, 4, 3), (0, 0, 1, stride), 16)
    small_keys, small_values = torch.randn(1, 8, 3).bfloat16(), torch.randn(1, 1, 4, 3).bfloat16()
    keys.copy_(small_keys)
    values.copy_(small_values)
    query = torch.randn(1, 8, 5)
    for top_k in (None, 2):
        expected = vosops.memory_read(query, small_keys, small_values, top_k=top_k)
        torch.testing.assert_close(vosops.memory_read(query, keys, values, top_k=top_k), expected)


def test_no_code_is_shared_between_instruction_sets() -> None:
    """A standard template built for AVX-512 and merged by the linker would crash older CPUs."""
    library = Path(vosops.__file__).parent / "_lib" / "libvosops_cpu.so"
    if shutil.which("objdump") is None:
        pytest.skip("objdump is absent")
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    function, offenders, seen = "", set(), set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif "%ymm" in line or "%zmm" in line:
            seen.add("zmm" if "%zmm" in line else "ymm")
            if "vosops::avx" not in function:
                offenders.add(function)
    if "zmm" not in seen:
        pytest.skip("not an x86 build")
    assert not offenders


def test_scores_lists_its_tensors() -> None:
    q, k = torch.ones(1, 2, 3), torch.ones(1, 2, 4)
    assert list(Scores(q, k, None, None, None, "dot", 1.0).tensors()) == ["query_key", "memory_key"]
