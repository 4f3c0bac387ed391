# SPDX-License-Identifier: Apache-2.0
"""The identity embedding: values, gradients, registration, errors, and AOT's public numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vosops
from vosops.ops import backends

from ..models.weights import Golden, value
from .helpers import relative_error
from .test_memory_read_cost import MIB, peak_extra

OPS = torch.ops.vosops
# Sums of up to 289 terms in float32; measured errors stay below a third of this.
TOLERANCE = 3e-6


def draw(
    *shape: int, channels: int = 70, classes: int = 11, kernel: tuple[int, int] = (17, 17), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels with some that are ignored, weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, shape, generator=generator).to(torch.uint8)
    labels[torch.rand(shape, generator=generator) < 0.1] = 255
    weight = torch.randn(channels, classes, *kernel, generator=generator)
    return labels, weight, torch.randn(channels, generator=generator)


def convolved(labels: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """By definition, in float64."""
    mask = torch.stack([labels == i for i in range(weight.shape[1])], 1).double()
    start = None if bias is None else bias.double()
    return F.conv2d(mask, weight.double(), start, stride, padding)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((17, 17), 16, 8), ((16, 16), 16, 0), ((3, 5), 2, 4)]
)
@pytest.mark.parametrize("shape", [(2, 49, 65), (1, 17, 18), (1, 31, 1121), (0, 33, 33)])
def test_values(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: int, padding: int, isa: str, cpu_backend: None
) -> None:
    labels, weight, bias = draw(*shape, kernel=kernel)
    result = vosops.identity_embedding(labels, weight, bias, stride=stride, padding=padding)
    expected = convolved(labels, weight, bias, stride, padding)
    assert result.shape == expected.shape
    assert result.is_contiguous()
    if expected.numel():
        assert relative_error(result, expected) < TOLERANCE
    with vosops.use_backend("reference"):
        reference = vosops.identity_embedding(labels, weight, bias, stride=stride, padding=padding)
    torch.testing.assert_close(reference, result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_dtypes_and_strides(kind: torch.dtype, dtype: torch.dtype, isa: str, cpu_backend: None) -> None:
    labels, weight, bias = draw(2, 49, 65)
    weight = weight.to(dtype)
    expected = vosops.identity_embedding(labels, weight, bias)
    assert expected.dtype == dtype
    moved = torch.stack((labels, labels), -1).to(kind)[..., 0].mT.contiguous().mT
    strided = weight.to(memory_format=torch.channels_last)
    assert torch.equal(vosops.identity_embedding(moved, strided, bias), expected)
    exact = convolved(labels, weight, bias, 16, 8)
    assert relative_error(expected, exact) < max(TOLERANCE, torch.finfo(dtype).eps)


def test_soft_masks(cpu_backend: None) -> None:
    _, weight, bias = draw(1, 49, 65)
    soft = torch.rand(2, 11, 49, 65)
    result = vosops.identity_embedding(soft, weight, bias)
    expected = F.conv2d(soft.double(), weight.double(), bias.double(), 16, 8)
    assert relative_error(result, expected) < TOLERANCE
    labels, _, _ = draw(2, 49, 65)
    hard = torch.stack([labels == i for i in range(11)], 1).float()
    torch.testing.assert_close(
        vosops.identity_embedding(hard, weight, bias), vosops.identity_embedding(labels, weight, bias)
    )


@pytest.mark.parametrize(("stride", "padding"), [(16, 8), (3, 2)])
def test_gradients(stride: int, padding: int, isa: str, cpu_backend: None) -> None:
    labels, weight, bias = draw(2, 37, 51)
    options = {"stride": stride, "padding": padding}
    grads = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (weight, bias)]
        with vosops.use_backend(backend):
            result = vosops.identity_embedding(labels, *leaves, **options)
        slope = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view(result.shape)
        grads.append(torch.autograd.grad((result.double() * slope).sum(), leaves))
    for ours, expected in zip(*grads, strict=True):
        assert relative_error(ours, expected) < 10 * TOLERANCE


def test_gradcheck() -> None:
    labels, weight, bias = draw(1, 9, 11, channels=2, classes=3, kernel=(3, 3))
    leaves = [x.double().requires_grad_() for x in (weight, bias)]
    with vosops.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda w, b: vosops.identity_embedding(labels, w, b, stride=2, padding=1), leaves
        )
        soft = torch.rand(1, 3, 5, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda *x: vosops.identity_embedding(*x, stride=2, padding=1), (soft, *leaves)
        )


def test_repeats_and_threads_change_nothing(isa: str, cpu_backend: None) -> None:
    labels, weight, bias = draw(1, 161, 209)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = weight.clone().requires_grad_()
        result = vosops.identity_embedding(labels, leaf, bias)
        results.append((result, *torch.autograd.grad(result.square().sum(), leaf)))
    torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, results[0], strict=True))


def test_nan_stays_where_it_is(isa: str, cpu_backend: None) -> None:
    labels, weight, bias = draw(1, 49, 65)
    labels[labels == 7] = 0
    clean = vosops.identity_embedding(labels, weight, bias)
    weight[3, 5] = torch.nan  # a class that is there
    weight[4, 7] = torch.nan  # and one that is not
    result = vosops.identity_embedding(labels, weight, bias)
    assert result[:, 3].isnan().all()
    result[:, 3] = clean[:, 3]
    assert torch.equal(result, clean)


def test_no_one_hot_mask(cpu_backend: None) -> None:
    """At 480p the one-hot mask takes 17 MiB."""
    labels, weight, _ = draw(1, 481, 849, channels=256)
    labels = labels.clone()
    assert peak_extra(lambda: vosops.identity_embedding(labels, weight)) < 8 * MIB


@pytest.mark.parametrize("bias", [False, True])
def test_registration(bias: bool, cpu_backend: None) -> None:
    labels, weight, start = draw(1, 33, 49)
    arguments = (labels, weight.requires_grad_(), start.requires_grad_() if bias else None)
    torch.library.opcheck(OPS.identity_embedding.default, (*arguments, 16, 8))
    grad = torch.ones(1, 70, 3, 4)
    torch.library.opcheck(OPS.identity_embedding_backward.default, (grad, labels, weight.detach(), 16, 8))
    torch._dynamo.reset()
    compiled = torch.compile(vosops.identity_embedding, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), vosops.identity_embedding(*arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vosops.identity_embedding(*arguments), vosops.identity_embedding(*arguments))
        assert vosops.identity_embedding(*arguments).dtype == torch.float32


LABELS, WEIGHT, BIAS = draw(1, 33, 49)
CASES = {
    "labels": ({"labels": 3}, TypeError, "labels must be a tensor"),
    "labels dtype": ({"labels": LABELS.bool()}, TypeError, "labels must have dtype"),
    "labels rank": (
        {"labels": LABELS[0]},
        ValueError,
        r"labels must have shape \(B, H, W\) as it has integers",
    ),
    "soft rank": ({"labels": LABELS.float()}, ValueError, r"labels must have shape \(B, N, H, W\)"),
    "classes": ({"labels": torch.rand(1, 4, 33, 49)}, ValueError, "classes of weight, N = 11, got 4"),
    "weight": (
        {"weight": WEIGHT[0]},
        ValueError,
        r"weight must have shape \(C, N, kh, kw\), got \[11, 17, 17\]",
    ),
    "no taps": ({"weight": WEIGHT[:, :, :0]}, ValueError, "weight must have at least one class and one tap"),
    "weight dtype": ({"weight": WEIGHT.int()}, TypeError, "weight must have dtype"),
    "bias": ({"bias": BIAS[1:]}, ValueError, r"bias must have shape \(C,\) = \[70\], got \[69\]"),
    "device": ({"labels": LABELS.to("meta")}, ValueError, "labels is on meta, but weight is on cpu"),
    "stride": ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    "stride type": ({"stride": 1.5}, TypeError, "stride must be an integer, got float"),
    "padding": ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    "small": (
        {"labels": LABELS[:, :4], "padding": 0},
        ValueError,
        r"labels must be at least as large .*\[4, 49\]",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case: str) -> None:
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        vosops.identity_embedding(**{"labels": LABELS, "weight": WEIGHT, "bias": BIAS, **change})


@pytest.mark.parametrize("label", [11, 254, -1])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_labels_that_are_no_class(backend: str, label: int) -> None:
    if reasons := backends.reasons_against(backend, {}):
        pytest.skip("; ".join(reasons))
    labels = LABELS.to(torch.int64)
    labels[0, 30, 40] = label
    with (
        vosops.use_backend(backend),
        pytest.raises(
            (ValueError, RuntimeError), match=rf"labels must be in \[0, N = 11\) or 255, got {label}"
        ),
    ):
        vosops.identity_embedding(labels, WEIGHT)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", ["aot_33x81", "aot_49x65", "aot_unaligned_48x64", "deaot_49x65"])
def test_golden(case: str, backend: str) -> None:
    if reasons := backends.reasons_against(backend, {}):
        pytest.skip("; ".join(reasons))
    golden = Golden("ops_identity")
    params = golden.config["cases"][case]["params"]
    source = case.replace("deaot", "aot")
    shape = (256, 11, *params["kernel"])
    weight, bias = (
        torch.from_numpy(value(f"patch_wise_id_bank.{name}", size))
        for name, size in (("weight", shape), ("bias", shape[:1]))
    )
    for name, labels in (("labels", golden[f"{source}.labels"][None]), ("soft", golden[f"{source}.soft"])):
        with vosops.use_backend(backend):
            result = vosops.identity_embedding(
                labels, weight, bias, stride=params["stride"], padding=params["padding"]
            )
        if params["id_norm"]:
            norm = (torch.from_numpy(value(f"id_norm.{part}", (256,))) for part in ("weight", "bias"))
            result = F.layer_norm(result.movedim(1, -1), (256,), *norm).movedim(-1, 1)
        golden.check(f"{case}.embedding" + ("_soft" if name == "soft" else ""), result[0])
