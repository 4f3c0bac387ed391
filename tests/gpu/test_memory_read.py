# SPDX-License-Identifier: Apache-2.0
"""Values of the memory read on every GPU backend against the float64 reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.memory_read import limits

from ..ops.helpers import VARIANTS, relative_error, score_arguments
from .helpers import (
    check_match,
    eager,
    gathered64,
    layout,
    on,
    problem,
    read64,
    skip_if_refused,
)

# float32 products are made in three tf32 passes, good to about 1e-6 each.
TOLERANCE = 2e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What the interpreter runs too: it has no bfloat16, and takes 30 ms for a query with top_k.
INTERPRETED = [
    pytest.param(torch.float32, marks=pytest.mark.interpreter),
    torch.bfloat16,
    pytest.param(torch.float16, marks=pytest.mark.interpreter),
]
WIDE = [pytest.param(torch.float32, marks=pytest.mark.interpreter), torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype) -> float:
    """The result is rounded once; the dense read also rounds its weights."""
    return TOLERANCE if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense(variant: str, dtype: torch.dtype, mask: bool, backend: str, device: torch.device) -> None:
    arguments = on(device, problem(variant, device, mask=mask, dtype=dtype))
    skip_if_refused(backend, arguments, None)
    read, usage = vosops.memory_read(**arguments, return_usage=True)
    expected, expected_usage = read64(arguments, return_usage=True)
    assert read.shape == expected.shape
    assert read.dtype == dtype
    assert read.is_contiguous()
    assert relative_error(read.cpu(), expected) < tolerance(dtype)
    assert relative_error(usage.cpu(), expected_usage) < 5 * TOLERANCE


@pytest.mark.parametrize("top_k", [1, pytest.param(7, marks=pytest.mark.interpreter), 30, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_top_k(variant: str, dtype: torch.dtype, top_k: int, backend: str, device: torch.device) -> None:
    if device.type == "cpu" and dtype != torch.float32 and variant not in ("l2", "l2_both"):
        pytest.skip("two float16 variants are enough for the interpreter's time")
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    sizes = {"grid": (2, 3), "frames": 9} if device.type == "cpu" else {}
    arguments = on(device, problem(variant, device, mask=top_k != 30, dtype=dtype, **sizes))
    skip_if_refused(backend, arguments, top_k)
    match = vosops.memory_match(**score_arguments(arguments), top_k=top_k)
    check_match(match, arguments, top_k)
    read, usage = vosops.memory_read(**arguments, top_k=top_k, return_usage=True)
    expected = gathered64(match, arguments["memory_value"])
    assert relative_error(read.flatten(3).cpu(), expected) < tolerance(dtype)
    total = torch.zeros(2, usage[0].numel()).scatter_add_(
        1, match.indices.cpu().clamp(min=0).flatten(1), match.weights.cpu().flatten(1)
    )
    assert relative_error(usage.flatten(1).cpu(), total) < TOLERANCE


@pytest.mark.interpreter
def test_more_than_the_memory_holds_is_all_of_it(backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float16
    arguments = on(device, problem("l2", device, grid=(2, 2), frames=15, dtype=dtype))
    match = vosops.memory_match(**score_arguments(arguments), top_k=61)
    assert match.indices.shape == (2, 4, 60)
    check_match(match, arguments, 61)
    skip_if_refused(backend, arguments, 1000)
    assert torch.equal(vosops.memory_read(**arguments, top_k=1000), vosops.memory_read(**arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [pytest.param(None, marks=pytest.mark.interpreter), 9, 50])
@pytest.mark.parametrize("variant", ["dot", "l2_both"])
@pytest.mark.parametrize("kind", ["kernel", "window", "mask", "center", "sigmas"])
def test_priors(
    kind: str, variant: str, top_k: int | None, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    if device.type == "cpu" and dtype != torch.float32:
        pytest.skip("float32 is enough for the interpreter's time")
    arguments = problem(variant, device, grid=(5, 7), frames=3)  # in float32: the argmax must not be a tie
    height, width = arguments["query_key"].shape[2:]
    generator = torch.Generator().manual_seed(3)
    previous = torch.rand(2, height, width, generator=generator) > 0.7
    previous[1] = False  # an empty previous mask leaves the plain kernel
    of_object = torch.rand(2, 3, height, width, generator=generator)
    cells = torch.rand(1, 3, height, width, 2, generator=generator) * 9
    arguments = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    there = on(device, arguments)
    masks = previous.to(device), of_object.to(device)
    prior = {
        "kernel": vosops.KernelPrior(),
        "window": vosops.KernelPrior(sigma=2.0, window=3, sigma_growth=0.5),
        "mask": vosops.MaskPrior(*masks, sigma=3.0, strength=0.5, spread=1.5),
        "center": vosops.CenterPrior(cells.to(device), sigma=1.5),
        "sigmas": vosops.CenterPrior(cells.to(device), sigma=1 + masks[1]),
    }[kind]
    skip_if_refused(backend, there, top_k, prior)
    read = vosops.memory_read(**there, prior=prior, top_k=top_k)
    expected = read64(arguments, prior=_on_cpu(prior), top_k=top_k)
    assert relative_error(read.cpu(), expected) < tolerance(dtype)


def _on_cpu(prior: Any) -> Any:
    fields = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(prior).items()
    }
    return type(prior)(**fields)


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("dtype", INTERPRETED[1:])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision(
    variant: str, dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    """At most twice the error of torch in the same low precision, measured against float64."""
    if device.type == "cpu" and top_k is not None and variant != "l2_both":
        pytest.skip("one variant with top_k is enough for the interpreter's time")
    arguments = on(device, problem(variant, device, channels=33 if backend == "triton" else 56, dtype=dtype))
    skip_if_refused(backend, arguments, top_k)
    read = vosops.memory_read(**arguments, top_k=top_k)
    assert read.dtype == dtype
    exact = read64(arguments, top_k=top_k)
    allowed = 2 * (eager(arguments, top_k).cpu().double() - exact).norm() + 1e-6 * exact.norm()
    assert (read.cpu().double() - exact).norm() <= allowed


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_mixed_dtypes(top_k: int | None, stored: torch.dtype, backend: str, device: torch.device) -> None:
    """A bank in low precision read with float32 queries gives float32, exact for what is stored."""
    if device.type == "cpu" and stored == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    arguments = on(device, problem("l2_both", device))
    for name in ("memory_key", "memory_value", "shrinkage"):
        arguments[name] = arguments[name].to(stored)
    skip_if_refused(backend, arguments, top_k)
    read = vosops.memory_read(**arguments, top_k=top_k)
    assert read.dtype == torch.float32
    assert relative_error(read.cpu(), read64(arguments, top_k=top_k)) < TOLERANCE


@pytest.mark.parametrize(
    "top_k",
    [pytest.param(None, marks=pytest.mark.interpreter), pytest.param(6, marks=pytest.mark.interpreter)],
)
@pytest.mark.parametrize("name", ["channels_last", "strided", "crop", "objects"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(
    name: str, top_k: int | None, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    if device.type == "cpu" and (dtype != torch.float32 or (top_k is not None and name != "crop")):
        pytest.skip("float32, and one layout with top_k, are enough for the interpreter's time")
    arguments = problem("l2_both", device, mask=True, dtype=dtype, value_channels=37)
    skip_if_refused(backend, on(device, arguments), top_k)
    expected = vosops.memory_read(**on(device, arguments), top_k=top_k)
    other = {
        key: layout(value, name) if isinstance(value, Tensor) and value.dtype == dtype else value
        for key, value in arguments.items()
    }
    there = on(device, other)
    for key, value in other.items():
        assert not isinstance(value, Tensor) or there[key].stride() == value.stride()
    read = vosops.memory_read(**there, top_k=top_k)
    torch.testing.assert_close(read, expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [((3,), (13,)), ((1, 3, 2), (5,)), ((3, 2), (2, 2, 3, 4))])
def test_any_spatial_shape(
    shape: tuple[tuple[int, ...], tuple[int, ...]], backend: str, device: torch.device
) -> None:
    q_shape, m_shape = shape
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    query_key = torch.randn(2, 8, *q_shape).to(device, dtype)
    memory_key = torch.randn(2, 8, *m_shape).to(device, dtype)
    value = torch.randn(2, 3, 4, *m_shape).to(device, dtype)
    for top_k in (None, 4):
        if backend == "cuda" and top_k is None:
            continue  # it has no dense read: test_a_refused_call_says_why
        read, usage = vosops.memory_read(query_key, memory_key, value, top_k=top_k, return_usage=True)
        flat = vosops.memory_read(query_key.flatten(2), memory_key.flatten(2), value.flatten(3), top_k=top_k)
        assert read.shape == (2, 3, 4, *q_shape)
        assert usage.shape == (2, *m_shape)
        assert torch.equal(read.flatten(3), flat)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.interpreter) if seed < 4 else seed for seed in range(24)]
)
def test_any_size(seed: int, backend: str, device: torch.device) -> None:
    draw = random.Random(seed)
    most = (3, 5) if device.type == "cpu" else (17, 40)
    variant = draw.choice(VARIANTS)
    channels = draw.randint(1, 64 if variant in ("l2_selection", "l2_both") else 128)
    arguments = problem(
        variant,
        device,
        seed=seed,
        batch=draw.randint(1, 3),
        channels=channels if backend == "triton" else -(-channels // 8) * 8,
        grid=(draw.randint(1, most[0]), draw.randint(1, most[1])),
        frames=draw.randint(1, 4),
        objects=draw.randint(1, 3),
        value_channels=draw.randint(1, 300 if device.type == "cuda" else 20),
        mask=draw.random() < 0.5,
        dtype=draw.choice(DTYPES) if device.type == "cuda" else torch.float32,
    )
    dtype = arguments["query_key"].dtype
    top_k = draw.choice([None, 1, 5, 40])
    there = on(device, arguments)
    skip_if_refused(backend, there, top_k)
    read = vosops.memory_read(**there, top_k=top_k)
    if top_k is None or top_k >= arguments["memory_key"][0, 0].numel():
        expected = read64(arguments)
    else:
        match = vosops.memory_match(**score_arguments(there), top_k=top_k)
        check_match(match, there, top_k)
        expected = gathered64(match, arguments["memory_value"]).unflatten(3, read.shape[3:])
    # Scores reach several hundred here, so their rounding, about 1e-7 of that, shows in the weights.
    allowed = 2e-3 if dtype == torch.float32 else 2e-3 + 2 * torch.finfo(dtype).eps
    assert (read.cpu().double() - expected).abs().max() <= allowed * max(1.0, float(expected.abs().max()))


@pytest.mark.interpreter
@pytest.mark.parametrize("level", [-300.0, 200.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_scores_that_make_the_published_code_nan(
    level: float, top_k: int | None, backend: str, device: torch.device
) -> None:
    """exp without subtracting the maximum over- or underflows; a constant in all scores changes nothing."""
    arguments = on(device, problem("dot", device, channels=7, grid=(2, 3)))
    if backend == "cuda":
        arguments = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    skip_if_refused(backend, arguments, top_k)
    expected = vosops.memory_read(**arguments, top_k=top_k, scale=1.0)
    for name, fill in (("query_key", 1.0), ("memory_key", level)):
        x = arguments[name]
        arguments[name] = torch.cat((x, torch.full_like(x[:, :1], fill)), 1)
    read = vosops.memory_read(**arguments, top_k=top_k, scale=1.0)
    limit = 2e-4 if backend == "triton" else 2e-2  # float32 near 300 resolves 3e-5; bfloat16 results
    torch.testing.assert_close(read, expected, rtol=0, atol=limit)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 3, 40])
def test_ties_and_constant_keys(top_k: int | None, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float16
    query_key, memory_key = (torch.ones(1, 8, n, device=device, dtype=dtype) for n in (4, 300))
    value = torch.arange(300.0).to(device, dtype).expand(1, 1, 2, 300)
    arguments = {"query_key": query_key, "memory_key": memory_key, "memory_value": value, "similarity": "dot"}
    skip_if_refused(backend, arguments, top_k)
    read = vosops.memory_read(**arguments, top_k=top_k)
    mean = 149.5 if top_k is None else (top_k - 1) / 2
    torch.testing.assert_close(read.float().cpu(), torch.full((1, 1, 2, 4), mean))
    if top_k:
        match = vosops.memory_match(query_key, memory_key, top_k=top_k)
        assert match.indices[0].tolist() == [list(range(top_k))] * 4, "the lowest index wins"


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_levels(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Keys of small integers: many equal scores, products exact, so the order by index is known."""
    generator = torch.Generator().manual_seed(2)
    for top_k in (20, 128):
        query_key = torch.randint(-2, 3, (1, 8, 70), generator=generator).to(device, dtype)
        memory_key = torch.randint(-2, 3, (1, 8, 20_000), generator=generator).to(device, dtype)
        skip_if_refused(
            backend, {"query_key": query_key, "memory_key": memory_key, "similarity": "dot"}, top_k
        )
        match = vosops.memory_match(query_key, memory_key, top_k=top_k, scale=1.0)
        scores = query_key[0].double().mT @ memory_key[0].double()
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(match.indices[0], order)


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 3])
def test_nan_and_infinity_stay_where_they_are(top_k: int | None, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    arguments = on(device, problem("l2_both", device, mask=True, dtype=dtype, grid=(3, 2)))
    skip_if_refused(backend, arguments, top_k)
    clean = vosops.memory_read(**arguments, top_k=top_k)
    assert clean.isfinite().all()
    query_key = arguments["query_key"].clone()
    query_key[1, 3, 2, 1] = torch.nan
    read = vosops.memory_read(**{**arguments, "query_key": query_key}, top_k=top_k)
    assert read[1, :, :, 2, 1].isnan().all()
    touched = torch.zeros(2, 1, 1, 3, 2, dtype=torch.bool, device=device)
    touched[1, :, :, 2, 1] = True
    assert torch.equal(read.masked_fill(touched, 0), clean.masked_fill(touched, 0))
    for bad in (torch.nan, torch.inf):  # in a masked position nothing is touched, neither key nor value
        hidden = ~arguments["memory_mask"]
        memory_key = arguments["memory_key"].masked_fill(hidden[:, None], bad)
        value = arguments["memory_value"].masked_fill(hidden[:, None, None], bad)
        changed = {**arguments, "memory_key": memory_key, "memory_value": value}
        assert torch.equal(vosops.memory_read(**changed, top_k=top_k), clean)
    memory_key = arguments["memory_key"].clone()
    memory_key[0, 0].masked_fill_(arguments["memory_mask"][0], torch.nan)
    read = vosops.memory_read(**{**arguments, "memory_key": memory_key}, top_k=top_k)
    assert read[0].isnan().all()
    assert torch.equal(read[1], clean[1])


@pytest.mark.parametrize("where", ["first", "last", "middle"])
def test_one_nan_key_is_found_anywhere(where: str, backend: str, device: torch.device) -> None:
    """One position among 5000: the filter by group maxima must not drop it."""
    keys = torch.randn(1, 16, 5000, device=device, dtype=torch.bfloat16)
    keys[0, 5, {"first": 0, "last": -1, "middle": 2345}[where]] = torch.nan
    value = torch.randn(1, 1, 8, 5000, device=device, dtype=torch.bfloat16)
    query = torch.randn(1, 16, 100, device=device, dtype=torch.bfloat16)
    assert vosops.memory_read(query, keys, value, top_k=9).isnan().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 3])
def test_nothing_to_match_reads_zero(top_k: int | None, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float16
    arguments = on(device, problem("l2", device, mask=True, dtype=dtype, grid=(3, 2)))
    arguments["memory_mask"][1] = False
    skip_if_refused(backend, arguments, top_k)
    read, usage = vosops.memory_read(**arguments, top_k=top_k, return_usage=True)
    assert (read[1] == 0).all()
    assert (usage[1] == 0).all()
    assert not read[0].eq(0).all()
    if top_k:
        match = vosops.memory_match(**score_arguments(arguments), top_k=top_k)
        assert (match.indices[1] == -1).all()
        assert (match.weights[1] == 0).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("empty", ["batch", "objects", "value_channels", "queries"])
def test_empty_results(empty: str, top_k: int | None, backend: str, device: torch.device) -> None:
    sizes = {"batch": 1, "objects": 2, "value_channels": 4, "queries": 2}
    sizes[empty] = 0
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    query_key = torch.randn(sizes["batch"], 8, sizes["queries"]).to(device, dtype)
    memory_key = torch.randn(sizes["batch"], 8, 9).to(device, dtype)
    value = torch.randn(sizes["batch"], sizes["objects"], sizes["value_channels"], 9).to(device, dtype)
    arguments = {"query_key": query_key, "memory_key": memory_key, "memory_value": value, "similarity": "dot"}
    skip_if_refused(backend, arguments, top_k)
    leaves = {k: v.requires_grad_() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    read, usage = vosops.memory_read(**leaves, top_k=top_k, return_usage=True)
    assert read.shape == (*value.shape[:3], sizes["queries"])
    assert usage.shape == (sizes["batch"], 9)
    read.sum().backward()
    for name in ("query_key", "memory_key", "memory_value"):
        assert (leaves[name].grad == 0).all()


@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize("top_k", [None, 25])
def test_one_query_against_a_large_memory(
    dtype: torch.dtype, top_k: int | None, backend: str, device: torch.device
) -> None:
    """Few queries: the memory is split among programs and their parts merged."""
    generator = torch.Generator().manual_seed(1)
    size = 100_000 if device.type == "cuda" else 6_000
    query_key, memory_key = (torch.randn(1, 32, n, generator=generator).to(dtype) for n in (1, size))
    value = torch.randn(1, 1, 8, size, generator=generator).to(dtype)
    arguments = {"query_key": query_key, "memory_key": memory_key, "memory_value": value, "similarity": "dot"}
    there = on(device, arguments)
    skip_if_refused(backend, there, top_k)
    read = vosops.memory_read(**there, top_k=top_k)
    assert relative_error(read.cpu(), read64(arguments, top_k=top_k)) < 2 * tolerance(dtype)


@pytest.mark.parametrize("memory", [15, 16, 17, 127, 128, 129, 5000, 300_000])
def test_memory_beside_the_block_sizes(memory: int, backend: str, gpu: torch.device) -> None:
    """Groups and tiles end at these sizes; above 262,144 positions the groups grow."""
    arguments = {
        "query_key": torch.randn(1, 8, 66).bfloat16(),
        "memory_key": torch.randn(1, 8, memory).bfloat16(),
        "similarity": "l2",
    }
    match = vosops.memory_match(**on(gpu, arguments), top_k=16)
    check_match(match, arguments, 16)


def test_a_refused_call_says_why(backend: str, gpu: torch.device) -> None:
    arguments = on(gpu, problem("dot", gpu, dtype=torch.bfloat16))
    with pytest.raises(vosops.BackendError, match=f"it keeps at most {limits.LARGEST_TOP_K}"):
        vosops.memory_read(**arguments, top_k=limits.LARGEST_TOP_K + 1)
    if backend == "cuda":
        with pytest.raises(vosops.BackendError, match="no dense read"):
            vosops.memory_read(**arguments)
    with pytest.raises(vosops.BackendError, match="float64"):
        vosops.memory_read(**{k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()})


@pytest.mark.interpreter
def test_gather_reads_several_banks_with_one_match(backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    arguments = on(device, problem("l2", device, dtype=dtype, grid=(2, 3)))
    match = vosops.memory_match(**score_arguments(arguments), top_k=5)
    value = arguments["memory_value"]
    whole = vosops.memory_gather(match, value)
    assert torch.equal(whole, vosops.memory_read(**arguments, top_k=5))
    parts = torch.cat([vosops.memory_gather(match, value[:, i : i + 1]) for i in range(2)], 1)
    assert torch.equal(parts, whole)
    assert vosops.memory_gather(match, value.half()).dtype == torch.float16
    assert vosops.memory_gather(match, value.half(), dtype=torch.float32).dtype == torch.float32


def test_an_index_past_the_memory_reads_nan(backend: str, gpu: torch.device) -> None:
    """Raising would need to wait for the GPU; reading what lies there must not happen."""
    arguments = on(gpu, problem("l2", gpu, dtype=torch.bfloat16))
    match = vosops.memory_match(**score_arguments(arguments), top_k=5)
    indices = match.indices.clone()
    indices[0, 3, 2] = 1 << 40
    read = vosops.memory_gather(match._replace(indices=indices), arguments["memory_value"]).flatten(3)
    assert read[0, :, :, 3].isnan().all()
    expected = vosops.memory_gather(match, arguments["memory_value"]).flatten(3)
    kept = [q for q in range(read.shape[3]) if q != 3]
    assert torch.equal(read[0][..., kept], expected[0][..., kept])
    assert torch.equal(read[1], expected[1])


@pytest.mark.interpreter
@pytest.mark.parametrize("top_k", [None, 5])
def test_results_repeat_bit_by_bit(top_k: int | None, backend: str, device: torch.device) -> None:
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    sizes: dict[str, Any] = (
        {"grid": (2, 3)} if device.type == "cpu" else {"grid": (30, 54), "value_channels": 256}
    )
    arguments = on(device, problem("l2_both", device, batch=1, dtype=dtype, **sizes))
    skip_if_refused(backend, arguments, top_k)
    first = vosops.memory_read(**arguments, top_k=top_k)
    for _ in range(2 if device.type == "cpu" else 20):
        assert torch.equal(vosops.memory_read(**arguments, top_k=top_k), first)
