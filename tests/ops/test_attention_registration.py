# SPDX-License-Identifier: Apache-2.0
"""Attention's torch.library registration and its error messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.attention.problem import check_heads
from vosops.ops.families import operator

from .test_attention import FORMS, changed, problem

# With gradients opcheck adds up all outputs, which fails for integer indices whatever the operator does.
MATCH_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def operands(arguments: dict) -> tuple:
    gate, distance = arguments.get("identity_gate"), arguments.get("distance", False)
    p = check_heads(arguments["query"], arguments["key"], arguments["num_heads"], None, gate, distance)
    return p.arguments()


def check_operators(family: str, arguments: dict, requires_grad: bool) -> None:
    """opcheck of every operator of a family."""
    value, identity = arguments["value"], arguments.get("identity")
    heads = operands(arguments)
    _read, lse = operator(family, "attention_dense")(*heads, [value], identity)
    indices, weights = operator(family, "attention_match")(*heads, 4)
    grad = torch.ones(*lse.shape[:2], value.shape[2] // lse.shape[1], lse.shape[2], device=lse.device)
    matched = (torch.ones_like(weights), indices, weights)
    for op, call in {
        operator(family, "attention_usage"): (*heads, lse),
        operator("", "attention_match_backward"): (*heads, *matched),
        operator(family, "attention_dense_backward"): (
            *(*heads, value, identity, grad),
            *(torch.ones_like(lse), lse),
        ),
    }.items():
        torch.library.opcheck(op.default, call)
    leaves = changed(arguments, lambda x: x.clone().requires_grad_(requires_grad))
    heads, values = operands(leaves), [leaves["value"]]
    match, dense = (operator(family, name).default for name in ("attention_match", "attention_dense"))
    torch.library.opcheck(match, (*heads, 4), test_utils=MATCH_CHECKS)
    torch.library.opcheck(dense, (*heads, values, leaves.get("identity")))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_opcheck(form: str, requires_grad: bool, cpu_backend: None) -> None:
    check_operators("", problem(**FORMS[form], queries=9, memory=14), requires_grad)


@pytest.mark.parametrize("top_k", [None, 5])
def test_compile_fullgraph_with_gradients(top_k: int | None, cpu_backend: None) -> None:
    torch._dynamo.reset()

    def loss(arguments: dict) -> Tensor:
        read, usage = vosops.attention(**arguments, top_k=top_k, return_usage=True)
        return read.square().sum() + usage[0, 0]

    plain, traced = (
        changed(problem(**FORMS["everything"]), lambda x: x.clone().requires_grad_()) for _ in range(2)
    )
    expected = loss(plain)
    expected.backward()
    ours = torch.compile(loss, fullgraph=True, backend="aot_eager")(traced)
    ours.backward()
    torch.testing.assert_close(ours, expected)
    for name, value in plain.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(traced[name].grad, value.grad, rtol=1e-5, atol=1e-5)


def test_compile_with_dynamic_shapes(cpu_backend: None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **arguments: vosops.attention(**arguments, top_k=5) + vosops.attention(**arguments),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for memory in (20, 31, 45):
        arguments = problem(memory=memory, batch=1)
        expected = vosops.attention(**arguments, top_k=5) + vosops.attention(**arguments)
        torch.testing.assert_close(compiled(**arguments), expected)


@pytest.mark.parametrize("top_k", [None, 5])
def test_autocast_keeps_float32(top_k: int | None) -> None:
    arguments = problem(**FORMS["everything"])
    for backend in ("cpu", "reference"):
        with vosops.use_backend(backend):
            plain = vosops.attention(**arguments, top_k=top_k)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(vosops.attention(**arguments, top_k=top_k), plain)
                leaf = arguments["key"].clone().requires_grad_()
                vosops.attention(**{**arguments, "key": leaf}, top_k=top_k).sum().backward()
        assert leaf.grad is not None


def test_which_backend_serves() -> None:
    with vosops.use_backend("cuda"), pytest.raises(vosops.BackendError, match="it has no attention"):
        vosops.attention(**problem())
    too_much = problem(channels=258, num_heads=2)
    with vosops.use_backend("triton"), pytest.raises(vosops.BackendError) as refused:
        vosops.attention(**too_much, top_k=130)
    assert "top_k is 130, it keeps at most 128" in str(refused.value)
    assert "query has C/h = 129 channels a head, it serves at most 128" in str(refused.value)
    with vosops.use_backend("cpu"), pytest.raises(vosops.BackendError, match="query has dtype torch.float64"):
        vosops.attention(**problem(dtype=torch.float64))


ONE = torch.ones(2, 131, 1)
CASES = {
    "no tensor": ({"query": [1.0]}, TypeError, r"query must be a tensor \(B, Q, C\), got list"),
    "dtype": ({"key": torch.ones(2, 131, 24).int()}, TypeError, "key must have dtype float32"),
    "rank": ({"query": torch.ones(77, 24)}, ValueError, r"query must have 3 dimensions .*\[77, 24\]"),
    "batch": ({"key": torch.ones(3, 131, 24)}, ValueError, "key must have the batch of query, 2, got 3"),
    "channels": ({"key": torch.ones(2, 131, 8)}, ValueError, "key must have the channels of query, C = 24"),
    "no channels": (
        {"query": torch.ones(2, 77, 0), "key": torch.ones(2, 131, 0)},
        ValueError,
        "query must have at least one channel",
    ),
    "empty memory": ({"key": torch.ones(2, 0, 24)}, ValueError, "key is empty"),
    "device": ({"key": torch.ones(2, 131, 24, device="meta")}, ValueError, "key is on meta"),
    "heads type": ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got float"),
    "heads": ({"num_heads": 5}, ValueError, "num_heads must divide the channels of query, C = 24, got 5"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads must divide"),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "gate": (
        {"identity_gate": torch.ones(2, 131, 3)},
        ValueError,
        r"identity_gate must have shape \(B, M, 1\) or \(B, M, h\) = \[2, 131, 4\], got \[2, 131, 3\]",
    ),
    "gate dtype": ({"identity_gate": ONE.bool()}, TypeError, "identity_gate must have dtype"),
    "gate device": ({"identity_gate": ONE.to("meta")}, ValueError, "identity_gate is on meta"),
    "value": (
        {"value": torch.ones(2, 130, 20)},
        ValueError,
        r"value must have shape \(B, M, Cv\) = \[2, 131, 20\], got \[2, 130, 20\]",
    ),
    "value heads": (
        {"value": torch.ones(2, 131, 18)},
        ValueError,
        "value must have channels that num_heads = 4",
    ),
    "values": ({"value": ()}, ValueError, "value must be a tensor or at least one of them"),
    "second value": ({"value": (torch.ones(2, 131, 4), 3)}, TypeError, r"value\[1\] must be a tensor"),
    "identity": ({"identity": torch.ones(2, 131, 16)}, ValueError, "identity must have shape"),
    "identity of several": (
        {"value": (torch.ones(2, 131, 4),), "identity": torch.ones(2, 131, 4)},
        ValueError,
        "identity is added to one value tensor, got a tuple of values",
    ),
    "top_k type": ({"top_k": 0.5}, TypeError, "top_k must be an integer, got float"),
    "top_k": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_errors(case: str) -> None:
    change, error, message = CASES[case]
    with pytest.raises(error, match=message):
        vosops.attention(**{**problem(), **change})
