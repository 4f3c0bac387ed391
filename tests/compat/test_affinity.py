# SPDX-License-Identifier: Apache-2.0
"""Similarity and affinity that are not stored: fused where they can be, real tensors everywhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vosops.compat.affinity import Affinity, Similarity, gather_parts
from vosops.compat.growing import growing
from vosops.compat.xmem import do_softmax, get_affinity, get_similarity, readout
from vosops.ops import backends

from . import stand_ins

B, CK, N, P, TOP_K = 2, 8, 60, 12, 7
# Sums of 8 and 60 products in float32, relative to values of about 10.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Any:
    if reasons := backends.reasons_against(request.param, {}):
        pytest.skip("; ".join(reasons))
    with backends.use_backend(request.param):
        yield


def draw(batch: int = B, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mk, qk = torch.randn(batch, CK, N, generator=generator), torch.randn(batch, CK, P, generator=generator)
    ms, qe = 1 + torch.rand(batch, 1, N, generator=generator), torch.rand(batch, CK, P, generator=generator)
    return tuple(x.requires_grad_(grad) for x in (mk, ms, qk, qe))  # type: ignore[return-value]


@pytest.mark.parametrize("with_ms", [True, False])
@pytest.mark.parametrize("with_qe", [True, False])
@pytest.mark.parametrize("top_k", [TOP_K, None])
def test_the_chain_gives_the_published_numbers_without_the_matrix(
    backend: Any, with_ms: bool, with_qe: bool, top_k: int | None
) -> None:
    mk, ms, qk, qe = draw()
    operands = (mk, ms if with_ms else None, qk, qe if with_qe else None)
    similarity = get_similarity(*operands)
    affinity, usage = do_softmax(similarity, top_k, return_usage=True)
    value = torch.randn(B, 5, N)
    expected = stand_ins.get_similarity(*operands)
    weights, expected_usage = stand_ins.do_softmax(expected, top_k, return_usage=True)
    torch.testing.assert_close(value @ affinity, value @ weights, **TOLERANCE)
    torch.testing.assert_close(usage, expected_usage, **TOLERANCE)
    assert isinstance(similarity, Similarity)
    assert similarity.lazy
    if top_k:
        assert affinity.lazy  # type: ignore[union-attr]
    torch.testing.assert_close(affinity.clone(), weights, **TOLERANCE)
    torch.testing.assert_close(similarity + 0, expected, **TOLERANCE)


def test_readout_and_get_affinity_of_training() -> None:
    mk, ms, qk, qe = draw()
    value = torch.randn(B, 5, 5, 3, 4)
    affinity = get_affinity(mk.view(B, CK, 5, 3, 4), ms.view(B, 1, 5, 3, 4), qk.view(B, CK, 3, 4), qe)
    expected = stand_ins.readout(stand_ins.get_affinity(mk, ms, qk, qe), value)
    torch.testing.assert_close(readout(affinity, value), expected, **TOLERANCE)
    assert affinity.lazy  # type: ignore[attr-defined]
    torch.testing.assert_close(readout(affinity + 0, value), expected, **TOLERANCE)


@pytest.mark.parametrize("top_k", [TOP_K, None])
def test_gradients_are_those_of_the_published_formula(top_k: int | None) -> None:
    grads = []
    for module in (stand_ins, None):
        mk, ms, qk, qe = operands = draw(grad=True)
        value = torch.linspace(-1, 1, B * 5 * N).view(B, 5, 5, 3, 4).requires_grad_()
        similarity = (module.get_similarity if module else get_similarity)(mk, ms, qk, qe)
        affinity = (module.do_softmax if module else do_softmax)(similarity, top_k)
        assert similarity.requires_grad
        assert affinity.requires_grad
        (module.readout if module else readout)(affinity, value).square().sum().backward()
        grads.append([x.grad for x in (*operands, value)])
    for ours, published in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, published, rtol=2e-4, atol=2e-5)


def test_a_materialised_affinity_keeps_its_gradients() -> None:
    operands, others = draw(grad=True), draw(grad=True)
    (get_affinity(*operands) * 2).square().sum().backward()
    (stand_ins.get_affinity(*others) * 2).square().sum().backward()
    for x, y in zip(operands, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-4, atol=2e-5)


SLICES: list[Callable[[Tensor], Tensor]] = [
    lambda s: s[:, 20:],
    lambda s: s[:, -25:],
    lambda s: s[:, :20],
    lambda s: s[:, -25:, torch.arange(P) % 3 == 0],
    lambda s: s[:, 5:50, 2:8],
    lambda s: s[:, torch.tensor([3, 1, 59])],
    lambda s: torch.cat([s[:, :20][:, -9:], s[:, 20:]], 1),
]


@pytest.mark.parametrize("number", range(len(SLICES)))
def test_slices_and_joins_of_groups_stay_lazy(number: int) -> None:
    part = SLICES[number](get_similarity(*draw()))
    expected = SLICES[number](stand_ins.get_similarity(*draw()))
    assert part.shape == expected.shape
    affinity = do_softmax(part, 3)
    value = torch.randn(B, 4, expected.shape[1])
    torch.testing.assert_close(value @ affinity, value @ stand_ins.do_softmax(expected, 3), **TOLERANCE)
    assert part.lazy  # type: ignore[attr-defined]


OTHERS: list[Callable[[Tensor], Any]] = [
    lambda a: a[0],
    lambda a: a.softmax(1),
    lambda a: a[:, None],
    lambda a: a[..., 3],
    lambda a: a[:, :, 1:2],
    lambda a: a.sum(),
    lambda a: a.sum(dim=1),
    lambda a: a.sum(2, keepdim=True),
    lambda a: a.mT @ torch.ones(N, 2),
    lambda a: torch.ones(2, 3, N) @ a[:1],
    lambda a: torch.einsum("bnp,bcn->bcp", a, torch.ones(B, 3, N)),
    lambda a: torch.cat([a, a]),
    lambda a: a.mul_(2),
    lambda a: a.max(1)[1],
    lambda a: torch.from_numpy(a.numpy()),
    lambda a: copy.deepcopy(a),
    lambda a: torch.topk(a, 4, dim=1)[0],
    lambda a: a.view(B, -1),
    lambda a: a.detach().double(),
]


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_whatever_else_is_done_gets_the_numbers(number: int) -> None:
    ours = OTHERS[number](do_softmax(get_similarity(*draw()), TOP_K))
    expected = OTHERS[number](stand_ins.do_softmax(stand_ins.get_similarity(*draw()), TOP_K))
    torch.testing.assert_close(ours, expected, **TOLERANCE)


def test_a_similarity_has_its_own_softmax_too() -> None:
    similarity, expected = get_similarity(*draw()), stand_ins.get_similarity(*draw())
    torch.testing.assert_close(similarity.softmax(1), expected.softmax(1), **TOLERANCE)
    torch.testing.assert_close(torch.softmax(similarity, dim=1), expected.softmax(1), **TOLERANCE)


def test_what_is_written_into_it_is_what_is_read() -> None:
    affinity = get_affinity(*draw())
    affinity[:, :30] = 0
    weights = stand_ins.get_affinity(*draw())
    weights[:, :30] = 0
    value = torch.randn(B, 5, 5, 3, 4)
    torch.testing.assert_close(readout(affinity, value), stand_ins.readout(weights, value), **TOLERANCE)
    torch.testing.assert_close(affinity.sum(dim=2), weights.sum(dim=2), **TOLERANCE)


def test_about_it_is_known_without_the_numbers() -> None:
    affinity = do_softmax(get_similarity(*draw()), TOP_K)
    assert isinstance(affinity, Affinity)
    assert affinity.shape == (B, N, P)
    assert (affinity.size(1), affinity.dim(), affinity.ndim, len(affinity)) == (N, 3, 3, B)
    assert (affinity.dtype, affinity.device.type, affinity.is_cuda) == (torch.float32, "cpu", False)
    assert affinity.is_floating_point()
    assert isinstance(affinity, torch.Tensor)
    assert not affinity.requires_grad
    assert repr(affinity) == "Affinity((2, 60, 12), torch.float32, lazy=True)"
    assert affinity.lazy


@pytest.mark.parametrize("objects", [1, 3])
def test_objects_that_share_one_batch_entry(objects: int) -> None:
    mk, ms, qk, qe = draw(1)
    affinity, weights = (module(mk, ms, qk, qe) for module in (get_similarity, stand_ins.get_similarity))
    affinity, weights = do_softmax(affinity, TOP_K), stand_ins.do_softmax(weights, TOP_K)
    value = torch.randn(objects, 4, N)
    torch.testing.assert_close(value @ affinity, value @ weights, **TOLERANCE)
    torch.testing.assert_close(torch.matmul(value[0], affinity), value[0] @ weights, **TOLERANCE)
    torch.testing.assert_close(growing(value) @ affinity, value @ weights, **TOLERANCE)
    assert affinity.lazy


def test_a_read_of_parts_is_the_read_of_their_cat() -> None:
    similarity = get_similarity(*draw())
    affinity = do_softmax(similarity, TOP_K)
    value = torch.randn(B, 3, 4, N)
    parts = value.split((10, 35, 15), -1)
    torch.testing.assert_close(affinity.read(*parts), affinity.read(value))  # type: ignore[union-attr]
    dense = do_softmax(similarity)
    torch.testing.assert_close(dense.read(*parts), dense.read(value), **TOLERANCE)  # type: ignore[union-attr]
    assert gather_parts(affinity.match, (value,)).shape == (B, 3, 4, P)  # type: ignore[union-attr]


def test_scores_that_give_nan_as_published() -> None:
    mk, ms, qk, qe = draw()
    affinity = do_softmax(get_similarity(mk * 100, ms, qk, qe), TOP_K)
    assert (torch.ones(B, 1, N) @ affinity - 1).abs().max() < 1e-5


def test_an_ordinary_similarity_is_served_too_and_overwritten_when_asked() -> None:
    scores = stand_ins.get_similarity(*draw())
    expected = stand_ins.do_softmax(scores, TOP_K)
    torch.testing.assert_close(do_softmax(scores, TOP_K), expected, **TOLERANCE)
    torch.testing.assert_close(do_softmax(scores), scores.softmax(1))
    assert do_softmax(scores, TOP_K, inplace=True) is scores
    torch.testing.assert_close(scores, expected, **TOLERANCE)


def test_autocast_keeps_the_affinity_in_float32_and_reads_in_its_dtype() -> None:
    mk, ms, qk, qe = draw()
    value = torch.randn(B, 5, 5, 3, 4)
    expected = stand_ins.readout(stand_ins.get_affinity(mk, ms, qk, qe), value)
    with torch.autocast("cpu", torch.bfloat16):
        affinity = get_affinity(mk, ms, qk, qe)
        read = readout(affinity, value)
        numbers = affinity + 0
    assert (affinity.dtype, read.dtype, numbers.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(read.float(), expected, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(numbers, stand_ins.get_affinity(mk, ms, qk, qe), **TOLERANCE)


def test_below_torch_function_a_lost_gradient_is_an_error() -> None:
    affinity, other = get_affinity(*draw()), get_affinity(*draw(grad=True))
    with torch._C.DisableTorchFunctionSubclass():
        torch.testing.assert_close(torch.add(affinity, 1), stand_ins.get_affinity(*draw()) + 1, **TOLERANCE)
        with pytest.raises(RuntimeError, match="would lose the gradient of this Affinity"):
            torch.add(other, 1)


def test_a_compiled_graph_gets_ordinary_tensors() -> None:
    def read(*operands: Tensor) -> Tensor:
        return readout(get_affinity(*operands), torch.ones(B, 1, 5, 3, 4))

    compiled = torch.compile(read, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*draw()), torch.ones(B, 1, 3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mk, ms, qk, qe: (mk[:, 1:], ms, qk, qe), "query_key"),
        (lambda mk, ms, qk, qe: (mk, ms[:, :, 1:], qk, qe), "shrinkage"),
        (lambda mk, ms, qk, qe: (mk, ms, qk, qe[:, :, 1:]), "selection"),
    ],
)
def test_bad_operands_are_named_before_any_work(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_similarity(*change(*draw()))


def test_a_bad_value_or_top_k_is_named() -> None:
    affinity = get_affinity(*draw())
    with pytest.raises(ValueError, match=r"mv must be \(B, Cv, T, H, W\).*got mv \(2, 5, 4, 3, 4\)"):
        readout(affinity, torch.zeros(B, 5, 4, 3, 4))
    with pytest.raises((TypeError, ValueError), match="top_k"):
        do_softmax(get_similarity(*draw()), 0)
