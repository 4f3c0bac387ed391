# SPDX-License-Identifier: Apache-2.0
"""Values of the memory read on the compiled CPU backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vosops
from vosops.ops.memory_read import reference

from .helpers import VARIANTS, check_match, problem, relative_error, score_arguments, scores64, widened

pytestmark = pytest.mark.usefixtures("cpu_backend")

# Float32 sums of a few dozen products are good to about 1e-6; measured errors stay below a third of this.
TOLERANCE = 1e-5


def read64(arguments: dict, **options: object) -> torch.Tensor:
    with vosops.use_backend("reference"):
        return vosops.memory_read(**widened(arguments), **options)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense(variant: str, mask: bool, isa: str) -> None:
    arguments = problem(variant, mask=mask)
    read, usage = vosops.memory_read(**arguments, return_usage=True)
    expected, expected_usage = read64(arguments, return_usage=True)
    assert read.shape == (2, 2, 20, 5, 9)
    assert read.is_contiguous()
    assert relative_error(read, expected) < TOLERANCE
    assert usage.shape == (2, 3, 5, 9)
    assert relative_error(usage, expected_usage) < TOLERANCE


@pytest.mark.parametrize("top_k", [1, 7, 30, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_top_k(variant: str, top_k: int, isa: str) -> None:
    arguments = problem(variant, mask=top_k == 30)
    match = vosops.memory_match(**score_arguments(arguments), top_k=top_k)
    check_match(match, scores64(arguments), top_k, band=2e-5)
    read, usage = vosops.memory_read(**arguments, top_k=top_k, return_usage=True)
    value = widened(arguments)["memory_value"]
    expected = reference.gather(match.indices, match.weights.double(), value, torch.float64)
    assert relative_error(read.flatten(3), expected) < TOLERANCE
    total = torch.zeros(2, usage[0].numel()).scatter_add_(
        1, match.indices.clamp(min=0).flatten(1), match.weights.flatten(1)
    )
    assert relative_error(usage.flatten(1), total) < TOLERANCE


@pytest.mark.parametrize("top_k", [None, 9])
@pytest.mark.parametrize("variant", ["dot", "l2_both"])
def test_priors(variant: str, top_k: int | None, isa: str) -> None:
    arguments = problem(variant, batch=2, grid=(7, 11))
    generator = torch.Generator().manual_seed(3)
    previous = torch.rand(2, 7, 11, generator=generator) > 0.7
    previous[1] = False  # an empty previous mask leaves the plain kernel
    of_object = torch.rand(2, 3, 7, 11, generator=generator)
    cells = torch.rand(1, 3, 7, 11, 2, generator=generator) * 9
    for prior in (
        vosops.KernelPrior(),
        vosops.KernelPrior(sigma=2.0, window=3, sigma_growth=0.5),
        vosops.MaskPrior(previous, of_object, sigma=3.0, strength=0.5, spread=1.5),
        vosops.CenterPrior(cells, sigma=1.5),
        vosops.CenterPrior(cells, sigma=1 + of_object),
    ):
        read = vosops.memory_read(**arguments, prior=prior, top_k=top_k)
        assert relative_error(read, read64(arguments, prior=prior, top_k=top_k)) < TOLERANCE, prior


def test_mask_prior_moves_the_centre_to_the_object() -> None:
    """Two identical objects: the plain kernel may take either, the previous mask decides."""
    query_key = torch.zeros(1, 4, 9, 20)
    query_key[0, 0, 4, 3] = query_key[0, 0, 4, 16] = 5.0
    memory_key = torch.zeros(1, 4, 1, 9, 20)
    memory_key[0, 0, 0, 4, 3] = 5.0
    value = torch.zeros(1, 1, 1, 1, 9, 20)
    value[0, 0, 0, 0, 4, 3] = 1.0
    previous = torch.zeros(1, 9, 20)
    previous[0, 3:6, 15:18] = 1
    of_object = value[:, 0, 0]
    plain = vosops.memory_read(query_key, memory_key, value, prior=vosops.KernelPrior(2.0))
    moved = vosops.memory_read(query_key, memory_key, value, prior=vosops.MaskPrior(previous, of_object, 2.0))
    assert plain[0, 0, 0, 4, 3] > 0.9
    assert moved[0, 0, 0, 4, 16] > 0.9
    assert moved[0, 0, 0, 4, 3] < 0.1


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_narrow_prior_skips_only_what_cannot_win(sigma: float, isa: str) -> None:
    """Tiles that a narrow prior rules out are skipped: the result must not change."""
    arguments = problem("dot", batch=1, grid=(24, 40), frames=4, channels=16)
    arguments["query_key"] = torch.nn.functional.normalize(arguments["query_key"], dim=1)
    arguments["memory_key"] = torch.nn.functional.normalize(arguments["memory_key"], dim=1)
    rows, columns = torch.meshgrid(torch.arange(24.0), torch.arange(40.0), indexing="ij")
    own = torch.stack((rows, columns), -1).expand(1, 4, 24, 40, 2)
    options = {"prior": vosops.CenterPrior(own, sigma), "top_k": 12, "scale": 6.0}
    assert (
        relative_error(vosops.memory_read(**arguments, **options), read64(arguments, **options)) < TOLERANCE
    )


@pytest.mark.parametrize("top_k", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_low_precision(variant: str, dtype: torch.dtype, top_k: int | None, isa: str) -> None:
    """At most twice the error of torch in the same low precision, measured against float64."""
    arguments = problem(variant, channels=33, dtype=dtype)
    read = vosops.memory_read(**arguments, top_k=top_k)
    assert read.dtype == dtype
    exact = read64(arguments, top_k=top_k)
    eager = eager_in(arguments, top_k)
    assert (read.double() - exact).norm() <= 2 * (eager.double() - exact).norm() + 1e-6 * exact.norm()


def eager_in(arguments: dict, top_k: int | None) -> torch.Tensor:
    """The published composition in plain torch, in the inputs' dtype."""
    q, k = arguments["query_key"].flatten(2), arguments["memory_key"].flatten(2)
    if arguments["similarity"] == "dot":
        s = k.mT @ q
    elif "selection" in arguments:
        e = arguments["selection"].flatten(2)
        s = -(k.square().mT @ e) + 2 * k.mT @ (q * e) - (e * q.square()).sum(1, keepdim=True)
    else:
        s = 2 * k.mT @ q - k.square().sum(1)[..., None]
    if "shrinkage" in arguments:
        s = s * arguments["shrinkage"].flatten(2).mT
    s = s / q.shape[1] ** 0.5
    if top_k is not None:
        s = s.masked_fill(s < s.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    return torch.einsum("bocm,bmq->bocq", arguments["memory_value"].flatten(3), s.softmax(1)).unflatten(
        3, arguments["query_key"].shape[2:]
    )


@pytest.mark.parametrize("top_k", [None, 6])
def test_mixed_dtypes(top_k: int | None, isa: str) -> None:
    """A bfloat16 bank read with float32 queries gives float32, exact for what is stored."""
    arguments = problem("l2_both")
    for name in ("memory_key", "memory_value", "shrinkage"):
        arguments[name] = arguments[name].bfloat16()
    read = vosops.memory_read(**arguments, top_k=top_k)
    assert read.dtype == torch.float32
    assert relative_error(read, read64(arguments, top_k=top_k)) < TOLERANCE


def layouts(x: torch.Tensor, name: str) -> torch.Tensor:
    """The same numbers in other memory: channels last, every other element, a crop, expanded."""
    if name == "channels_last":
        return x.movedim(-3 if x.dim() == 4 else 1, -1).contiguous().movedim(-1, -3 if x.dim() == 4 else 1)
    if name == "strided":
        return torch.stack((x, x + 7), -1).flatten(-2)[..., ::2]
    padded = torch.nn.functional.pad(x, (2, 3, 1, 2))
    return padded[..., 1:-2, 2:-3]


@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("name", ["channels_last", "strided", "crop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(name: str, top_k: int | None, dtype: torch.dtype, isa: str) -> None:
    arguments = problem("l2_both", mask=True, dtype=dtype, value_channels=37)
    expected = vosops.memory_read(**arguments, top_k=top_k)
    moved = {
        key: layouts(value, name) if isinstance(value, torch.Tensor) and value.dtype == dtype else value
        for key, value in arguments.items()
    }
    assert any(not value.is_contiguous() for value in moved.values() if isinstance(value, torch.Tensor))
    torch.testing.assert_close(vosops.memory_read(**moved, top_k=top_k), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("channels", [1, 32, 33])
@pytest.mark.parametrize("name", ["contiguous", "channels_last", "strided", "crop"])
@pytest.mark.parametrize("variant", ["dot", "l2"])
def test_bfloat16_keys_on_both_sides(variant: str, name: str, channels: int, isa: str) -> None:
    """Multiplied in pairs where the CPU can: products are exact, so only the sum's order differs."""
    arguments = problem(variant, mask=True, channels=channels, dtype=torch.bfloat16)
    del arguments["memory_value"]
    for key in ("query_key", "memory_key"):
        if name != "contiguous":
            arguments[key] = layouts(arguments[key], name)
    arguments["memory_key"][~arguments["memory_mask"][:, None].expand_as(arguments["memory_key"])] = torch.nan
    match = vosops.memory_match(**arguments, top_k=7)
    check_match(match, scores64(arguments), 7, band=2e-5)
    arguments["query_key"][1, 0, 2, 3] = torch.nan
    weights = vosops.memory_match(**arguments, top_k=7).weights.unflatten(1, (5, 9))
    assert weights[1, 2, 3].isnan().all()
    assert weights.isnan().sum() == 7


def test_position_major_values_of_several_objects(isa: str) -> None:
    """MemoryBank's layout: the channels of all objects contiguous at each position."""
    arguments = problem("l2", objects=3, value_channels=70)
    expected = vosops.memory_read(**arguments, top_k=5)
    value = arguments["memory_value"].permute(0, 3, 4, 5, 1, 2).contiguous().permute(0, 4, 5, 1, 2, 3)
    read = vosops.memory_read(**{**arguments, "memory_value": value}, top_k=5)
    torch.testing.assert_close(read, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [((7,), (13,)), ((2, 3, 4), (5,)), ((3, 4), (2, 2, 3, 4))])
def test_any_spatial_shape(shape: tuple[tuple[int, ...], tuple[int, ...]], isa: str) -> None:
    q_shape, m_shape = shape
    query_key, memory_key = torch.randn(2, 5, *q_shape), torch.randn(2, 5, *m_shape)
    value = torch.randn(2, 3, 4, *m_shape)
    for top_k in (None, 4):
        read, usage = vosops.memory_read(query_key, memory_key, value, top_k=top_k, return_usage=True)
        flat = vosops.memory_read(query_key.flatten(2), memory_key.flatten(2), value.flatten(3), top_k=top_k)
        assert read.shape == (2, 3, 4, *q_shape)
        assert usage.shape == (2, *m_shape)
        assert torch.equal(read.flatten(3), flat)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    variant=st.sampled_from(VARIANTS),
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 13)),
    frames=st.integers(1, 4),
    objects=st.integers(1, 3),
    value_channels=st.integers(1, 70),
    mask=st.booleans(),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    scale=st.one_of(st.none(), st.floats(0.01, 2)),
)
def test_any_size(seed, variant, mask, top_k, scale, **sizes) -> None:  # type: ignore[no-untyped-def]
    arguments = problem(variant, seed=seed, mask=mask, **sizes)
    read, usage = vosops.memory_read(**arguments, top_k=top_k, scale=scale, return_usage=True)
    if top_k is None:
        expected, expected_usage = read64(arguments, scale=scale, return_usage=True)
    else:
        match = vosops.memory_match(**score_arguments(arguments), top_k=top_k, scale=scale)
        check_match(match, scores64(arguments, scale), top_k, band=3e-4)
        value = widened(arguments)["memory_value"]
        gathered = reference.gather(match.indices, match.weights.double(), value, torch.float64)
        expected, expected_usage = gathered.unflatten(3, read.shape[3:]), usage
    # Scores reach several hundred here, so their rounding, about 1e-7 of that, shows in the weights.
    assert (read.double() - expected).abs().max() < 2e-3 * max(1.0, float(expected.abs().max()))
    assert relative_error(usage, expected_usage) < 2e-3


@pytest.mark.parametrize("level", [-300.0, -200.0, 130.0, 200.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_scores_that_make_the_published_code_nan(level: float, top_k: int | None, isa: str) -> None:
    """exp without subtracting the maximum over- or underflows; a constant in all scores changes nothing."""
    arguments = problem("dot", channels=8)
    expected = vosops.memory_read(**arguments, top_k=top_k, scale=1.0)
    for name, fill in (("query_key", 1.0), ("memory_key", level)):
        x = arguments[name]
        arguments[name] = torch.cat((x, torch.full_like(x[:, :1], fill)), 1)
    scores = scores64(arguments, 1.0)
    assert scores.max() < -104 or scores.min() > 88, "the case must be one where the published code fails"
    read = vosops.memory_read(**arguments, top_k=top_k, scale=1.0)
    torch.testing.assert_close(read, expected, rtol=0, atol=2e-4)  # float32 near 300 resolves 3e-5


@pytest.mark.parametrize("top_k", [None, 3])
def test_ties_and_constant_keys(top_k: int | None, isa: str) -> None:
    query_key, memory_key = torch.ones(1, 4, 6), torch.ones(1, 4, 50)
    value = torch.arange(50.0).expand(1, 1, 2, 50)
    read = vosops.memory_read(query_key, memory_key, value, top_k=top_k)
    torch.testing.assert_close(read, torch.full((1, 1, 2, 6), 24.5 if top_k is None else 1.0))
    if top_k:
        match = vosops.memory_match(query_key, memory_key, top_k=top_k)
        assert match.indices[0].tolist() == [[0, 1, 2]] * 6, "the lowest index wins"


@pytest.mark.parametrize("top_k", [None, 3])
def test_nan_and_infinity_stay_where_they_are(top_k: int | None, isa: str) -> None:
    arguments = problem("l2_both", batch=2, mask=True)
    clean = vosops.memory_read(**arguments, top_k=top_k)
    query_key = arguments["query_key"].clone()
    query_key[1, 3, 2, 4] = torch.nan
    read = vosops.memory_read(**{**arguments, "query_key": query_key}, top_k=top_k)
    assert read[1, :, :, 2, 4].isnan().all()
    touched = torch.zeros(2, 1, 1, 5, 9, dtype=torch.bool)
    touched[1, :, :, 2, 4] = True
    assert torch.equal(read.masked_fill(touched, 0), clean.masked_fill(touched, 0))
    for bad in (torch.nan, torch.inf):  # in a masked position nothing is touched, neither key nor value
        hidden = ~arguments["memory_mask"]
        memory_key = arguments["memory_key"].masked_fill(hidden[:, None], bad)
        value = arguments["memory_value"].masked_fill(hidden[:, None, None], bad)
        changed = {**arguments, "memory_key": memory_key, "memory_value": value}
        assert torch.equal(vosops.memory_read(**changed, top_k=top_k), clean)
    memory_key = arguments["memory_key"].clone()
    memory_key[0, 0, 1, arguments["memory_mask"][0, 1].any(1).nonzero()[0, 0]] = torch.nan
    read = vosops.memory_read(**{**arguments, "memory_key": memory_key}, top_k=top_k)
    assert read[0].isnan().all()
    assert torch.equal(read[1], clean[1])


@pytest.mark.parametrize("top_k", [None, 3])
def test_nothing_to_match_reads_zero(top_k: int | None, isa: str) -> None:
    arguments = problem("l2", mask=True)
    arguments["memory_mask"][1] = False
    read, usage = vosops.memory_read(**arguments, top_k=top_k, return_usage=True)
    assert (read[1] == 0).all()
    assert (usage[1] == 0).all()
    assert not read[0].eq(0).all()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("empty", ["batch", "objects", "value_channels", "queries"])
def test_empty_results(empty: str, top_k: int | None) -> None:
    sizes = {"batch": 2, "objects": 2, "value_channels": 4, "queries": 6}
    sizes[empty] = 0
    query_key = torch.randn(sizes["batch"], 5, sizes["queries"])
    memory_key = torch.randn(sizes["batch"], 5, 8)
    value = torch.randn(sizes["batch"], sizes["objects"], sizes["value_channels"], 8)
    for backend in ("cpu", "reference"):
        with vosops.use_backend(backend):
            read, usage = vosops.memory_read(query_key, memory_key, value, top_k=top_k, return_usage=True)
        assert read.shape == (*value.shape[:3], sizes["queries"])
        assert usage.shape == (sizes["batch"], 8)


def test_one_query_against_a_large_memory(isa: str) -> None:
    """Few queries: the memory is split among the threads and the candidates merged."""
    generator = torch.Generator().manual_seed(1)
    query_key, memory_key = (torch.randn(1, 32, n, generator=generator) for n in (1, 100_000))
    value = torch.randn(1, 1, 8, 100_000, generator=generator)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(vosops.memory_read(query_key, memory_key, value, top_k=25))
    torch.set_num_threads(threads)
    exact = read64({"query_key": query_key, "memory_key": memory_key, "memory_value": value}, top_k=25)
    assert relative_error(results[0], exact) < TOLERANCE
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("top_k", [65, 700, 1999, 2000])
def test_many_kept(top_k: int, isa: str) -> None:
    """Long lists are sorted by a heap; equal scores, of which there are many here, stay in order of index."""
    generator = torch.Generator().manual_seed(2)
    query_key = torch.randint(-2, 3, (1, 3, 8), generator=generator).float()
    memory_key = torch.randint(-2, 3, (1, 3, 2000), generator=generator).float()
    match = vosops.memory_match(query_key, memory_key, top_k=top_k, scale=1.0)
    scores = query_key[0].mT @ memory_key[0]
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(match.indices[0], order)
    value = torch.randn(1, 1, 4, 2000, generator=generator)
    read = vosops.memory_read(query_key, memory_key, value, top_k=top_k, scale=1.0)
    torch.testing.assert_close(vosops.memory_gather(match, value), read, rtol=0, atol=1e-5)


def test_gather_reads_several_banks_with_one_match(isa: str) -> None:
    arguments = problem("l2")
    match = vosops.memory_match(**score_arguments(arguments), top_k=5)
    value = arguments["memory_value"]
    whole = vosops.memory_gather(match, value)
    assert torch.equal(whole, vosops.memory_read(**arguments, top_k=5))
    parts = torch.cat([vosops.memory_gather(match, value[:, i : i + 1]) for i in range(2)], 1)
    assert torch.equal(parts, whole)
    assert vosops.memory_gather(match, value.bfloat16()).dtype == torch.bfloat16
    assert vosops.memory_gather(match, value.bfloat16(), dtype=torch.float32).dtype == torch.float32


def test_results_do_not_depend_on_repeats_or_threads(isa: str) -> None:
    arguments = problem("l2_both", batch=1, grid=(20, 31), frames=4)
    threads = torch.get_num_threads()
    for top_k in (None, 20):
        first = vosops.memory_read(**arguments, top_k=top_k)
        assert torch.equal(vosops.memory_read(**arguments, top_k=top_k), first)
        torch.set_num_threads(1)
        single = vosops.memory_read(**arguments, top_k=top_k)
        torch.set_num_threads(threads)
        torch.testing.assert_close(single, first, rtol=0, atol=1e-6)
