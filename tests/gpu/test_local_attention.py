# SPDX-License-Identifier: Apache-2.0
"""Local attention on the GPU backends: values and gradients against float64, strides, NaN, how it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vosops
from vosops.ops import backends
from vosops.ops.local_attention import limits
from vosops.ops.local_attention.problem import build_window

from ..ops.helpers import relative_error
from ..ops.test_local_attention import GOLDEN, SIZES, arguments, published, results, views
from ..ops.test_local_attention_inputs import raw
from .helpers import on
from .test_memory_read_memory import MIB, peak_extra

Options = dict[str, Any]
CPU = torch.device("cpu")
# Sums of a few hundred products in float32, or in three tf32 passes.
FLOAT = 5e-5
# What the interpreter can take, in tiles of one strip (float32) and of four (float16):
# (B, C, Cv, H, W, h, window, dilation, relative form).
SMALL = (
    (2, 6, 4, 2, 3, 2, 3, 1, "weight", torch.float32),  # heads of less than a block
    (1, 33, 34, 1, 2, 1, 3, 1, "weight", torch.float32),  # channels and value channels in several blocks
    (1, 3, 5, 5, 17, 1, 3, 1, "bias", torch.float16),  # tiles beside and above one another
    (1, 4, 4, 1, 17, 1, 17, 1, "weight", torch.float16),  # a window row in two parts, larger than the map
    (1, 4, 4, 3, 3, 1, 3, 2, "weight", torch.float16),  # planes of unequal size
    (1, 3, 2, 2, 3, 1, 1, 4, "none", torch.float16),  # planes of one position, a window of one cell
)
LARGE = (
    *SIZES,
    (1, 64, 64, 31, 54, 2, 15, 1, "weight"),
    (1, 128, 256, 13, 21, 1, 15, 1, "weight"),
    (2, 32, 48, 20, 33, 1, 7, 3, "bias"),
    (1, 300, 40, 5, 18, 1, 5, 1, "weight"),
)


def served(backend: str, options: Options) -> Options:
    """The options; skips with the backend's own reasons where it says that it cannot serve them."""
    p = build_window(
        *(options[name] for name in ("query", "key", "value", "num_heads", "window", "dilation")),
        *(options.get(f"relative_{name}") for name in ("bias", "weight", "offset", "value")),
        options.get("scale"),
    )
    reasons = backends.reasons_against(backend, p.tensors()) + limits.reasons_against(backend, p)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    return options


def ready(backend: str, device: torch.device, *size: Any, **more: Any) -> Options:
    """Options in bfloat16 that every backend serves, unless `size` says otherwise."""
    size = size or (2, 32, 48, 13, 21, 2, 7)
    return served(backend, on(device, arguments(*size, **{"dtype": torch.bfloat16, **more})))


def check(options: Options, device: torch.device, backend: str, tolerance: float) -> None:
    """The read and all gradients against float64; on a GPU and in the interpreter."""
    expected = results(options, "reference", torch.float64)
    for name, ours in results(on(device, options), backend).items():
        assert ours.isfinite().all(), name
        # Scores that cannot change anything have the gradient 0, the difference of two sums of that size.
        scale = max(float(expected[name].abs().max()), 0.5)
        assert float((ours.cpu() - expected[name]).abs().max()) < tolerance * scale, name


@pytest.mark.interpreter
@pytest.mark.parametrize("size", SMALL, ids=str)
def test_small(size: tuple[Any, ...], backend: str, device: torch.device) -> None:
    *sizes, dtype = size
    options = served(backend, arguments(*sizes, dtype=dtype))
    check(options, device, backend, FLOAT if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("size", LARGE, ids=str)
def test_values_and_gradients(size: tuple[Any, ...], backend: str, gpu: torch.device) -> None:
    check(served(backend, arguments(*size)), gpu, backend, FLOAT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size",
    [
        *LARGE,
        *(
            (1, channels, values, 14, 19, heads, 15, 1, relative)
            for channels, values, heads in ((64, 64, 2), (128, 1024, 1), (16, 8, 1))
            for relative in ("weight", "bias", "none")
        ),
    ],
    ids=str,
)
def test_low_precision(size: tuple[Any, ...], dtype: torch.dtype, backend: str, gpu: torch.device) -> None:
    """Weights, scores' gradients and tables are rounded to the operands' type, as matrix units take them."""
    options = served(backend, arguments(*size, dtype=dtype))
    assert vosops.local_attention(**on(gpu, options)).dtype == dtype
    check(options, gpu, backend, 4 * float(torch.finfo(dtype).eps))


@pytest.mark.interpreter
def test_mixed_dtypes_and_scale(backend: str, device: torch.device) -> None:
    options = arguments(1, 6, 4, 2, 3, 2, 3, 1, "bias") | {"scale": 0.7}
    options["key"] = options["key"].half()
    options["relative_bias"] = options["relative_bias"].half()
    read = vosops.local_attention(**on(device, served(backend, options)))
    assert read.dtype == torch.float32
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with vosops.use_backend("reference"):
        assert relative_error(read.cpu(), vosops.local_attention(**wide)) < FLOAT


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strides(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    options = served(backend, arguments(1, 8, 8, 3, 4, 1, 3, 1, "bias", dtype))
    plain = vosops.local_attention(**on(device, options))
    for kind, strided in views(options):
        # Another layout in registers may add up in another order.
        there = vosops.local_attention(**on(device, strided))
        assert relative_error(there, plain) < torch.finfo(dtype).eps, kind
    options["key"] = torch.ones(1, 1, 1, 1, dtype=dtype).expand(1, 8, 3, 4)
    expanded = {**on(device, options), "key": torch.ones(1, 1, 1, 1, dtype=dtype, device=device)}
    expanded["key"] = expanded["key"].expand(1, 8, 3, 4)
    contiguous = expanded | {"key": expanded["key"].contiguous()}
    ours, expected = (vosops.local_attention(**one) for one in (expanded, contiguous))
    assert relative_error(ours, expected) < torch.finfo(dtype).eps


@pytest.mark.interpreter
@pytest.mark.parametrize("dilation", [1, 2])
def test_nan_stays_where_it_is(dilation: int, backend: str, device: torch.device) -> None:
    height, width, y, x = 4, 17, 2, 6
    options = served(backend, arguments(1, 8, 8, height, width, 1, 3, dilation, dtype=torch.float16))
    plain = vosops.local_attention(**on(device, options)).cpu()
    seen = torch.zeros(height, width, dtype=torch.bool)
    seen[y % dilation :: dilation, x % dilation :: dilation] = True
    seen[: y - dilation] = seen[y + dilation + 1 :] = False
    seen[:, : x - dilation] = seen[:, x + dilation + 1 :] = False
    own = torch.zeros_like(seen)
    own[y, x] = True
    for name, channel, cells, reads in (
        ("query", 3, own, range(8)),
        ("key", 1, seen, range(8)),
        ("value", 5, seen, (5,)),
    ):
        touched = options | {name: options[name].clone()}
        touched[name][0, channel, y, x] = torch.nan
        read = vosops.local_attention(**on(device, touched)).cpu()
        expected = torch.zeros_like(read, dtype=torch.bool)
        expected[0, list(reads)] = cells
        assert torch.equal(read.isnan(), expected), name
        assert torch.equal(read[~expected], plain[~expected]), name


@pytest.mark.interpreter
def test_large_scores_and_no_match(backend: str, device: torch.device) -> None:
    """Scores far outside of what exp takes; a score of -inf never matches, and a row of them reads 0."""
    options = arguments(1, 8, 8, 3, 5, 1, 3, 1, "bias", torch.float16)
    options["query"] = 300 * options["query"]
    options["relative_bias"][0, :, :, 1, 2] = -torch.inf
    options["relative_bias"][0, :, ::2, 2, 4] = -torch.inf
    options["relative_bias"][0, :, 0, 0] = torch.nan  # above the first row: never read
    expected = arguments(1, 8, 8, 3, 5, 1, 3, 1, "bias", torch.float16)["relative_bias"][0, :, 0, 0]
    ours = results(on(device, served(backend, options)), backend)
    options["relative_bias"][0, :, 0, 0] = expected
    exact = results(options, "reference", torch.float64)
    assert (ours["read"][0, :, 1, 2] == 0).all()
    for name in ("read", "value", "relative_value"):
        torch.testing.assert_close(ours[name].cpu().double(), exact[name], rtol=2e-2, atol=2e-2)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int], backend: str, device: torch.device) -> None:
    batch, height, width = shape
    options = arguments(batch, 16, 16, height, width, 2, 3, 1, dtype=torch.float16)
    for name, result in results(on(device, served(backend, options)), backend).items():
        assert result.shape == (options["value"] if name == "read" else options[name]).shape
        assert (result == 0).all()


@pytest.mark.interpreter
def test_deterministic(backend: str, device: torch.device) -> None:
    size = (1, 16, 16, 1, 3, 1, 3) if device.type == "cpu" else (2, 64, 64, 31, 54, 2, 15)
    options = ready(backend, device, *size, dtype=torch.float16)
    first, second = results(options, backend), results(options, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("case", GOLDEN.config["cases"])
def test_published_numbers(case: str, backend: str, gpu: torch.device) -> None:
    options, weights = published(case)
    read = vosops.local_attention(**on(gpu, served(backend, options))).cpu()
    out = F.linear(read.flatten(2).permute(2, 0, 1), weights["projection.weight"], weights["projection.bias"])
    GOLDEN.check(GOLDEN.config["cases"][case]["outputs"]["out"], out)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_follows_torchs_setting(precision: str, backend: str, gpu: torch.device) -> None:
    options = served(backend, arguments(1, 64, 64, 14, 37, 2, 15))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        read = vosops.local_attention(**on(gpu, options)).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with vosops.use_backend("reference"):
        error = relative_error(read, vosops.local_attention(**wide))
    assert (error < 2e-5) if precision == "highest" else (1e-5 < error < 5e-3)


@pytest.mark.parametrize("relative", ["weight", "bias", "none"])
def test_opcheck(relative: str, backend: str, gpu: torch.device) -> None:
    call = raw(ready(backend, gpu, 2, 16, 24, 5, 6, 2, 3, 1, relative))
    call = tuple(x.float() if i in (4, 5, 6) and x is not None else x for i, x in enumerate(call))
    family = "triton_" if backend == "triton" else ""
    forward, backward = (
        getattr(torch.ops.vosops, f"{family}local_attention{end}").default for end in ("", "_backward")
    )
    read, lse = forward(*call)
    torch.library.opcheck(backward, (torch.ones_like(read), torch.ones_like(lse), lse, *call))
    torch.library.opcheck(forward, tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in call))


@pytest.mark.parametrize("relative", ["weight", "bias"])
def test_compile_fullgraph_with_gradients(relative: str, backend: str, gpu: torch.device) -> None:
    torch._dynamo.reset()

    def loss(options: Options) -> Tensor:
        return vosops.local_attention(**options).float().square().sum()

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        options = ready(backend, gpu, relative=relative)
        leaves = {name: x.requires_grad_() for name, x in options.items() if isinstance(x, Tensor)}
        call(options).backward()
        grads.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_autocast_changes_nothing(backend: str, gpu: torch.device) -> None:
    options = ready(backend, gpu)
    plain = vosops.local_attention(**options)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(vosops.local_attention(**options), plain)


@pytest.fixture
def fast(gpu: torch.device) -> torch.device:
    """The hot path as users run it: no deterministic algorithms, no filling of new memory."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    return gpu


def step_of(options: Options) -> Callable[[], tuple[Tensor, ...]]:
    """A forward and backward pass."""
    leaves = {name: x.clone().requires_grad_() for name, x in options.items() if isinstance(x, Tensor)}

    def step() -> tuple[Tensor, ...]:
        read = vosops.local_attention(**{**options, **leaves})
        return (read, *torch.autograd.grad(read, list(leaves.values()), torch.ones_like(read)))

    return step


def test_graph_of_forward_and_backward(backend: str, fast: torch.device) -> None:
    step = step_of(ready(backend, fast))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture must not
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def test_never_waits_for_the_gpu(backend: str, fast: torch.device) -> None:
    step = step_of(ready(backend, fast))
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_linear(backend: str, fast: torch.device) -> None:
    """At 1080p unfolded windows would be 0.9 GB each, a matrix of all pairs 1.1 GB in 16 bits."""
    options = ready(backend, fast, 1, 256, 256, 68, 121, 8, 15)
    result = options["value"].numel() * 4
    assert peak_extra(lambda: vosops.local_attention(**options)) < 4 * result
    # Gradients of three maps, their casts, and the tables' parts.
    assert peak_extra(step_of(options)) < 14 * result + 64 * MIB


def test_strides_beyond_2_31(backend: str, fast: torch.device) -> None:
    """Rows more than 2^31 elements apart, in every map."""
    stride = 1_100_000_000
    small = ready(backend, fast, 1, 8, 8, 3, 2, 1, 3, relative="none")
    storage = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=fast)  # 4.4 GB
    for index, name in enumerate(("query", "key", "value")):
        far = storage.as_strided((1, 8, 3, 2), (0, 1, stride, 8), 16 * index)
        far.copy_(small[name])
        expected = vosops.local_attention(**small)
        torch.testing.assert_close(vosops.local_attention(**{**small, name: far}), expected)
