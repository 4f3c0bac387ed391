# SPDX-License-Identifier: Apache-2.0
"""The correlation sampler against its definition in float64, on every backend; its module and `install()`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vosops
from vosops.compat import correlation
from vosops.compat.correlation import SpatialCorrelationSampler, spatial_correlation_sample
from vosops.ops import backends


def cpu_reasons() -> list[str]:
    reasons = backends.reasons_against("cpu", {})
    if not reasons and not correlation._COMPILED:
        reasons = ["the compiled library has no correlation yet: build it again"]
    return reasons


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and (reasons := cpu_reasons()):
        pytest.skip("; ".join(reasons))
    with vosops.use_backend(request.param):
        yield request.param


def maps(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(*shape, generator=generator) for _ in range(2))
    return first, second


def definition(
    first: Tensor,
    second: Tensor,
    kernel: tuple[int, int] = (1, 1),
    patch: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    spread: tuple[int, int] = (1, 1),
) -> Tensor:
    """Element by element, float64."""
    first, second = first.double(), second.double()
    batch, _, height, width = first.shape
    rows, columns = (
        (size + 2 * pad - (k - 1) * d - 1) // s + 1
        for size, pad, k, d, s in zip((height, width), padding, kernel, dilation, stride, strict=True)
    )
    out = first.new_zeros(batch, *patch, rows, columns)
    offsets = [(u, v, i, j) for u in range(patch[0]) for v in range(patch[1])
               for i in range(kernel[0]) for j in range(kernel[1])]  # fmt: skip
    for y in range(rows):
        for x in range(columns):
            for u, v, i, j in offsets:
                top = y * stride[0] - padding[0] + i * dilation[0]
                left = x * stride[1] - padding[1] + j * dilation[1]
                down = top + (u - (patch[0] - 1) // 2) * spread[0]
                right = left + (v - (patch[1] - 1) // 2) * spread[1]
                if all(0 <= a < height for a in (top, down)) and all(0 <= a < width for a in (left, right)):
                    out[:, u, v, y, x] += (first[:, :, top, left] * second[:, :, down, right]).sum(1)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch": (15, 15)},
        {"patch": (3, 3), "spread": (4, 4)},
        {"patch": (5, 5), "kernel": (3, 3), "padding": (1, 1)},
        {"patch": (3, 3), "kernel": (3, 2), "stride": (2, 3), "dilation": (2, 1), "padding": (2, 0)},
        {"patch": (1, 1), "stride": (2, 2)},
    ],
)
def test_definition(options: dict[str, tuple[int, int]], backend: str) -> None:
    first, second = maps(2, 5, 7, 9)
    names = {"kernel": "kernel_size", "patch": "patch_size", "spread": "dilation_patch"}
    result = spatial_correlation_sample(first, second, **{names.get(k, k): v for k, v in options.items()})
    expected = definition(first, second, **options)
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("patch", "spread"), [((4, 4), (1, 1)), ((3, 5), (1, 1)), ((3, 3), (2, 1))])
def test_patches_of_plain_torch(patch: tuple[int, int], spread: tuple[int, int]) -> None:
    first, second = maps(1, 3, 6, 5)
    with vosops.use_backend("reference"):
        result = spatial_correlation_sample(first, second, patch_size=patch, dilation_patch=spread)
    torch.testing.assert_close(
        result.double(), definition(first, second, patch=patch, spread=spread), atol=1e-5, rtol=1e-5
    )
    if not cpu_reasons():
        with vosops.use_backend("cpu"), pytest.raises(vosops.BackendError, match="square odd patches"):
            spatial_correlation_sample(first, second, patch_size=patch, dilation_patch=spread)


@pytest.mark.parametrize(
    ("shape", "window", "spread"),
    [((2, 32, 13, 35), 15, 1), ((1, 3, 1, 1), 15, 1), ((3, 17, 20, 6), 21, 2), ((1, 70, 4, 20), 17, 3)],
)
def test_forward_and_gradients_in_float64(
    shape: tuple[int, ...], window: int, spread: int, backend: str
) -> None:
    inputs = [x.requires_grad_() for x in maps(*shape)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    result = spatial_correlation_sample(*inputs, patch_size=window, dilation_patch=spread)
    with vosops.use_backend("reference"):
        expected = spatial_correlation_sample(*exact, patch_size=window, dilation_patch=spread)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(result, inputs, weight)
    wanted = torch.autograd.grad(expected, exact, weight.double())
    torch.testing.assert_close(result.double(), expected, atol=2e-5, rtol=1e-5)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.double(), want, atol=1e-4, rtol=1e-5)


def test_every_instruction_set_and_any_threads(isa: str) -> None:
    if reasons := cpu_reasons():
        pytest.skip("; ".join(reasons))
    inputs = [x.requires_grad_() for x in maps(2, 19, 11, 21)]
    exact = [x.detach().double() for x in inputs]
    threads, results = torch.get_num_threads(), []
    with vosops.use_backend("cpu"):
        for count in (1, 3):
            torch.set_num_threads(count)
            result = spatial_correlation_sample(*inputs, patch_size=9)
            results.append((result, *torch.autograd.grad(result.square().sum(), inputs)))
    torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    expected = definition(*exact, patch=(9, 9))
    torch.testing.assert_close(results[0][0].double(), expected, atol=2e-5, rtol=1e-5)


def test_gradcheck() -> None:
    inputs = [x.double().requires_grad_() for x in maps(1, 2, 4, 3)]
    with vosops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda a, b: spatial_correlation_sample(a, b, 3, 3, 2, 1, 1, 2), inputs
        )


def test_any_strides_and_dtypes(backend: str) -> None:
    first, second = maps(2, 8, 9, 11)
    expected = definition(first, second, patch=(5, 5))
    wide = torch.randn(2, 8, 9, 22)
    wide[..., ::2] = second
    result = spatial_correlation_sample(
        first.contiguous(memory_format=torch.channels_last), wide[..., ::2], patch_size=5
    )
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        low = [first.to(dtype), second.to(dtype)]
        result = spatial_correlation_sample(*low, patch_size=5)
        assert result.dtype == dtype
        exact = definition(*(x.float() for x in low), patch=(5, 5))
        # Accumulated in float32: the only error is that of rounding the result.
        assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
        mixed = spatial_correlation_sample(low[0], second, patch_size=5)
        assert mixed.dtype == torch.float32


def test_autocast_changes_nothing(backend: str) -> None:
    first, second = maps(1, 8, 6, 7)
    plain = spatial_correlation_sample(first, second, patch_size=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spatial_correlation_sample(first, second, patch_size=3)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, atol=0, rtol=0)


def test_nothing_leaks_from_outside_the_frame() -> None:
    if reasons := cpu_reasons():
        pytest.skip("; ".join(reasons))
    first, second = maps(1, 4, 5, 6)
    first[..., 0] = float("inf")
    with vosops.use_backend("cpu"):
        result = spatial_correlation_sample(first, second, patch_size=7)
    assert (result[0, :, :3, :, 0] == 0).all()  # left of the frame
    assert not result[..., 1:].isinf().any()


def test_compile_and_registration(backend: str) -> None:
    inputs = [x.requires_grad_() for x in maps(1, 8, 6, 7)]
    compiled = torch.compile(SpatialCorrelationSampler(patch_size=5), fullgraph=True, backend="aot_eager")
    result, expected = compiled(*inputs), spatial_correlation_sample(*inputs, patch_size=5)
    torch.testing.assert_close(result, expected)
    for ours, eager in zip(
        torch.autograd.grad(result.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
    if backend == "cpu":
        torch.library.opcheck(torch.ops.vosops.correlation.default, (*inputs, 5, 2))


def test_empty_batch(backend: str) -> None:
    first, second = torch.zeros(0, 4, 5, 6), torch.zeros(0, 4, 5, 6)
    assert spatial_correlation_sample(first, second, patch_size=3).shape == (0, 3, 3, 5, 6)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "patch_size must be an integer or two", {"patch_size": 3.0}),
        (TypeError, "stride must be an integer or two", {"stride": (1, 2, 3)}),
        (ValueError, "kernel_size must be at least 1", {"kernel_size": 0}),
        (ValueError, "padding must be at least 0", {"padding": -1}),
        (ValueError, "at least as large as the kernel", {"kernel_size": 9}),
    ],
)
def test_bad_options(error: type[Exception], message: str, options: dict[str, object]) -> None:
    first, second = maps(1, 2, 5, 6)
    with pytest.raises(error, match=message):
        spatial_correlation_sample(first, second, **options)  # type: ignore[arg-type]


def test_bad_inputs() -> None:
    first, second = maps(1, 2, 5, 6)
    with pytest.raises(ValueError, match="input2 must have shape"):
        spatial_correlation_sample(first, second[..., 1:])
    with pytest.raises(ValueError, match="input1 must have 4 dimensions"):
        spatial_correlation_sample(first[0], second[0])
    with pytest.raises(TypeError, match="input1 must have dtype"):
        spatial_correlation_sample(first.long(), second)


def test_module() -> None:
    module = SpatialCorrelationSampler(kernel_size=1, patch_size=15, stride=1, padding=0, dilation_patch=1)
    first, second = maps(2, 4, 6, 5)
    assert not list(module.parameters())
    assert "patch_size=15" in repr(module)
    torch.testing.assert_close(module(first, second), spatial_correlation_sample(first, second, 1, 15))


@pytest.fixture
def absent() -> Iterator[None]:
    correlation.uninstall()
    if importlib.util.find_spec(correlation.PACKAGE) is not None:
        pytest.skip("the real extension is installed")
    yield
    sys.modules.pop(correlation.PACKAGE, None)


@pytest.mark.usefixtures("absent")
def test_install() -> None:
    correlation.install()
    correlation.install()
    try:
        module = importlib.import_module(correlation.PACKAGE)
        assert module.SpatialCorrelationSampler is SpatialCorrelationSampler
        assert module.spatial_correlation_sample is spatial_correlation_sample
        assert importlib.util.find_spec(correlation.PACKAGE) is not None
    finally:
        correlation.uninstall()
    with pytest.raises(ImportError):
        importlib.import_module(correlation.PACKAGE)


@pytest.mark.usefixtures("absent")
def test_the_real_extension_is_not_shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / f"{correlation.PACKAGE}.py"
    package.write_text("SpatialCorrelationSampler = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="does not shadow"):
        correlation.install()
    correlation.uninstall()  # not ours: it stays
    assert sys.modules[correlation.PACKAGE].SpatialCorrelationSampler == 1


@pytest.mark.usefixtures("absent")
def test_a_broken_extension_is_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{correlation.PACKAGE}.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning, match="undefined symbol"):
        correlation.install()
    try:
        assert importlib.import_module(correlation.PACKAGE).spatial_correlation_sample
    finally:
        correlation.uninstall()
