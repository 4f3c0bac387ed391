# SPDX-License-Identifier: Apache-2.0
"""torch.library registration: opcheck, compile, export, autocast, and a process without the library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops.memory_read import schema

from .helpers import VARIANTS, problem, scores_of

pytestmark = pytest.mark.usefixtures("cpu_backend")
OPS = torch.ops.vosops
# With gradients opcheck adds up all outputs, which fails for integer indices whatever the operator does;
# test_compile_fullgraph_with_gradients checks what that check would.
MATCH_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def sample(variant: str, requires_grad: bool, dtype: torch.dtype = torch.float32) -> dict:
    arguments = problem(variant, mask=variant == "l2_both", dtype=dtype)
    if requires_grad:
        for value in arguments.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    return arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str, requires_grad: bool, dtype: torch.dtype) -> None:
    arguments = sample(variant, requires_grad, dtype)
    scores = schema.scores_arguments(scores_of(arguments))
    value = arguments["memory_value"]
    indices, weights = OPS.memory_match(*scores, 4)
    indices, weights = indices.detach(), weights.detach()
    read, lse = (t.detach() for t in OPS.memory_read_dense(*scores, value))
    torch.library.opcheck(OPS.memory_match.default, (*scores, 4), test_utils=MATCH_CHECKS)
    torch.library.opcheck(OPS.memory_read_dense.default, (*scores, value))
    torch.library.opcheck(OPS.memory_gather.default, (indices, weights, value))
    # What has no gradient of its own is checked on plain tensors.
    scores = tuple(x.detach() if isinstance(x, Tensor) else x for x in scores)
    value = value.detach()
    calls = {
        OPS.memory_match.default: (*scores, 4),
        OPS.memory_usage.default: (*scores, lse),
        OPS.memory_best_query.default: (*scores[:5], *scores[7:], None, None, 0),
        OPS.memory_gather_backward.default: (torch.ones_like(read), indices, weights, value, True),
        OPS.memory_match_backward.default: (*scores, torch.ones_like(weights), indices, weights),
        OPS.memory_read_dense_backward.default: (
            *scores,
            value,
            torch.ones_like(read),
            torch.ones_like(lse),
            lse,
        ),
    }
    for op, call in calls.items():
        torch.library.opcheck(op, call)


def test_opcheck_of_strided_and_empty_inputs() -> None:
    arguments = problem("l2", objects=0)
    scores = schema.scores_arguments(scores_of(arguments))
    torch.library.opcheck(OPS.memory_read_dense.default, (*scores, arguments["memory_value"]))
    strided = problem("l2")
    strided["memory_key"] = strided["memory_key"].movedim(1, -1).contiguous().movedim(-1, 1)
    torch.library.opcheck(OPS.memory_match.default, (*schema.scores_arguments(scores_of(strided)), 3))


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("variant", ["dot", "l2_both"])
def test_compile_fullgraph(variant: str, top_k: int | None) -> None:
    torch._dynamo.reset()

    def step(arguments: dict) -> tuple[Tensor, Tensor]:
        prior = vosops.KernelPrior(3.0)
        read, usage = vosops.memory_read(**arguments, top_k=top_k, prior=prior, return_usage=True)
        return read * 2, usage

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        arguments = problem(variant, seed=seed)
        for ours, expected in zip(compiled(arguments), step(arguments), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 5])
def test_compile_fullgraph_with_gradients(top_k: int | None) -> None:
    torch._dynamo.reset()

    def loss(arguments: dict) -> Tensor:
        return vosops.memory_read(**arguments, top_k=top_k).square().sum()

    plain, traced = sample("l2_both", True), sample("l2_both", True)
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    for name, value in plain.items():
        if isinstance(value, Tensor) and value.requires_grad:
            assert traced[name].grad is not None
            torch.testing.assert_close(traced[name].grad, value.grad, rtol=1e-5, atol=1e-5)


def test_compile_with_inductor_and_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **arguments: vosops.memory_read(**arguments, top_k=5).relu(), fullgraph=True, dynamic=True
    )
    for frames in (2, 3, 5):
        arguments = problem("l2", frames=frames)
        torch.testing.assert_close(compiled(**arguments), vosops.memory_read(**arguments, top_k=5).relu())


def test_bad_input_is_caught_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: vosops.memory_read(**a, top_k=5), backend="aot_eager")
    arguments = problem("l2")
    with pytest.raises(Exception, match="memory_key must have the channels of query_key"):
        compiled(**{**arguments, "query_key": arguments["query_key"][:, :3]})


@pytest.mark.parametrize("top_k", [None, 5])
def test_export(top_k: int | None) -> None:
    class Reader(torch.nn.Module):
        def forward(self, query_key: Tensor, memory_key: Tensor, memory_value: Tensor) -> Tensor:
            return vosops.memory_read(query_key, memory_key, memory_value, similarity="l2", top_k=top_k)

    arguments = problem("l2")
    tensors = tuple(arguments[name] for name in ("query_key", "memory_key", "memory_value"))
    program = torch.export.export(Reader(), tensors)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    expected = {"vosops.memory_match.default", "vosops.memory_gather.default"}
    assert (expected if top_k else {"vosops.memory_read_dense.default"}) <= targets
    assert torch.equal(program.module()(*tensors), Reader()(*tensors))


def test_autocast_on_the_reference() -> None:
    arguments = problem("l2_both")
    with vosops.use_backend("reference"):
        plain = vosops.memory_read(**arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(vosops.memory_read(**arguments), plain)


@pytest.mark.parametrize("top_k", [None, 5])
def test_autocast_keeps_the_affinity_in_float32(top_k: int | None) -> None:
    arguments = problem("l2_both")
    plain = vosops.memory_read(**arguments, top_k=top_k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        read = vosops.memory_read(**arguments, top_k=top_k)
        mixed = vosops.memory_read(
            **{**arguments, "query_key": arguments["query_key"].bfloat16()}, top_k=top_k
        )
        leaf = arguments["query_key"].clone().requires_grad_()
        vosops.memory_read(**{**arguments, "query_key": leaf}, top_k=top_k).sum().backward()
    assert torch.equal(read, plain)
    assert mixed.dtype == torch.float32
    assert leaf.grad is not None


def test_raw_operators_differentiate_too() -> None:
    arguments = sample("l2", True)
    scores = schema.scores_arguments(scores_of(arguments))
    indices, weights = OPS.memory_match(*scores, 3)
    OPS.memory_gather(indices, weights, arguments["memory_value"]).square().sum().backward()
    raw = {name: x.grad for name, x in arguments.items() if isinstance(x, Tensor)}
    again = sample("l2", True)
    vosops.memory_read(**again, top_k=3).square().sum().backward()
    for name, grad in raw.items():
        assert torch.equal(grad, again[name].grad), name


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_without_the_compiled_library() -> None:
    """The reference serves, warns once with the reason, and the report says it."""
    code = (
        "import torch, warnings, vosops\n"
        "q, k, v = torch.randn(1, 4, 5), torch.randn(1, 4, 6), torch.randn(1, 1, 3, 6)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    vosops.memory_read(q, k, v); vosops.memory_read(q, k, v)\n"
        "print(len(caught), caught[0].message)\n"
        "print(vosops.backend_report()['cpu'])\n"
    )
    done = run_python(code, VOSOPS_DISABLE_EXT="1")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("1 vosops.memory_read falls back to the reference backend (cpu: switched off")
    assert second == "not available: switched off by VOSOPS_DISABLE_EXT"


def test_a_forced_backend_never_falls_back() -> None:
    arguments = problem("dot", dtype=torch.float64)
    with pytest.raises(vosops.BackendError, match="query_key has dtype torch.float64, it serves float32"):
        vosops.memory_read(**arguments)
    code = (
        "import torch, vosops\n"
        "vosops.memory_read(torch.randn(1, 4, 5), torch.randn(1, 4, 6), torch.randn(1, 1, 3, 6))\n"
    )
    done = run_python(code, VOSOPS_BACKEND="cpu", VOSOPS_DISABLE_EXT="1")
    assert "backend 'cpu' was asked for but cannot serve this call: switched off" in done.stderr
    with (
        pytest.raises(ValueError, match="backend must be one of cuda, cpu, triton, reference, got 'gpu'"),
        vosops.use_backend("gpu"),
    ):
        pass


def test_import_needs_torch_only() -> None:
    listing = "print([m for m in ('triton', 'numpy', 'cv2', 'typer', 'PIL') if m in sys.modules])"
    code, without = f"import sys, vosops; {listing}", f"import sys, torch; {listing}"
    assert run_python(code).stdout == run_python(without).stdout


def test_instruction_set_can_be_forced() -> None:
    code = "import vosops; print(vosops.backend_report()['cpu'])"
    assert run_python(code, VOSOPS_CPU_ISA="portable").stdout.strip() == "available (portable)"
    assert "VOSOPS_CPU_ISA=mmx cannot run on this CPU" in run_python(code, VOSOPS_CPU_ISA="mmx").stderr
