# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, as it would be launched, compiled ahead of time for GPUs that need not be there.

The launchers run on meta tensors of the standard shapes and their launches are recorded; each distinct one
is compiled for three architectures. No registers may spill, products must use the matrix units, and the
shared memory must fit. `VOSOPS_TEST_COMPILE=all` compiles every shape and type for every architecture, which
takes some minutes for each; otherwise what is in daily use.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

from vosops.ops import backends
from vosops.ops.memory_read.problem import Scores

JITFunction = pytest.importorskip("triton.runtime.jit", reason="triton is not installed").JITFunction
pytestmark = pytest.mark.skipif(backends.interpreted(), reason="TRITON_INTERPRET replaces the compiler")

READ = "vosops.ops.memory_read.triton"
MODULES = (
    *(f"{READ}.{name}" for name in ("match", "dense", "dense_backward", "gather", "best_query")),
    "vosops.ops.aggregate.triton",
)
EVERYTHING = os.environ.get("VOSOPS_TEST_COMPILE") == "all"
PROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H200, B200: decides how the memory is split
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block can ask for
REGISTERS = 65536  # of a multiprocessor, all architectures
# PTX of the matrix units: one product of a warp (all architectures), of a warp group, of a whole block.
MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


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
    monkeypatch.setattr(common, "processors", lambda device: PROCESSORS[architecture])
    monkeypatch.setattr(common, "capability", lambda device: divmod(architecture, 10))
    modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES}
    for module in modules.values():
        for name in ("processors", "capability"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(common, name))
        monkeypatch.setattr(
            module,
            "launch",
            lambda kernel, grid, *arguments, **options: common.launch(
                Recorder(kernel), grid, *arguments, **options
            ),
        )

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


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
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


def complaints(launch: Launch, architecture: int, folder: Path) -> list[str]:
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
    used = resources(compiled.asm["cubin"], folder)
    if used["STACK"] or used["LOCAL"]:
        found.append(f"spills {used['STACK'] + used['LOCAL']} bytes a thread at {used['REG']} registers")
    if compiled.metadata.shared > SHARED_LIMIT[architecture]:
        found.append(f"needs {compiled.metadata.shared} bytes of shared memory")
    if "tt.dot" in compiled.asm["ttir"] and not MATRIX.search(compiled.asm["ptx"]):
        found.append("multiplies without the matrix units")
    return found


@pytest.mark.parametrize("architecture", CASES)
def test_compiles(architecture: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    distinct: dict[Launch, str] = {}
    for call, dtype in CASES[architecture]:
        for launch in launches(call, dtype, architecture, monkeypatch):
            distinct.setdefault(launch, f"{call.name}, {str(dtype).removeprefix('torch.')}")

    def check(item: tuple[int, Launch]) -> list[str]:
        folder = tmp_path / str(item[0])
        folder.mkdir()
        return complaints(item[1], architecture, folder)

    # Python 3.11 miscounts the depth of two parses at once and fails.
    parse, alone = JITFunction.parse, Lock()

    def parse_alone(kernel: Any) -> Any:
        with alone:
            return parse(kernel)

    monkeypatch.setattr(JITFunction, "parse", parse_alone)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(check, enumerate(distinct)))
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


def test_every_kernel_is_launched_by_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {
        launch.kernel.__name__
        for call in (*DAILY, *BACKWARD)
        for launch in launches(call, torch.bfloat16, 90, monkeypatch)
    }
    written = set()
    for name in MODULES:
        source = Path(str(importlib.import_module(name).__file__)).read_text()
        written |= set(re.findall(r"launch\(\s*(\w+_kernel|[a-z]+_[a-z]+),", source))
    assert launched == written


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
