# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compiled ahead of time, as they would be launched, for GPUs that need not be there.

The launchers run on meta tensors and their launches are recorded (`recorder`); each distinct one is compiled
for an architecture (`check`). No registers may spill, products must use the matrix units, and the shared
memory must fit. `EVERYTHING`, set by VOSOPS_TEST_COMPILE=all, asks for every shape and type.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from vosops.ops import backends

JITFunction = pytest.importorskip("triton.runtime.jit", reason="triton is not installed").JITFunction
needs_compiler = pytest.mark.skipif(backends.interpreted(), reason="TRITON_INTERPRET replaces the compiler")

EVERYTHING = os.environ.get("VOSOPS_TEST_COMPILE") == "all"
PROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H200, B200: decides how work is split
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can ask for
# PTX of the matrix units: one product of a warp (all architectures), of a warp group, of a whole block.
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """What decides the machine code of one launch."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        types = " ".join(kind for _, kind in self.signature if kind != "constexpr")
        return f"{self.kernel.__name__}({types}; {constants}; {options})"


def launch_of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """The specialisation that Triton's own binder would choose for these arguments."""
    signature, constants, aligned = [], [], []
    given = {**dict(zip(kernel.arg_names, arguments, strict=False))}
    for index, name in enumerate(kernel.arg_names):
        value = given.get(name, options.get(name))
        if name in options or value is None or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        if isinstance(value, Tensor):
            signature.append((name, POINTERS[value.dtype]))
            start = value.storage_offset() * value.element_size()
        elif type(value) is int:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            start = value
        else:
            assert type(value) is float, f"{kernel.__name__}: {name} is {value!r}"
            signature.append((name, "fp32"))
            continue
        if start % 16 == 0:
            aligned.append(index)
    launched = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return Launch(kernel, tuple(signature), tuple(constants), tuple(aligned), tuple(launched.items()))


def recorder(modules: Sequence[str], architecture: int, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """A list that takes in what the launchers in `modules` launch from now on; nothing runs.

    The launchers see the processors and the capability of `architecture`; give them meta tensors.
    """
    recorded: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(type(size) is int and size >= 1 for size in grid)
            assert max((1, *grid[1:])) <= 65535, f"{self.kernel.__name__}: grid {grid}"

            def record(*arguments: Any, **options: Any) -> None:
                recorded.append(launch_of(self.kernel, arguments, options))

            return record

    common = importlib.import_module("vosops.ops.launch")
    launch = common.launch
    monkeypatch.setattr(common, "processors", lambda device: PROCESSORS[architecture])
    monkeypatch.setattr(common, "capability", lambda device: divmod(architecture, 10))
    for name in modules:
        module = importlib.import_module(name)
        for asked in ("processors", "capability"):
            if hasattr(module, asked):
                monkeypatch.setattr(module, asked, getattr(common, asked))
        if hasattr(module, "launch"):
            monkeypatch.setattr(
                module,
                "launch",
                lambda kernel, grid, *arguments, **options: launch(
                    Recorder(kernel), grid, *arguments, **options
                ),
            )
    return recorded


def kernels_of(modules: Sequence[str]) -> set[str]:
    """Names of the kernels that the launchers in `modules` hand to `launch`, as the source says."""
    written: set[str] = set()
    for name in modules:
        source = Path(str(importlib.import_module(name).__file__)).read_text()
        written |= set(re.findall(r"launch\(\s*(\w+_kernel|[a-z]+_[a-z]+),", source))
    return written


def check_cases(
    cases: Iterable[tuple[Any, torch.dtype]],
    launches: Callable[[Any, torch.dtype, int, pytest.MonkeyPatch], list[Launch]],
    architecture: int,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
) -> None:
    """`check` of every distinct launch of the cases: calls with a name, and their types."""
    distinct: dict[Launch, str] = {}
    for call, dtype in cases:
        with monkeypatch.context() as patch:
            for launch in launches(call, dtype, architecture, patch):
                distinct.setdefault(launch, f"{call.name}, {str(dtype).removeprefix('torch.')}")
    check(distinct, architecture, monkeypatch, folder)


def check(
    distinct: dict[Launch, str], architecture: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Compiles every launch and fails with all that is wrong; the strings say where a launch comes from."""

    def complain(item: tuple[int, Launch]) -> list[str]:
        place = folder / str(item[0])
        place.mkdir()
        return _complaints(item[1], architecture, place)

    # Python 3.11 miscounts the depth of two parses at once and fails.
    parse, alone = JITFunction.parse, Lock()

    def parse_alone(kernel: Any) -> Any:
        with alone:
            return parse(kernel)

    monkeypatch.setattr(JITFunction, "parse", parse_alone)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(complain, enumerate(distinct)))
    wrong = [
        f"{where}: {'; '.join(found)}: {launch}"
        for (launch, where), found in zip(distinct.items(), results, strict=True)
        if found
    ]
    if wrong:
        listing = "\n".join(wrong)
        pytest.fail(
            f"{len(wrong)} of {len(distinct)} launches on sm_{architecture}:\n{listing}", pytrace=False
        )


def _complaints(launch: Launch, architecture: int, folder: Path) -> list[str]:
    """What is wrong with the machine code of one launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.kernel.arg_names)
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(launch.options)
    )
    found = []
    used = _resources(compiled.asm["cubin"], folder)
    if used["STACK"] or used["LOCAL"]:
        found.append(f"spills {used['STACK'] + used['LOCAL']} bytes a thread at {used['REG']} registers")
    if compiled.metadata.shared > SHARED_LIMIT[architecture]:
        found.append(f"needs {compiled.metadata.shared} bytes of shared memory")
    if "tt.dot" in compiled.asm["ttir"] and not MATRIX.search(compiled.asm["ptx"]):
        found.append("multiplies without the matrix units")
    return found


def _resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers and bytes of stack (spills and indexed arrays) of a thread, as the machine code says."""
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is absent: neither Triton nor a CUDA toolkit has brought it")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    listing = subprocess.run(
        [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    assert set(found) == {"REG", "STACK", "LOCAL"}, listing
    return found
