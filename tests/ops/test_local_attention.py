# SPDX-License-Identifier: Apache-2.0
"""Local attention: published numbers, values and gradients against float64 on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vosops

from ..models.weights import Golden, value
from .helpers import relative_error

# Sums of a few hundred float32 products: measured below 2e-6 of the largest element.
FLOAT = 2e-5

GOLDEN = Golden("ops_local_attention")
# Every way the kernel can take: (B, C, Cv, H, W, h, window, dilation, relative form).
SIZES = (
    (2, 24, 20, 9, 13, 4, 5, 1, "weight"),  # heads of less than a vector
    (1, 64, 64, 14, 37, 2, 15, 1, "weight"),  # several strips and blocks
    (2, 16, 24, 3, 17, 2, 15, 1, "bias"),  # a map smaller than the window
    (1, 8, 200, 10, 11, 1, 7, 2, "weight"),  # dilation; several chunks of value channels
    (2, 8, 8, 5, 6, 2, 9, 3, "bias"),  # classes of unequal size
    (1, 8, 8, 3, 2, 1, 3, 5, "weight"),  # classes without a position
    (1, 70, 70, 9, 20, 1, 1, 1, "bias"),  # a window of one cell; several depths
    (1, 40, 80, 9, 40, 1, 3, 1, "none"),  # a window of fewer rows than a tile
    (1, 4, 4, 7, 40, 1, 33, 1, "weight"),  # a window row of several vectors
    (1, 8, 8, 1, 1, 2, 15, 1, "weight"),
)


def arguments(
    batch: int = 2,
    channels: int = 24,
    value_channels: int = 20,
    height: int = 7,
    width: int = 9,
    heads: int = 4,
    window: int = 5,
    dilation: int = 1,
    relative: str = "weight",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments of local_attention; `relative` is "weight", "bias" or "none"."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    options: dict[str, Any] = {
        "query": randn(batch, channels, height, width),
        "key": randn(batch, channels, height, width),
        "value": randn(batch, value_channels, height, width),
        "num_heads": heads,
        "window": window,
        "dilation": dilation,
    }
    if relative == "weight":
        options["relative_weight"] = 0.3 * randn(heads * window**2, channels // heads)
        options["relative_offset"] = randn(heads * window**2)
    if relative == "bias":
        options["relative_bias"] = randn(batch, heads, window**2, height, width)
    if relative != "none":
        options["relative_value"] = randn(heads, value_channels // heads, window**2)
    return options


def results(options: dict[str, Any], backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The read and the gradient of every tensor, for a fixed random gradient of the read."""
    leaves = {
        name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_() if isinstance(x, Tensor) else x
        for name, x in options.items()
    }
    tensors = {name: x for name, x in leaves.items() if isinstance(x, Tensor)}
    with vosops.use_backend(backend):
        read = vosops.local_attention(**leaves)
        upstream = torch.randn(read.shape, generator=torch.Generator().manual_seed(9)).to(read)
        grads = torch.autograd.grad(read, list(tensors.values()), upstream)
    return {"read": read.detach(), **dict(zip(tensors, grads, strict=True))}


def by_hand(options: dict[str, Any]) -> Tensor:
    """The definition, one position, head and offset at a time."""
    q, k, v = (options[name].double() for name in ("query", "key", "value"))
    heads, window, dilation = options["num_heads"], options["window"], options["dilation"]
    batch, channels, height, width = q.shape
    c, cv = channels // heads, v.shape[1] // heads
    out = torch.zeros_like(v)
    for b, h, y, x in torch.cartesian_prod(*map(torch.arange, (batch, heads, height, width))).tolist():
        own = q[b, h * c : (h + 1) * c, y, x]
        scores, values = [], []
        for offset in range(window**2):
            there_y = y + (offset // window - window // 2) * dilation
            there_x = x + (offset % window - window // 2) * dilation
            if not (0 <= there_y < height and 0 <= there_x < width):
                continue
            s = c**-0.5 * own @ k[b, h * c : (h + 1) * c, there_y, there_x]
            if "relative_weight" in options:
                row = h * window**2 + offset
                s = s + options["relative_weight"][row].double() @ own + options["relative_offset"][row]
            if "relative_bias" in options:
                s = s + options["relative_bias"][b, h, offset, y, x]
            scores.append(s)
            local = v[b, h * cv : (h + 1) * cv, there_y, there_x]
            values.append(local + options["relative_value"][h, :, offset].double())
        out[b, h * cv : (h + 1) * cv, y, x] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("relative", ["weight", "bias"])
def test_reference_is_the_definition(relative: str, dilation: int) -> None:
    options = arguments(1, 4, 6, 4, 5, 2, 3, dilation, relative)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with vosops.use_backend("reference"):
        torch.testing.assert_close(vosops.local_attention(**wide), by_hand(options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size: tuple[Any, ...], isa: str, cpu_backend: None) -> None:
    options = arguments(*size)
    expected = results(options, "reference", torch.float64)
    for name, ours in results(options, "cpu").items():
        assert ours.isfinite().all(), name
        # Scores that cannot change anything have the gradient 0, the difference of two sums of that size.
        scale = max(float(expected[name].abs().max()), 0.5)
        assert float((ours - expected[name]).abs().max()) < FLOAT * scale, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relative", ["weight", "bias"])
def test_low_precision(relative: str, dtype: torch.dtype, isa: str, cpu_backend: None) -> None:
    """Operands are widened exactly: only the results are rounded, once."""
    options = arguments(relative=relative, dtype=dtype)
    expected = results(options, "reference", torch.float64)
    with vosops.use_backend("cpu"):
        assert vosops.local_attention(**options).dtype == dtype
    upstream = float(torch.finfo(dtype).eps)  # of the gradient of the read, rounded too
    for name, ours in results(options, "cpu").items():
        assert ours.dtype == dtype
        assert relative_error(ours, expected[name]) < 2 * upstream, name


def test_mixed_dtypes_and_scale(isa: str, cpu_backend: None) -> None:
    options = arguments(relative="bias") | {"scale": 0.7}
    options["key"] = options["key"].bfloat16()
    options["relative_bias"] = options["relative_bias"].half()
    read = vosops.local_attention(**options)
    assert read.dtype == torch.float32
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in options.items()}
    with vosops.use_backend("reference"):
        assert relative_error(read, vosops.local_attention(**wide)) < FLOAT


VIEWS: dict[str, Any] = {
    "last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sequence": lambda x: x.flatten(2).permute(2, 0, 1).contiguous().permute(1, 2, 0).view(x.shape),
    "wide": lambda x: F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "every second": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def views(options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same maps, and relative_bias, in other memory."""
    for kind, view in VIEWS.items():
        yield (
            kind,
            {
                name: view(x)
                if isinstance(x, Tensor)
                and (x.dim() == 4 or name == "relative_bias")
                and (kind, name) != ("sequence", "relative_bias")
                else x
                for name, x in options.items()
            },
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides(dtype: torch.dtype, isa: str, cpu_backend: None) -> None:
    options = arguments(relative="bias", dtype=dtype, dilation=2, width=21)
    plain = results(options, "cpu")
    for kind, strided in views(options):
        with vosops.use_backend("cpu"):
            assert torch.equal(vosops.local_attention(**strided), plain["read"]), kind
    expanded = arguments(relative="none") | {"key": torch.ones(1, 1, 1, 1).expand(2, 24, 7, 9)}
    contiguous = expanded | {"key": expanded["key"].contiguous()}
    assert torch.equal(vosops.local_attention(**expanded), vosops.local_attention(**contiguous))


def published(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments that a published module's call comes down to, and its weights."""
    given = GOLDEN.config["cases"][case]
    params, rule = given["params"], given["weights"]
    weights = {
        name: torch.from_numpy(value(name, shape, rule["gain"], rule["boost"]))
        for name, shape in rule["state_dict"].items()
    }
    q, k, v = (GOLDEN[given["inputs"][name]] for name in "qkv")
    if params["use_linear"]:
        q, k, v = (
            F.conv2d(x, weights[f"linear_{name}.weight"], weights[f"linear_{name}.bias"])
            for name, x in zip("QKV", (q, k, v), strict=True)
        )
    heads = params["num_head"]
    options: dict[str, Any] = {
        "query": q,
        "key": k,
        "value": v,
        "num_heads": heads,
        "window": 2 * params["max_dis"] + 1,
        "relative_weight": weights["relative_emb_k.weight"].flatten(1),
        "relative_offset": weights["relative_emb_k.bias"],
        "relative_value": weights["relative_emb_v"],
    }
    if params.get("use_dis"):  # 2 <q, k> / sqrt(d) - |k|^2: one channel more, whose query is 1
        depth = q.shape[1] // heads
        ones = torch.ones_like(q).unflatten(1, (heads, -1))[:, :, :1]
        norms = k.unflatten(1, (heads, -1)).square().sum(2, keepdim=True)
        options["query"] = torch.cat((q.unflatten(1, (heads, -1)), ones), 2).flatten(1, 2)
        doubled = 2 * depth**-0.5 * k.unflatten(1, (heads, -1))
        options["key"] = torch.cat((doubled, -norms), 2).flatten(1, 2)
        options["relative_weight"] = F.pad(options["relative_weight"], (0, 1))
        options["scale"] = 1.0
    return options, weights


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", GOLDEN.config["cases"])
def test_published_numbers(case: str, backend: str, cpu_backend: None) -> None:
    options, weights = published(case)
    with vosops.use_backend(backend):
        read = vosops.local_attention(**options)
        out = F.linear(
            read.flatten(2).permute(2, 0, 1), weights["projection.weight"], weights["projection.bias"]
        )
        GOLDEN.check(GOLDEN.config["cases"][case]["outputs"]["out"], out)
        attention = GOLDEN.config["cases"][case]["outputs"].get("attn")
        if attention:  # the weights themselves: values 0, and relative values that name their offset
            offsets, heads = options["window"] ** 2, options["num_heads"]
            batch, _, height, width = options["query"].shape
            options["value"] = torch.zeros(batch, heads * offsets, height, width)
            options["relative_value"] = torch.eye(offsets).expand(heads, -1, -1)
            read = vosops.local_attention(**options).view(batch, heads, offsets, height * width)
            GOLDEN.check(attention, read)


def test_gradcheck_of_the_reference() -> None:
    for relative in ("weight", "bias"):
        options = arguments(1, 4, 2, 3, 4, 2, 3, 1, relative)
        names = [name for name, x in options.items() if isinstance(x, Tensor)]
        tensors = [options[name].double().requires_grad_() for name in names]

        def read(*tensors: Tensor, names: list[str] = names, options: dict[str, Any] = options) -> Tensor:
            return vosops.local_attention(**{**options, **dict(zip(names, tensors, strict=True))})

        with vosops.use_backend("reference"):
            assert torch.autograd.gradcheck(read, tensors)


def test_large_scores_and_no_match(isa: str, cpu_backend: None) -> None:
    """Scores far outside of what exp takes; a score of -inf never matches, and a row of them reads 0."""
    options = arguments(relative="bias")
    options["query"] = 300 * options["query"]
    options["relative_bias"][0, :, :, 3, 4] = -math.inf
    options["relative_bias"][1, :, ::2, 2, 5] = -math.inf
    expected = results(options, "reference", torch.float64)
    ours = results(options, "cpu")
    assert (ours["read"][0, :, 3, 4] == 0).all()
    # float32 rounds scores of some hundreds to 2e-5.
    for name in ("read", "value", "relative_value"):
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=1e-2, atol=1e-2)
