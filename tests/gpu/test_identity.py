# SPDX-License-Identifier: Apache-2.0
"""The identity embedding on the GPU backends that have it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops import backends
from vosops.ops.identity import api

from ..ops.helpers import relative_error
from ..ops.test_identity import convolved, draw
from .test_memory_read_memory import MIB, peak_extra

# Sums of up to 289 terms in float32, or in three tf32 passes.
TOLERANCE = 1e-5
AOT = ((17, 17), 16, 8)
# Labels' shape, kernel, stride, padding.
SMALL = (((1, 17, 33), *AOT), ((2, 5, 9), (3, 5), 2, 4), ((0, 33, 33), *AOT))
LARGE = (*SMALL, ((2, 49, 65), (16, 16), 16, 0), ((1, 481, 849), *AOT), ((3, 31, 1121), *AOT))
CASES = [
    *(
        pytest.param(*case, dtype, marks=pytest.mark.interpreter)
        for case in SMALL
        for dtype in (torch.float32, torch.float16)
    ),
    *((*case, dtype) for case in LARGE for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


@pytest.fixture(autouse=True)
def _served(backend: str) -> None:
    reasons = backends.reasons_against(backend, {}) + api._limits(backend)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "dtype"), CASES)
def test_values_and_gradients(
    shape: tuple[int, ...],
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    labels, weight, bias = draw(*shape, kernel=kernel, classes=4 if device.type == "cpu" else 11)
    weight = weight.to(dtype)
    leaves = [x.to(device, copy=True).requires_grad_() for x in (weight, bias)]
    result = vosops.identity_embedding(labels.to(device), *leaves, stride=stride, padding=padding)
    exact = [x.double().requires_grad_() for x in (weight, bias)]
    expected = convolved(labels, *exact, stride, padding)
    assert result.shape == expected.shape
    assert result.dtype == dtype
    assert result.is_contiguous()
    slope = torch.linspace(-1, 2, result.numel()).view(result.shape).to(dtype)
    grads = torch.autograd.grad(result, leaves, slope.to(device))
    bound = max(TOLERANCE, 2 * torch.finfo(dtype).eps)
    for ours, true in zip(
        (result, *grads), (expected, *torch.autograd.grad(expected, exact, slope.double())), strict=True
    ):
        if expected.numel():
            assert relative_error(ours.detach().cpu(), true.detach()) < bound
        else:
            assert (ours == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_type_and_strides(kind: torch.dtype, device: torch.device) -> None:
    labels, weight, bias = (x.to(device) for x in draw(1, 9, 14, channels=20, classes=3, kernel=(3, 5)))
    options = {"stride": 3, "padding": 2}
    expected = vosops.identity_embedding(labels, weight, bias, **options)
    moved = torch.stack((labels, labels), -1).to(kind)[..., 0].mT.contiguous().mT
    strided = weight.to(memory_format=torch.channels_last)
    assert relative_error(vosops.identity_embedding(moved, strided, bias, **options), expected) < TOLERANCE


@pytest.mark.interpreter
def test_labels_that_are_no_class_add_nothing(device: torch.device) -> None:
    labels, weight, bias = (x.to(device) for x in draw(1, 9, 14, channels=20, classes=3, kernel=(3, 5)))
    labels = labels.long()
    ignored = labels.clone()
    for index, label in enumerate((3, 254, -1, 2**32, 2**62, -(2**33))):
        labels[0, index, index], ignored[0, index, index] = label, 255
    options = {"stride": 3, "padding": 2}
    leaf = weight.clone().requires_grad_()
    result = vosops.identity_embedding(labels, leaf, bias, **options)
    assert torch.equal(result, vosops.identity_embedding(ignored, weight, bias, **options))
    assert torch.autograd.grad(result.sum(), leaf)[0].isfinite().all()


@pytest.mark.interpreter
def test_nan_stays_where_it_is(device: torch.device) -> None:
    labels, weight, bias = draw(1, 4, 12, channels=20, classes=4, kernel=(2, 2))
    labels[labels == 2] = 0
    options = {"stride": 2, "padding": 0}
    clean = vosops.identity_embedding(*(x.to(device) for x in (labels, weight, bias)), **options).cpu()
    weight[3, 1] = torch.nan  # a class that is there
    weight[4, 2] = torch.nan  # and one that is not
    result = vosops.identity_embedding(*(x.to(device) for x in (labels, weight, bias)), **options).cpu()
    shown = (labels == 1).unfold(1, 2, 2).unfold(2, 2, 2).any(-1).any(-1)[0]
    assert torch.equal(result[0, 3].isnan(), shown)
    result[0, 3, shown] = clean[0, 3, shown]
    assert torch.equal(result, clean)


def test_repeats(gpu: torch.device) -> None:
    labels, weight, _ = (x.to(gpu) for x in draw(1, 481, 849, channels=256))
    leaf = weight.requires_grad_()
    results = []
    for _ in range(2):
        result = vosops.identity_embedding(labels, leaf)
        results.append((result, *torch.autograd.grad(result.square().sum(), leaf)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_soft_masks(device: torch.device) -> None:
    labels, weight, bias = (x.to(device) for x in draw(2, 49, 65))
    hard = torch.stack([labels == i for i in range(11)], 1).float()
    torch.testing.assert_close(
        vosops.identity_embedding(hard, weight, bias),
        vosops.identity_embedding(labels, weight, bias),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("biased", [False, True])
def test_registration(biased: bool, backend: str, gpu: torch.device) -> None:
    family = "triton_" if backend == "triton" else ""
    labels, weight, bias = (x.to(gpu) for x in draw(1, 33, 49))
    given = (labels, weight.requires_grad_(), bias.requires_grad_() if biased else None)
    forward, backward = (
        getattr(torch.ops.vosops, f"{family}identity_embedding{end}").default for end in ("", "_backward")
    )
    torch.library.opcheck(forward, (*given, 16, 8))
    grad = torch.ones(1, 70, 3, 4, device=gpu)
    torch.library.opcheck(backward, (grad, labels, weight.detach(), 16, 8))
    torch._dynamo.reset()
    compiled = torch.compile(vosops.identity_embedding, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), vosops.identity_embedding(*given))


def test_graph_without_waiting_or_a_one_hot_mask(gpu: torch.device) -> None:
    """At 480p the one-hot mask takes 17 MiB, the result 1.7."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    labels, weight, bias = (x.to(gpu) for x in draw(1, 481, 849, channels=256))

    def call() -> Tensor:
        return vosops.identity_embedding(labels, weight, bias)

    assert peak_extra(call) < 8 * MIB
    expected = call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, expected)
