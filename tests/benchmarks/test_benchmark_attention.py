# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of attention and the identity embedding on tiny shapes: every implementation is right."""

from __future__ import annotations

import pytest

from benchmarks import attention, identity, measure, run
from benchmarks.attention import AttentionCase, AttentionShape
from benchmarks.case import Settings
from benchmarks.identity import IdentityCase, IdentityShape

ATTENTION = (
    AttentionShape("dense", "", 40, 130, 32, (32,), 4),
    AttentionShape("top-k", "", 40, 130, 32, (32,), 4, top_k=9),
    AttentionShape("v2", "", 40, 130, 32, (32,), 4, modulated=True),
    AttentionShape("two values", "", 40, 130, 16, (32, 24), 1),
)
IDENTITY = (
    IdentityShape("objects", "", (65, 97), channels=8),
    IdentityShape("noise", "", (33, 49), noise=True, channels=8, classes=4),
)


@pytest.mark.parametrize("layout", ["channel_major", "position_major"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", ATTENTION, ids=lambda shape: shape.name)
def test_attention(shape: AttentionShape, backward: bool, layout: str) -> None:
    case = AttentionCase(shape, Settings(layout=layout, backward=backward), 0)
    ran = 0
    for name in attention.OPERATOR.implementations:
        if case.refuses(name) is None:
            assert case.error(name) < case.tolerance(), name
            case.call(name)()
            ran += 1
    assert ran >= 2, "vosops and a peer"


def test_a_wrong_result_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(ATTENTION[0], Settings(), 0)
    right = attention._PEERS["eager"]
    monkeypatch.setitem(attention._PEERS, "eager", lambda *a, **k: tuple(1.01 * x for x in right(*a, **k)))
    assert case.error("eager") > case.tolerance()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", IDENTITY, ids=lambda shape: shape.name)
def test_identity(shape: IdentityShape, backward: bool) -> None:
    case = IdentityCase(shape, Settings(backward=backward), 0)
    for name in identity.OPERATOR.implementations:
        assert case.error(name) < case.tolerance(), name
        case.call(name)()


@pytest.mark.parametrize("name", ["attention", "identity"])
def test_what_run_asks_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = run.load(name)
    assert operator.name == name
    ceilings = measure.Ceilings(product=1e10, peak=2e10, copy=1e10)
    monkeypatch.setattr(measure, "ceilings", lambda *args: ceilings)
    assert set(operator.groups["standard"]) <= set(operator.shapes)
    tiny = {
        "attention": AttentionCase(ATTENTION[1], Settings(), 0),
        "identity": IdentityCase(IDENTITY[0], Settings(), 0),
    }
    milliseconds, basis = tiny[name].limit_ms()
    assert milliseconds > 0
    assert "at" in basis
    for implementation in operator.implementations:
        assert tiny[name].needs_bytes(implementation) > 0
    assert all(job.shapes for job in operator.everything)
