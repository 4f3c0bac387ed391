# SPDX-License-Identifier: Apache-2.0
"""The spatial correlation sampler that AOT, PWC-Net and others ask for, without the extension they compile.

`install()` makes `import spatial_correlation_sampler` resolve to this module's functions.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import backends
from ..ops.checks import check_device, check_shape, check_tensor

PACKAGE = "spatial_correlation_sampler"
_MAP = "(B, C, H, W)"
_Pair = int | tuple[int, int]


def spatial_correlation_sample(
    input1: Tensor,  # [B, C, H, W]
    input2: Tensor,  # [B, C, H, W]
    kernel_size: _Pair = 1,
    patch_size: _Pair = 1,
    stride: _Pair = 1,
    padding: _Pair = 0,
    dilation: _Pair = 1,
    dilation_patch: _Pair = 1,
) -> Tensor:
    """Correlate every position of one map with the positions around it in another.

    out[b, u, v, y, x] = sum over c and the kernel's taps (i, j) of input1[b, c, p] input2[b, c, p + D] with
    p = (y, x) stride - padding + (i, j) dilation and D = ((u, v) - (patch_size - 1) // 2) dilation_patch; a
    factor outside its map is 0. As the published extension; nothing is divided by the number of terms.

    Args:
        input1, input2: (B, C, H, W), any strides.
        kernel_size: taps of the kernel; an integer or (vertical, horizontal), as all that follow.
        patch_size: offsets D.
        stride: positions from one output to the next.
        padding: zeros around both maps.
        dilation: positions from one tap to the next.
        dilation_patch: positions from one offset to the next.

    Returns:
        (B, patch height, patch width, oH, oW), oH = (H + 2 padding - (kernel - 1) dilation - 1) // stride
        + 1, in the promoted dtype of the inputs. Differentiable with respect to both.

    Raises:
        TypeError, ValueError: a bad argument, named, before any work.
        BackendError: a forced backend cannot serve the call.

    Note:
        Floating-point dtypes, freely mixed, accumulated in float32 at least (the extension sums float16 in
        float16). Autocast changes nothing.
        Cost: 2 B C H W patch operations, whatever the stride, and B H W patch more for each tap of a kernel.
        On the CPU a C++ kernel serves square odd patches; extra memory: one packed input. Other patches,
        float64 and GPUs are served by plain torch, row by row of the patch: patch width times one input.

    Source: FlowNet (Fischer et al., ICCV 2015), eq. 1; the package spatial-correlation-sampler's arguments.

    Example:
        >>> spatial_correlation_sample(query, key, patch_size=15).shape  # AOT: (B, 15, 15, H, W)
    """
    kernel, patch, steps, taps, spread = (
        _pair(name, value, 1)
        for name, value in (
            ("kernel_size", kernel_size),
            ("patch_size", patch_size),
            ("stride", stride),
            ("dilation", dilation),
            ("dilation_patch", dilation_patch),
        )
    )
    margin = _pair("padding", padding, 0)
    for name, tensor in (("input1", input1), ("input2", input2)):
        check_tensor(name, tensor, layout=_MAP)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions {_MAP}, got shape {list(tensor.shape)}")
    check_shape("input2", input2, input1.shape, f"{_MAP} of input1")
    check_device("input2", input2, "input1", input1.device)
    sizes = [
        (size + 2 * pad - (count - 1) * tap - 1) // step + 1
        for size, pad, count, tap, step in zip(input1.shape[2:], margin, kernel, taps, steps, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"input1 must be at least as large as the kernel, kernel_size {kernel} with dilation {taps}, "
            f"with padding {margin} around it, got {list(input1.shape[2:])}"
        )

    square = patch[0] == patch[1] and patch[0] % 2 == 1 and spread[0] == spread[1]

    def limits(backend: str) -> list[str]:
        if backend in ("cuda", "triton"):
            return ["it has no spatial_correlation_sample"]
        if backend != "cpu":
            return []
        reasons = [] if square else ["it serves square odd patches with one dilation"]
        if not _COMPILED:
            reasons.append("its library was compiled without the correlation")
        return reasons

    backend = backends.choose("spatial_correlation_sample", {"input1": input1, "input2": input2}, limits)
    device = input1.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if backend == "cpu":
            flat = torch.ops.vosops.correlation(input1, input2, patch[0], spread[0])
            pointwise = flat.unflatten(1, patch)
        else:
            pointwise = _pointwise(input1, input2, patch, spread)
        result = _sum_taps(pointwise, kernel, steps, margin, taps, sizes)
    return result.to(torch.promote_types(input1.dtype, input2.dtype))


class SpatialCorrelationSampler(nn.Module):
    """`spatial_correlation_sample` as a module without parameters, with the published arguments."""

    def __init__(
        self,
        kernel_size: _Pair = 1,
        patch_size: _Pair = 1,
        stride: _Pair = 1,
        padding: _Pair = 0,
        dilation: _Pair = 1,
        dilation_patch: _Pair = 1,
    ) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.patch_size = patch_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.dilation_patch = dilation_patch

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, patch height, patch width, oH, oW)."""
        return spatial_correlation_sample(
            input1,
            input2,
            self.kernel_size,
            self.patch_size,
            self.stride,
            self.padding,
            self.dilation,
            self.dilation_patch,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, patch_size={self.patch_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, dilation_patch={self.dilation_patch}"
        )


def install() -> None:
    """Make `import spatial_correlation_sampler` resolve to this module, where the extension is absent.

    Modules that were imported before, and found nothing, do not look again: install first. A copy of the
    extension that is installed but does not import (an "undefined symbol" after an upgrade of torch) is
    stood in for, with a warning. Calling it twice is fine.

    Raises:
        RuntimeError: the extension works; it is not shadowed.
    """
    if _installed() or _broken_or_absent():
        sys.modules[PACKAGE] = _module
        return
    raise RuntimeError(
        f"{PACKAGE} is installed and imports; vosops does not shadow it. "
        "Uninstall it to use vosops.compat.correlation instead"
    )


def uninstall() -> None:
    """Undo `install()`; what was imported in between keeps the names it took. Fine without `install()`."""
    if _installed():
        del sys.modules[PACKAGE]


def _installed() -> bool:
    return sys.modules.get(PACKAGE) is _module


def _broken_or_absent() -> bool:
    if PACKAGE not in sys.modules and importlib.util.find_spec(PACKAGE) is None:
        return True
    try:
        importlib.import_module(PACKAGE)
    except Exception as error:  # whatever an extension raises that was built for another torch
        warnings.warn(
            f"{PACKAGE} is installed but does not import ({error}): vosops stands in for it",
            RuntimeWarning,
            stacklevel=3,
        )
        return True
    return False


def _pair(name: str, value: _Pair, least: int) -> tuple[int, int]:
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or any(isinstance(one, bool) or not isinstance(one, int) for one in both):
        raise TypeError(f"{name} must be an integer or two of them, got {value!r}")
    if min(both) < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return both


def _pointwise(input1: Tensor, input2: Tensor, patch: tuple[int, int], spread: tuple[int, int]) -> Tensor:
    """The correlation of single positions in plain torch, in float32 at least.  # [B, ph, pw, H, W]"""
    wide = torch.promote_types(torch.promote_types(input1.dtype, input2.dtype), torch.float32)
    first, second = input1.to(wide), input2.to(wide)
    height, (rows, columns) = first.shape[2], patch
    before = [(count - 1) // 2 * step for count, step in zip(patch, spread, strict=True)]
    after = [(count - 1) * step - start for count, step, start in zip(patch, spread, before, strict=True)]
    padded = F.pad(second, (before[1], after[1], before[0], after[0]))
    windows = padded.unfold(3, (columns - 1) * spread[1] + 1, 1)[
        ..., :: spread[1]
    ]  # a view [B, C, H', W, pw]
    correlations = [
        (first[..., None] * windows[:, :, row * spread[0] : row * spread[0] + height]).sum(1)
        for row in range(rows)
    ]
    return torch.stack(correlations, 1).permute(0, 1, 4, 2, 3)


def _sum_taps(
    pointwise: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    sizes: list[int],
) -> Tensor:
    """The correlation of kernels: what their taps give, summed; it is 0 where input1 is outside its map."""
    if padding != (0, 0):
        pointwise = F.pad(pointwise, (padding[1], padding[1], padding[0], padding[0]))
    terms = [
        pointwise[
            ...,
            i * dilation[0] : i * dilation[0] + (sizes[0] - 1) * stride[0] + 1 : stride[0],
            j * dilation[1] : j * dilation[1] + (sizes[1] - 1) * stride[1] + 1 : stride[1],
        ]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total.contiguous()


def _fake(input1: Tensor, input2: Tensor, window: int, dilation: int) -> Tensor:
    batch, _, height, width = input1.shape
    return input1.new_empty((batch, window * window, height, width), dtype=torch.float32)


def _fake_backward(
    grad: Tensor, input1: Tensor, input2: Tensor, window: int, dilation: int
) -> tuple[Tensor, Tensor]:
    empty = input1.new_empty(input1.shape, dtype=torch.float32)
    return empty, torch.empty_like(empty)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[2:]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = torch.ops.vosops.correlation_backward(grad.contiguous(), *inputs, *ctx.sizes)
    return (*(g.to(x.dtype) for x, g in zip(inputs, grads, strict=True)), None, None)


_library = torch.library.Library("vosops", "FRAGMENT")
_library.define("correlation(Tensor input1, Tensor input2, int window, int dilation) -> Tensor")
_library.define(
    "correlation_backward(Tensor grad, Tensor input1, Tensor input2, int window, int dilation) "
    "-> (Tensor, Tensor)"
)
torch.library.register_fake("vosops::correlation", _fake)
torch.library.register_fake("vosops::correlation_backward", _fake_backward)
torch.library.register_autograd("vosops::correlation", _gradient, setup_context=_context)
# Without a compiler, or with an older build, the library has no kernel for it.
_COMPILED = torch._C._dispatch_has_kernel_for_dispatch_key("vosops::correlation", "CPU")

_module = ModuleType(PACKAGE, __doc__)
_module.__spec__ = importlib.machinery.ModuleSpec(PACKAGE, None, origin=__name__)
_module.__dict__.update(
    SpatialCorrelationSampler=SpatialCorrelationSampler,
    spatial_correlation_sample=spatial_correlation_sample,
    __all__=["SpatialCorrelationSampler", "spatial_correlation_sample"],
)
