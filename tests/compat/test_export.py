# SPDX-License-Identifier: Apache-2.0
"""Operators through torch.export: one node each, and as standard operators under `onnx_reference()`."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import vosops
from vosops.compat import correlation
from vosops.compat.correlation import spatial_correlation_sample
from vosops.export import onnx_reference

# What the ONNX exporter translates: its torchlib (August 2026) has each of these overloads.
STANDARD = frozenset(
    """
    add.Tensor alias.default amax.default arange.start_step argmax.default bitwise_not.default bmm.default
    cat.default clamp.default clone.default constant_pad_nd.default convolution.default div.Tensor
    div.Tensor_mode eq.Scalar eq.Tensor exp.default expand.default full.default full_like.default
    gather.default gt.Scalar index_put.default isnan.default log.default lt.Scalar mul.Tensor
    permute.default pow.Tensor_Scalar prod.dim_int reciprocal.default remainder.Scalar scalar_tensor.default
    scatter.value select.int slice.Tensor sort.default sub.Tensor sum.dim_IntList sym_size.int topk.default
    unfold.default unsqueeze.default view.default where.self _to_copy.default
    """.split()  # noqa: SIM905  (a list of quoted names is unreadable)
) | {"_assert_tensor_metadata.default"}  # the exporter removes assertions


class Call(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        """The operator alone."""
        return self.function(*inputs)


@dataclass
class Case:
    """An operator, its inputs, its nodes in the graph, and the dimensions that may change."""

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]
    dynamic: tuple[dict[int, Any], ...] | None = None


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    keys = randn(1, 16, 5, 7), randn(1, 16, 6, 5, 7)
    memory = (*keys, randn(1, 2, 24, 6, 5, 7))
    frames, tokens = Dim("frames", min=2, max=512), Dim("tokens", min=40, max=2**20)
    growing = ({}, {2: frames}, {3: frames})
    sequence = randn(1, 35, 32), randn(1, 105, 32)
    table, bank = randn(8 * 25, 4), randn(32, 11, 17, 17)
    labels = torch.randint(0, 11, (1, 65, 81), generator=generator, dtype=torch.uint8)
    return {
        "memory_read": Case(
            lambda q, k, v: vosops.memory_read(q, k, v), memory, ("memory_read_dense",), growing
        ),
        "memory_read_top_k": Case(
            lambda q, k, v: vosops.memory_read(q, k, v, similarity="l2", top_k=20),
            memory,
            ("memory_match", "memory_gather"),
            growing,
        ),
        "memory_match": Case(
            lambda q, k: vosops.memory_match(q, k, top_k=20)[:2], keys, ("memory_match",), growing[:2]
        ),
        "attention": Case(
            lambda q, m: vosops.attention(q, m, m, num_heads=8),
            sequence,
            ("attention_dense",),
            ({}, {1: tokens}),
        ),
        "attention_top_k": Case(
            lambda q, m: vosops.attention(q, m, m, num_heads=8, top_k=8),
            sequence,
            ("attention_match", "memory_gather"),
            ({}, {1: tokens}),
        ),
        "local_attention": Case(
            lambda x: vosops.local_attention(x, x, x, num_heads=8, window=5, relative_weight=table),
            (randn(1, 32, 5, 7),),
            ("local_attention",),
        ),
        "identity_embedding": Case(
            lambda x: vosops.identity_embedding(x, bank), (labels,), ("identity_embedding",)
        ),
        "spatial_correlation_sample": Case(
            lambda a, b: spatial_correlation_sample(a, b, patch_size=5),
            (randn(2, 8, 5, 7), randn(2, 8, 5, 7)),
            ("correlation",),
        ),
        "soft_aggregate": Case(vosops.soft_aggregate, (randn(1, 3, 20, 30).sigmoid(),), ("soft_aggregate",)),
    }


NAMES = list(cases())


def export(case: Case, *, dynamic: bool) -> ExportedProgram:
    shapes = (case.dynamic,) if dynamic else None
    return torch.export.export(Call(case.function), case.inputs, dynamic_shapes=shapes)


def check(program: ExportedProgram, case: Case, inputs: tuple[Tensor, ...]) -> None:
    ours, expected = program.module()(*inputs), case.function(*inputs)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def longer(case: Case) -> tuple[Tensor, ...]:
    """The inputs with more memory."""
    assert case.dynamic is not None
    return tuple(
        torch.cat((x, 0.9 * x.flip(dim)), dim) if (dim := next(iter(dims), None)) is not None else x
        for x, dims in zip(case.inputs, case.dynamic, strict=True)
    )


def targets(program: ExportedProgram) -> list[str]:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return [str(target) for target in calls if isinstance(target, torch._ops.OpOverload)]


@pytest.mark.parametrize("name", NAMES)
def test_one_node(name: str, cpu_backend: None) -> None:
    if name == "spatial_correlation_sample" and not correlation._COMPILED:
        pytest.skip("the compiled library has no correlation yet: build it again")
    case = cases()[name]
    program = export(case, dynamic=False)
    nodes = [target for target in targets(program) if target.startswith("vosops.")]
    assert nodes == [f"vosops.{node}.default" for node in case.nodes]
    check(program, case, case.inputs)


@pytest.mark.parametrize("name", [name for name in NAMES if cases()[name].dynamic])
def test_memory_of_any_length(name: str, cpu_backend: None) -> None:
    case = cases()[name]
    check(export(case, dynamic=True), case, longer(case))


@pytest.mark.parametrize("name", NAMES)
def test_standard_operators(name: str) -> None:
    case = cases()[name]
    with onnx_reference():
        program = export(case, dynamic=case.dynamic is not None).run_decompositions()
    unknown = {target for target in targets(program) if target.removeprefix("aten.") not in STANDARD}
    assert not unknown
    check(program, case, case.inputs)
    if case.dynamic:
        check(program, case, longer(case))


def test_fused_again_outside(cpu_backend: None) -> None:
    case = cases()["attention"]
    with onnx_reference():
        assert not any(target.startswith("vosops.") for target in targets(export(case, dynamic=False)))
    assert any(target.startswith("vosops.") for target in targets(export(case, dynamic=False)))


def onnx_missing() -> str | None:
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str) -> None:
    """The real exporter, and its result in ONNX Runtime where that is installed."""
    if reason := onnx_missing():
        pytest.skip(reason)
    case = cases()[name]
    with onnx_reference():
        program = torch.onnx.export(Call(case.function), case.inputs, dynamo=True)
    assert program is not None
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"}
    if importlib.util.find_spec("onnxruntime") is None:
        return
    results = program(*case.inputs)
    expected = case.function(*case.inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def blocks() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_documented_examples(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_backend: None
) -> None:
    """Every block of docs/export.md, after the ones before it that need no ONNX."""
    if "torch.onnx" in blocks()[number] and (reason := onnx_missing()):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks()[:number]:
        if "torch.onnx" not in block:
            exec(block, names)
    exec(blocks()[number], names)
