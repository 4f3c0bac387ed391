# SPDX-License-Identifier: Apache-2.0
"""What a GPU adds to the benchmarks of AOT's operators and needs none: peers, floors, jobs, targets."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

import vosops
from benchmarks import attention, cuda, gpu, identity, local_attention, measure, plot, run
from benchmarks.attention import AttentionCase, AttentionShape
from benchmarks.case import DTYPES, Settings
from benchmarks.identity import IdentityCase, IdentityShape
from benchmarks.local_attention import LocalAttentionCase, LocalShape
from benchmarks.peers import flexible, multihead, one_hot, window

OPERATORS = {module.OPERATOR.name: module.OPERATOR for module in (attention, identity, local_attention)}
DENSE = AttentionShape("dense", "", 21, 60, 32, (32,), 4)
WIDER = AttentionShape("wider", "", 21, 60, 8, (32, 16), 1)
MODULATED = AttentionShape("v2", "", 21, 60, 32, (32,), 4, modulated=True)
H200 = measure.Ceilings(product=5e14, peak=7.9e14, copy=4.3e12)


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without its compiler, which also computes in float64."""
    monkeypatch.setattr(flexible, "_compiled", lambda: flex_attention)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ceilings", lambda *args: H200)


def tokens(shape: AttentionShape) -> tuple[tuple[Tensor, Tensor, tuple[Tensor, ...]], dict[str, Any]]:
    """Inputs of a shape in float64."""
    inputs = AttentionCase(shape, Settings(), 1).inputs
    options = {name: x.double() if isinstance(x, Tensor) else x for name, x in inputs.options.items()}
    return (inputs.query.double(), inputs.key.double(), tuple(x.double() for x in inputs.values)), options


def expected(arguments: tuple[Tensor, Tensor, tuple[Tensor, ...]], options: dict[str, Any]) -> list[Tensor]:
    query, key, values = arguments
    with vosops.use_backend("reference"):
        if len(values) > 1:
            return list(vosops.attention(query, key, values, **options))
        return [vosops.attention(query, key, values[0], **options)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("shape", [DENSE, WIDER, MODULATED], ids=lambda shape: shape.name)
def test_flex(shape: AttentionShape, cut: bool, eager_flex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if cut:
        monkeypatch.setattr(flexible, "_too_wide", lambda value: True)
        monkeypatch.setattr(flexible, "_PART", 8)
    arguments, options = tokens(shape)
    for got, want in zip(
        multihead.attention_flex(*arguments, **options), expected(arguments, options), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
@pytest.mark.parametrize("equal_widths", [False, True])
@pytest.mark.parametrize("shape", [DENSE, WIDER, MODULATED], ids=lambda shape: shape.name)
def test_sdpa(shape: AttentionShape, equal_widths: bool, backend: SDPBackend | None) -> None:
    arguments, options = tokens(shape)
    reads = multihead.attention_sdpa(*arguments, **options, backend=backend, equal_widths=equal_widths)
    for got, want in zip(reads, expected(arguments, options), strict=True):
        torch.testing.assert_close(got, want)


def test_heads_that_share_query_and_key_are_not_copied() -> None:
    query, key, value = (torch.randn(2, 1, n, c) for n, c in ((3, 8), (5, 8), (5, 24)))
    q, k, v = flexible.cut(query, key, value, 3)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 3, 8), (2, 3, 5, 8), (2, 3, 5, 8))
    assert q.data_ptr() == query.data_ptr()
    assert k.stride(1) == 0
    assert torch.equal(flexible.join(v, 3), value)
    with pytest.raises(ValueError, match="parts must divide the 24 channels of a value head, got 5"):
        flexible.cut(query, key, value, 5)


@pytest.mark.parametrize("size", [(31, 54, 15), (4, 7, 3), (3, 3, 9)], ids=str)
def test_mask_of_the_window(size: tuple[int, int, int]) -> None:
    """Held against the offsets that the other peers use."""
    height, width, side = size
    mask = create_mask(window.mask_mod(width, side), 1, 1, height * width, height * width, device="cpu")
    _, inside = window._offsets(height, width, side, torch.device("cpu"))
    assert torch.equal(mask[0, 0], inside)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", ["channel_major", "position_major"])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("relative", ["none", "key"])
def test_flex_of_the_window(
    relative: str, cut: bool, layout: str, eager_flex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cut:
        monkeypatch.setattr(flexible, "_too_wide", lambda value: True)
        monkeypatch.setattr(flexible, "_PART", 4)
    case = LocalAttentionCase(LocalShape("", "", (6, 9), 8, 24, 2, relative, 5), Settings(layout=layout), 2)
    options: dict[str, Any] = {name: x.double() for name, x in case.tensors.items()}
    options |= {"num_heads": 2, "window": 5}
    with vosops.use_backend("reference"):
        want = vosops.local_attention(**options)
    torch.testing.assert_close(window.flex(**options), want)


def test_the_block_mask_is_on_blocks() -> None:
    mask = window._block_mask(31, 54, 15, torch.device("cpu"))
    assert isinstance(mask, BlockMask)
    assert mask.sparsity() > 20, "per cent of the blocks left out"


@pytest.mark.parametrize("noise", [False, True])
def test_embedding_bags(noise: bool) -> None:
    case = IdentityCase(IdentityShape("", "", (49, 66), noise, 8, 5), Settings(), 3)
    labels = case.labels.clone()
    labels[:, 10:20, 5:30] = 255  # ignored
    weight, bias = case.weight.double(), case.bias.double()
    with vosops.use_backend("reference"):
        want = vosops.identity_embedding(labels, weight, bias)
    torch.testing.assert_close(one_hot.identity_embedding_bags(labels, weight, bias), want)
    got = one_hot.identity_embedding_bags(labels.long() - 256 * (labels == 255), weight)
    torch.testing.assert_close(got, want - bias[:, None, None])
    small = case.weight[:, :, :3, :5].double()
    with vosops.use_backend("reference"):
        want = vosops.identity_embedding(labels, small, stride=2, padding=1)
    torch.testing.assert_close(one_hot.identity_embedding_bags(labels, small, stride=2, padding=1), want)


def test_bags_have_gradients() -> None:
    case = IdentityCase(IdentityShape("", "", (33, 49), channels=4, classes=3), Settings(backward=True), 3)
    assert case.error("bags") < case.tolerance()


def cases() -> dict[str, Any]:
    return {
        "attention": AttentionCase(DENSE, Settings(), 0),
        "identity": IdentityCase(IdentityShape("", "", (33, 49), channels=4, classes=3), Settings(), 0),
        "local_attention": LocalAttentionCase(LocalShape("", "", (5, 7), 8, 12, 2, "both", 3), Settings(), 0),
    }


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("implementation", cuda.FORCED)
def test_forced_backends_give_their_own_reasons(name: str, implementation: str) -> None:
    case = cases()[name]
    reason = case.refuses(implementation)
    assert reason is not None, "no GPU serves tensors of the CPU"
    with pytest.raises(vosops.BackendError) as raised:
        case.call(implementation)()
    assert reason.split(";")[0] in str(raised.value)


def test_what_sdpa_refuses() -> None:
    assert "nothing to cut" in str(AttentionCase(DENSE, Settings(), 0).refuses("sdpa_split"))
    assert AttentionCase(WIDER, Settings(), 0).refuses("sdpa_split") is None
    assert "on CUDA devices" in str(AttentionCase(WIDER, Settings(), 0).refuses("sdpa_split_cudnn"))
    top_k = dataclasses.replace(DENSE, top_k=9)
    for name in ("sdpa", "sdpa_flash", "flex"):
        assert "reads densely" in str(AttentionCase(top_k, Settings(), 0).refuses(name))


def test_sdpa_is_asked_about_the_very_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backends' own word decides, on tensors as they are called with; the CUDA device is stood in for."""
    asked: list[tuple[torch.Size, ...]] = []

    def can_use(parameters: Any) -> bool:
        asked.append((parameters.query.shape, parameters.value.shape))
        return parameters.query.shape[-1] == parameters.value.shape[-1]

    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can_use)
    case = AttentionCase(WIDER, Settings(), 0)
    case.settings = Settings(device=torch.device("cuda"))
    assert "does not serve the call" in str(case.refuses("sdpa_cudnn"))
    assert case.refuses("sdpa_split_cudnn") is None
    assert asked == [((1, 1, 21, 8), (1, 1, 60, 48)), ((1, 6, 21, 8), (1, 6, 60, 8))]


@pytest.mark.parametrize("name", OPERATORS)
def test_jobs_name_what_there_is(name: str) -> None:
    operator = OPERATORS[name]
    there = {*operator.implementations, *operator.cuda_implementations}
    assert not {*operator.implementations} & {*operator.cuda_implementations}
    seen = set()
    for job in operator.cuda_everything:
        assert set(job.shapes) <= set(operator.shapes)
        assert job.implementations, "those of the CPU alone, else"
        assert set(job.implementations) <= there
        assert {"vosops", *cuda.FORCED} <= set(job.implementations)
        for shape in job.shapes:
            assert (shape, job.settings) not in seen, "the second would not run"
            seen.add((shape, job.settings))
    for dtype in DTYPES:
        assert any(settings.dtype == dtype and not settings.backward for _, settings in seen)
    assert any(settings.backward for _, settings in seen)
    assert there <= {*plot._LABELS, "vosops"} & {*plot._COLORS}


def on_gpu(case: Any, **settings: Any) -> Any:
    """The case as if on a GPU, for the arithmetic only."""
    case.settings = Settings(device=torch.device("cuda"), **settings)
    return case


def test_floor_of_attention(h200: None) -> None:
    shape = attention.ATTENTION["lt-deaot-t10"]
    case = AttentionCase(shape, Settings(), 0)
    milliseconds, words = on_gpu(case, dtype="bfloat16").limit_ms()
    assert milliseconds == pytest.approx(1e3 * 2 * 1674 * 16740 * (128 + 1024) / 7.9e14), "operations"
    assert words.startswith("max of 64.6 GFLOP at 790 TFLOP/s and 40 MiB at 4.30 TB/s")
    backward, _ = on_gpu(case, dtype="bfloat16", backward=True).limit_ms()
    assert backward == pytest.approx(milliseconds * (128 * 4 + 1024 * 3) / (128 + 1024))
    kept = AttentionCase(AttentionShape("", "", 7, 1000, 32, (64,), 4, top_k=5), Settings(), 0)
    milliseconds, _ = on_gpu(kept).limit_ms()
    assert milliseconds == pytest.approx(1e3 * 4 * (1007 * 32 + 7 * 5 * 64 + 7 * 64) / 4.3e12), "bytes"


def test_floor_of_local_attention(h200: None) -> None:
    shape = LocalShape("", "", (31, 54), 256, 256, 8, "both")
    case = LocalAttentionCase(shape, Settings(), 0)
    inside = int(window._offsets(31, 54, 15, torch.device("cpu"))[1].sum())
    milliseconds, _ = on_gpu(case, dtype="bfloat16").limit_ms()
    relative = 8 * 225 * (32 + 1 + 32)
    assert milliseconds == pytest.approx(1e3 * 2 * (1674 * 1024 + relative) / 4.3e12), "bytes"
    backward, _ = on_gpu(case, dtype="bfloat16", backward=True).limit_ms()
    assert backward == pytest.approx(1e3 * 2 * inside * (1024 + 5 * 512) / 7.9e14), "operations"
    single = dataclasses.replace(shape, window=1, relative="none")
    milliseconds, _ = on_gpu(LocalAttentionCase(single, Settings(), 0)).limit_ms()
    assert milliseconds == pytest.approx(1e3 * 4 * 1674 * 4 * 256 / 4.3e12), "a window of one cell: bytes"
    backward, _ = on_gpu(LocalAttentionCase(single, Settings(), 0), backward=True).limit_ms()
    assert backward == pytest.approx(1e3 * 4 * 1674 * (3 * 3 + 2) * 256 / 4.3e12)


def test_floor_of_identity(h200: None) -> None:
    case = IdentityCase(identity.IDENTITY["id-480p"], Settings(), 0)
    milliseconds, _ = on_gpu(case, dtype="bfloat16").limit_ms()
    moved = 481 * 849 + 2 * (256 * (11 * 289 + 1) + 31 * 54 * 256)
    assert milliseconds == pytest.approx(1e3 * max(2 * 31 * 54 * 289 * 256 / 7.9e14, moved / 4.3e12))


def flat(operator: str, shape: str, implementation: str, ms: float, **changes: Any) -> dict[str, Any]:
    """A flat row as a GPU session writes it."""
    filled = run.Row(
        operator,
        shape,
        {"queries": 1674},
        "bfloat16",
        "position_major",
        "forward",
        implementation,
        ms=ms,
        graph_ms=ms,
        correct=True,
        limit_ms=0.01,
    )
    return dataclasses.replace(filled, **changes).flat()


def test_targets_of_attention() -> None:
    times = {"vosops": 0.1, "sdpa": 0.2, "sdpa_flash": 0.097, "sdpa_split": 0.05, "eager": 0.01}
    shapes = ("lt-aotl-t10", "lt-deaot-t10")
    entries = gpu.targets([flat("attention", shape, *time) for shape in shapes for time in times.items()])
    assert len(entries) == 12
    found = {entry.what: entry for entry in entries}
    equal = found["lt-aotl-t10, bfloat16: the best SDPA / vosops"]
    assert equal.measured == pytest.approx(0.97)
    assert (equal.wanted, equal.met) == (">= 0.95", True)
    unequal = found["lt-deaot-t10, bfloat16: the best SDPA / vosops"]
    assert (unequal.wanted, unequal.met) == (">= 1", False)
    assert found["lt-deaot-t10, bfloat16: SDPA, heads cut, / vosops"].measured == pytest.approx(0.5)
    assert found["lt-aotl-t1, float32: the best SDPA / vosops"].measured is None


def test_targets_of_local_attention() -> None:
    rows = [
        flat("local_attention", "st-plain-480p", "vosops", 0.1, graph_ms=0.02),
        flat("local_attention", "st-plain-480p", "flex", 0.6, graph_ms=0.09),
        flat("local_attention", "st-deaot-480p", "vosops", 0.1),
        flat("local_attention", "st-deaot-480p", "flex", 0.6),
        flat("local_attention", "st-deaot-480p", "flex", 9.0, layout="channel_major"),
    ]
    entries = {entry.what: entry for entry in gpu.targets(rows)}
    assert len(entries) == 12
    plain = entries["st-plain-480p, bfloat16: flex / vosops"]
    assert plain.measured == pytest.approx(6)
    assert plain.graph == pytest.approx(4.5)
    assert not plain.met, "launching must not make the difference"
    assert entries["st-deaot-480p, bfloat16: flex / vosops"].met
    assert entries["st-aot-480p, float32: sampler / vosops"].measured is None, "where it does not install"


def test_targets_of_identity() -> None:
    times = {"vosops": 0.1, "eager": 0.3, "bags": 0.2, "compiled": 0.4}
    rows = [flat("identity", "id-480p", *time, layout="channel_major") for time in times.items()]
    entries = gpu.targets(rows)
    assert len(entries) == 4
    assert entries[0].what == "id-480p, bfloat16: the best peer / vosops"
    assert entries[0].measured == pytest.approx(2)
    assert entries[0].met


@pytest.mark.parametrize("name", OPERATORS)
def test_a_case_of_each_in_low_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From inputs to the row, as a session does it, on the CPU; FlexAttention would compile."""
    monkeypatch.setattr(measure, "ceilings", lambda *args: H200)
    small = {"attention": "lt-deaot-240p-t5", "identity": "id-240p", "local_attention": "st-aot-240p"}[name]
    chosen = {"attention": "sdpa_split", "identity": "bags", "local_attention": "masked_dense"}[name]
    rows = run.measure_case(
        OPERATORS[name],
        small,
        ("vosops", "vosops_cuda", chosen),
        Settings("bfloat16", "position_major"),
        repeats=1,
        keep_going=True,
    )
    assert [row.correct for row in rows] == [True, None, True]
    assert "n/a" in str(rows[1].note)
    assert run.table(rows).row_count == 2
