# SPDX-License-Identifier: Apache-2.0
"""Local attention: NaN, empty and bad inputs, registration, determinism and memory."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.local_attention import schema
from vosops.ops.local_attention.problem import build_window

from .test_local_attention import arguments, results

OPS = torch.ops.vosops
MIB = 1 << 20


def raw(options: dict[str, Any]) -> tuple[Any, ...]:
    """The same call's arguments of the torch operator."""
    names = ("relative_bias", "relative_weight", "relative_offset", "relative_value")
    relative = (options.get(name) for name in names)
    scale = (options["query"].shape[1] // options["num_heads"]) ** -0.5
    sizes = (options["num_heads"], options["window"], options["dilation"], scale)
    return (options["query"], options["key"], options["value"], *relative, *sizes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_nan_stays_where_it_is(dilation: int, backend: str, isa: str, cpu_backend: None) -> None:
    options = arguments(1, 16, 12, 12, 22, 2, 5, dilation)
    plain = results(options, backend)["read"]
    reach, y, x = 2 * dilation, 7, 11
    rows = [i for i in range(y - reach, y + reach + 1, dilation) if i < 12]
    columns = range(x - reach, x + reach + 1, dilation)
    seen = torch.zeros(12, 22, dtype=torch.bool)
    for row in rows:
        for column in columns:
            seen[row, column] = True
    own = torch.zeros_like(seen)
    own[y, x] = True
    for name, channel, cells, reads in (
        ("query", 3, own, range(6)),  # the first head's value channels
        ("key", 9, seen, range(6, 12)),
        ("value", 8, seen, (8,)),
    ):
        touched = options | {name: options[name].clone()}
        touched[name][0, channel, y, x] = torch.nan
        read = results(touched, backend)["read"]
        expected = torch.zeros_like(read, dtype=torch.bool)
        expected[0, list(reads)] = cells
        assert torch.equal(read.isnan(), expected), name
        assert torch.equal(read[~expected], plain[~expected]), name


def test_nan_in_bias_outside_of_the_frame_is_never_read(isa: str, cpu_backend: None) -> None:
    options = arguments(relative="bias")
    plain = vosops.local_attention(**options)
    options["relative_bias"][:, :, 0, 0, :] = torch.nan  # offsets above the first row
    assert torch.equal(vosops.local_attention(**options), plain)
    options["relative_bias"][1, 2, 12, 3, 4] = torch.nan
    expected = torch.zeros_like(plain, dtype=torch.bool)
    expected[1, 10:15, 3, 4] = True
    assert torch.equal(vosops.local_attention(**options).isnan(), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(shape: tuple[int, int, int], backend: str, cpu_backend: None) -> None:
    batch, height, width = shape
    for relative in ("weight", "bias"):
        options = arguments(batch, 8, 4, height, width, 2, 3, 1, relative)
        for name, result in results(options, backend).items():
            assert result.shape == (options["value"] if name == "read" else options[name]).shape
            assert (result == 0).all()


@pytest.mark.parametrize("relative", ["weight", "bias", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(relative: str, dtype: torch.dtype, cpu_backend: None) -> None:
    options = arguments(2, 8, 12, 5, 6, 2, 3, 1, relative)
    for name in ("query", "key", "value", "relative_bias"):
        if name in options:
            options[name] = options[name].to(dtype)
    call = raw(options)
    read, lse = OPS.local_attention(*call)
    backward = (torch.ones_like(read), torch.ones_like(lse), lse, *call)
    torch.library.opcheck(OPS.local_attention_backward.default, backward)
    leaves = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in call)
    torch.library.opcheck(OPS.local_attention.default, leaves)


def test_raw_operator_differentiates_log_sum_exp(cpu_backend: None) -> None:
    """d lse / d relative_bias is the weights, which sum to 1."""
    options = arguments(relative="bias")
    options["relative_bias"].requires_grad_()
    lse = OPS.local_attention(*raw(options))[1]
    lse.sum().backward()
    torch.testing.assert_close(
        options["relative_bias"].grad.sum(2), torch.ones_like(lse), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("relative", ["weight", "bias"])
def test_compile_fullgraph_with_gradients(relative: str, cpu_backend: None) -> None:
    torch._dynamo.reset()

    def loss(options: dict[str, Any]) -> Tensor:
        return vosops.local_attention(**options).square().sum()

    plain, traced = (arguments(relative=relative) for _ in range(2))
    for options in (plain, traced):
        for x in options.values():
            if isinstance(x, Tensor):
                x.requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    for name, x in plain.items():
        if isinstance(x, Tensor):
            torch.testing.assert_close(traced[name].grad, x.grad, rtol=1e-5, atol=1e-5)


def test_export_and_autocast(cpu_backend: None) -> None:
    class Short(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return vosops.local_attention(query, key, value, num_heads=4, window=5)

    options = arguments(relative="none")
    tensors = tuple(options[name] for name in ("query", "key", "value"))
    program = torch.export.export(Short(), tensors)
    assert "vosops.local_attention.default" in {str(node.target) for node in program.graph.nodes}
    assert torch.equal(program.module()(*tensors), Short()(*tensors))
    for backend in ("cpu", "reference"):
        with vosops.use_backend(backend):
            plain = Short()(*tensors)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(Short()(*tensors), plain)


def test_deterministic_and_independent_of_threads(isa: str, cpu_backend: None) -> None:
    options = arguments(1, 32, 24, 26, 20, 1, 7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, second = results(options, "cpu"), results(options, "cpu")
        torch.set_num_threads(1)
        alone = results(options, "cpu")
    finally:
        torch.set_num_threads(before)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        # Parts of a plane are added up in another order.
        torch.testing.assert_close(alone[name], first[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(alone["read"], first["read"])


def test_backend_choice() -> None:
    options = arguments(relative="none", window=17, dilation=2)
    with vosops.use_backend("cuda"), pytest.raises(vosops.BackendError) as refused:
        vosops.local_attention(**options)
    for reason in (
        "must all be bfloat16 or all float16, got float32, float32, float32",
        "a head of query must have a multiple of 8 channels, at most 128, got 6",
        "a head of value must have a multiple of 8 channels, at most 1024, got 5",
        "window must be at most 15, got 17",
        "dilation must be 1, got 2",
    ):
        assert reason in str(refused.value)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with (
        vosops.use_backend("cpu"),
        pytest.raises(vosops.BackendError, match="query has dtype torch.float64, it serves float32"),
    ):
        vosops.local_attention(**wide)


BAD: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"query": [1.0]}, TypeError, r"query must be a tensor \(B, C, H, W\), got list"),
    ({"key": torch.zeros(2, 24, 7, 9, dtype=torch.int32)}, TypeError, "key must have dtype float32.*int32"),
    ({"value": torch.zeros(2, 24, 7)}, ValueError, r"value must have 4 dimensions .* got shape \[2, 24, 7\]"),
    (
        {"key": torch.zeros(2, 24, 7, 8)},
        ValueError,
        r"key must have shape .*\[2, 24, 7, 9\], got \[2, 24, 7, 8\]",
    ),
    (
        {"value": torch.zeros(1, 20, 7, 9)},
        ValueError,
        r"value must have shape .*\[2, 20, 7, 9\], got \[1, 20",
    ),
    ({"num_heads": 5}, ValueError, "query must have a positive multiple of num_heads = 5 channels, got 24"),
    ({"value": torch.zeros(2, 6, 7, 9)}, ValueError, "value must have a positive multiple of num_heads = 4"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got float"),
    ({"window": 4}, ValueError, "window must be odd, got 4"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"dilation": True}, TypeError, "dilation must be an integer, got bool"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ({"scale": float("nan")}, ValueError, "scale must be a finite number or None"),
    (
        {"relative_bias": torch.zeros(2, 4, 25, 7, 9)},
        ValueError,
        "relative_bias and relative_weight are two forms",
    ),
    ({"relative_weight": None}, ValueError, "relative_offset belongs to relative_weight"),
    (
        {"relative_weight": None, "relative_offset": None, "relative_bias": torch.zeros(2, 4, 24, 7, 9)},
        ValueError,
        r"relative_bias must have shape \(B, h, window\^2, H, W\) = \[2, 4, 25, 7, 9\]",
    ),
    (
        {"relative_weight": torch.zeros(100, 5)},
        ValueError,
        r"relative_weight must have shape \(h \* window\^2, C / h\) = \[100, 6\], got \[100, 5\]",
    ),
    ({"relative_offset": torch.zeros(99)}, ValueError, r"relative_offset must have shape .* got \[99\]"),
    ({"relative_value": torch.zeros(4, 25, 5)}, ValueError, r"relative_value must have shape .*\[4, 5, 25\]"),
    (
        {"relative_value": torch.zeros(4, 5, 25, device="meta")},
        ValueError,
        "relative_value is on meta, but query",
    ),
)


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vosops.local_attention(**{**arguments(), **change})


def test_raw_operator_checks_sizes(cpu_backend: None) -> None:
    """What bypasses the checks of the public function never reads outside of a tensor."""
    options = arguments()
    for change, message in (
        ({"key": torch.zeros(2, 24, 7, 8)}, "batch and the map of query"),
        ({"num_heads": 5}, "num_heads must divide"),
        ({"value": torch.zeros(2, 0, 7, 9), "relative_value": None}, "there must be some"),
        ({"relative_weight": torch.zeros(4, 6)}, "relative_weight must be"),
        ({"relative_value": torch.zeros(4, 5, 24)}, "relative_value must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            OPS.local_attention(*raw({**options, **change}))
    call = raw(options)
    lse = OPS.local_attention(*call)[1]
    with pytest.raises(RuntimeError, match="grad_read must have the shape of value"):
        OPS.local_attention_backward(torch.zeros(2, 7, 9, 20), lse, lse, *call)


def test_scale_defaults_to_the_width_of_a_head() -> None:
    options = arguments()
    p = build_window(
        *(options[name] for name in ("query", "key", "value")), 4, 5, 1, None, None, None, None, None
    )
    assert p.scale == 6**-0.5
    assert set(p.tensors()) == {"query", "key", "value"}
    assert len(schema._OPERANDS.split("Tensor")) - 1 == schema._TENSORS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_linear_and_does_not_grow(cpu_backend: None) -> None:
    """Forward and backward of 60 x 60 cells: unfolded keys would be 440 MiB, Q x Q scores 198 MiB."""

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{field}:")[1].split()[0]) * 1024

    options = arguments(1, 128, 128, 60, 60, 4, 15)
    results(options, "cpu")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    results(options, "cpu")
    assert resident("VmHWM") - before < 60 * MIB
    small = arguments()

    def settled() -> int:
        for _ in range(20):
            results(small, "cpu")
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return resident("VmRSS")

    settled()
    before = settled()
    settled()
    assert settled() - before < MIB
