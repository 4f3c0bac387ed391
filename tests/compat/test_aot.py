# SPDX-License-Identifier: Apache-2.0
"""AOT and DeAOT: numbers of the published classes (tests/golden), what stays published, and the memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vosops
from vosops.compat import UnknownVersionError, aot
from vosops.compat.patching import CodeBase
from vosops.ops import backends

from ..models.weights import Golden, fill
from . import aot_stand_in as published


@pytest.fixture
def code() -> Iterator[CodeBase]:
    with published.code_base() as code:
        yield code


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if reasons := backends.reasons_against(request.param, {}):
        pytest.skip("; ".join(reasons))
    with vosops.use_backend(request.param):
        yield request.param


def filled(case: dict[str, Any], kind: type[nn.Module], **others: Any) -> nn.Module:
    params = {name: x for name, x in case["params"].items() if name not in ("h", "w", "seed")}
    return fill(
        kind(**params, **others), {"gain": case["weights"]["gain"], "boost": case["weights"]["boost"]}
    )


@pytest.mark.parametrize("name", list(Golden("ops_attention").config["cases"]))
def test_multihead_attention(name: str, code: CodeBase, backend: str) -> None:
    golden = Golden("ops_attention")
    module = filled(golden.config["cases"][name], published.MultiheadAttention)
    with code.enable(), torch.no_grad():
        out, attention = module(*(golden[f"{name}.{x}"] for x in "QKV"))
    golden.check(f"{name}.out", out)
    assert attention is None


@pytest.mark.parametrize("name", list(Golden("ops_local_attention").config["cases"]))
def test_multihead_local_attention(name: str, code: CodeBase, backend: str) -> None:
    golden = Golden("ops_local_attention")
    case = golden.config["cases"][name]
    version = name.split("_")[1]
    module = filled(case, getattr(published, f"MultiheadLocalAttention{version}"))
    with code.enable(), torch.no_grad():
        out, attention = module(*(golden[case["inputs"][x]] for x in "qkv"))
    golden.check(f"{name}.out", out)
    assert attention is None


@pytest.mark.parametrize("name", list(Golden("ops_gated_propagation").config["cases"]))
def test_gated_propagation(name: str, code: CodeBase, backend: str) -> None:
    golden = Golden("ops_gated_propagation")
    case = golden.config["cases"][name]
    local = name.startswith("local")
    module = filled(case, published.LocalGatedPropagation if local else published.GatedPropagation)
    size = case["params"]["h"], case["params"]["w"]
    inputs = [
        golden[case["inputs"][x]] if x in case["inputs"] else None for x in ("qkvu" if local else "QKVU")
    ]
    with code.enable(), torch.no_grad():
        out, attention = module(*inputs, size)
        golden.check(f"{name}.out", out)
        assert attention is None
        if not local and not case["params"]["use_linear"]:
            halves = inputs[2].chunk(2, -1)  # several heads cannot read them apart, and join them
            golden.check(f"{name}.out", module(*inputs[:2], halves, inputs[3], size)[0])


@pytest.mark.parametrize("layer", [0, 1])
def test_gated_propagation_module(layer: int, code: CodeBase, backend: str) -> None:
    """Three frames: its own memory; a memory of one frame; a memory of two."""
    golden = Golden("ops_propagation_layers")
    name = f"gpm_layer{layer}"
    case = golden.config["cases"][name]
    size = case["params"]["h"], case["params"]["w"]
    module = fill(published.GatedPropagationModule(case["params"]["d_model"], layer))
    x0, x1, id0, id1 = (golden[f"{name}.{x}"] for x in ("x0", "x1", "id0", "id1"))
    t0, t1 = (golden[f"{name}.t{i}"] if layer else None for i in range(2))
    with code.enable(), torch.no_grad():
        *out, (_, long, short) = module(x0, t0, curr_id_emb=id0, size_2d=size)
        golden.check(f"{name}.out0", out[0])
        golden.check(f"{name}.out_id0", out[1])
        golden.check(f"{name}.memory_k0", long[0])
        golden.check(f"{name}.memory_v0", long[1])
        golden.check(f"{name}.memory_id_v0", long[3])
        assert long[2] is None
        assert [None if x is None else x.dim() for x in short] == [4, 4, None, 4]
        *out, (current, kept, _) = module(x1, t1, long, short, size_2d=size)
        golden.check(f"{name}.out1", out[0])
        golden.check(f"{name}.out_id1", out[1])
        assert kept is long
        current[3] = module.fuse_key_value_id(None, current[3], id1)[1]
        golden.check(f"{name}.memory_id_v1", current[3])
        both = [
            None if new is None else torch.cat((new, old)) for new, old in zip(current, long, strict=True)
        ]
        near = [None if x is None else x.unflatten(0, size).permute(2, 3, 0, 1) for x in current]
        *out, _ = module(x0, t0, both, near, size_2d=size)
        golden.check(f"{name}.out2", out[0])
        golden.check(f"{name}.out_id2", out[1])


def modules(dropout: float) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    tokens, maps = torch.randn(12, 2, 32), torch.randn(2, 32, 3, 4)
    gated = {"d_qk": 32, "d_vu": 16, "num_head": 1, "use_linear": False, "dropout": dropout}
    return [
        (published.MultiheadAttention(32, 4, dropout), (tokens, tokens, tokens)),
        (published.MultiheadLocalAttentionV2(32, 4, dropout, max_dis=2), (maps, maps, maps)),
        (published.GatedPropagation(**gated), (tokens, tokens, tokens, tokens, (3, 4))),
        (published.LocalGatedPropagation(**gated, max_dis=2), (maps, maps, maps, tokens, (3, 4))),
    ]


def test_what_stays_published(code: CodeBase) -> None:
    with code.enable():
        for module, inputs in modules(0.1):
            assert module.train()(*inputs)[0] == "published"
            assert isinstance(module.eval()(*inputs)[0], Tensor)
        for module, inputs in modules(0.0):
            assert isinstance(module.train()(*inputs)[0], Tensor)
            module.dilation = 2
            local = hasattr(module, "window_size")
            assert module(*inputs)[0] == "published" if local else True
    for module, inputs in modules(0.0):
        assert module(*inputs)[0] == "published"


def test_training_only_options(code: CodeBase) -> None:
    """top_k and max_mem_len_ratio act in evaluation only, as published."""
    module = published.MultiheadAttention(16, 2, top_k=3, max_mem_len_ratio=1.5)
    plain = published.MultiheadAttention(16, 2)
    plain.load_state_dict(module.state_dict())
    query, memory = torch.randn(5, 1, 16), torch.randn(20, 1, 16)
    with code.enable(), torch.no_grad():
        expected = plain(query, memory, memory)[0]
        torch.testing.assert_close(module.train()(query, memory, memory)[0], expected)
        assert not torch.allclose(module.eval()(query, memory, memory)[0], expected)


def test_gradients_and_autocast(code: CodeBase, cpu_backend: None) -> None:
    torch.manual_seed(0)
    for module, inputs in modules(0.0):
        exact = copy.deepcopy(module).double()
        with code.enable():
            module(*inputs)[0].square().sum().backward()
            with vosops.use_backend("reference"):
                wide = [x.double() if isinstance(x, Tensor) else x for x in inputs]
                exact(*wide)[0].square().sum().backward()
            # Not one by one: that of linear_K.bias is 0, as a softmax does not see it.
            largest = max(float(x.grad.abs().max()) for x in exact.parameters())
            for (name, ours), theirs in zip(module.named_parameters(), exact.parameters(), strict=True):
                assert ours.grad is not None, name
                torch.testing.assert_close(
                    ours.grad.double() / largest, theirs.grad / largest, atol=1e-5, rtol=0
                )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                low = module(*inputs)[0]
            assert low.dtype == torch.bfloat16  # as the projection gives it


def layers(number: int, tokens: int = 6) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(number)
    return [
        [torch.randn(tokens, 2, 4, generator=generator), torch.randn(tokens, 2, 8, generator=generator), None]
        for _ in range(2)
    ]


def test_long_term_memory_is_what_concatenation_gives(code: CodeBase) -> None:
    ours, theirs = published.AOTEngine(), published.AOTEngine()
    ours.long_term_memories = theirs.long_term_memories = tuple(layers(0))
    snapshots, buffers = [], set()
    for step in range(1, 30):
        new = layers(step, tokens=6 if step % 7 else 11)
        theirs.update_long_term_memory(new)
        with code.enable():
            ours.update_long_term_memory(new)
        buffers.add(ours.long_term_memories[0][0].untyped_storage().data_ptr())
        snapshots.append((ours.long_term_memories, theirs.long_term_memories))
    for kept, expected in snapshots:  # also the earlier ones: nothing changed under their holder
        assert isinstance(kept, list)
        for ours_layer, their_layer in zip(kept, expected, strict=True):
            assert ours_layer[2] is None
            for a, b in zip(ours_layer[:2], their_layer[:2], strict=True):
                assert torch.equal(a, b)
    assert len(buffers) <= 9  # each half as large again as the one before


def test_long_term_memory_of_two_engines_that_began_alike(code: CodeBase) -> None:
    first = published.AOTEngine()
    first.long_term_memories = layers(0)
    with code.enable():
        first.update_long_term_memory(layers(1))
        second = copy.copy(first)
        third = copy.deepcopy(first)
        for number, engine in enumerate((first, second, third), 2):
            engine.update_long_term_memory(layers(number))
    for number, engine in enumerate((first, second, third), 2):
        expected = torch.cat([layers(i)[0][0] for i in (number, 1, 0)])
        assert torch.equal(engine.long_term_memories[0][0], expected)


def test_long_term_memory_keeps_gradients_and_modes(code: CodeBase) -> None:
    engine = published.AOTEngine()
    engine.long_term_memories = layers(0)
    new = [[x if x is None else x.requires_grad_() for x in layer] for layer in layers(1)]
    with code.enable():
        engine.update_long_term_memory(new)
        assert engine.long_term_memories[0][0].requires_grad
        engine.long_term_memories = layers(0)
        with torch.inference_mode():
            engine.update_long_term_memory(layers(1))
            engine.update_long_term_memory(layers(2))
        engine.update_long_term_memory(layers(3))
        half = [[x if x is None else x.half() for x in layer] for layer in layers(4)]
        engine.update_long_term_memory(half)
    expected = torch.cat([half[0][0].float(), *(layers(i)[0][0] for i in (3, 2, 1, 0))])
    assert torch.equal(engine.long_term_memories[0][0], expected)
    assert not expected.is_inference()


def test_long_term_memory_of_another_shape_is_an_error(code: CodeBase) -> None:
    engine = published.AOTEngine()
    engine.long_term_memories = layers(0)
    narrow = [[x if x is None else x[:, :1] for x in layer] for layer in layers(1)]
    with code.enable(), pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        engine.update_long_term_memory(narrow)


def test_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if aot.CODE_BASE.enabled:
        pytest.skip("the published code is in use in this process")
    module = ModuleType("other.networks.layers.attention")
    module.MultiheadAttention = published.MultiheadAttention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = published.MultiheadAttention.forward
    with pytest.raises(UnknownVersionError, match=r"MultiheadAttention\.forward"):
        aot.enable()
    assert published.MultiheadAttention.forward is before
    aot.disable()  # nothing to put back


@pytest.fixture(scope="module")
def peers() -> Path:
    """A folder with checkouts of published code."""
    folder = os.environ.get("VOSOPS_PEERS")
    if not folder or not (Path(folder) / "aot-benchmark" / "networks").is_dir():
        pytest.skip("VOSOPS_PEERS names no folder with a checkout aot-benchmark")
    return Path(folder).resolve()


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the stand-ins' sources as the only known ones: what it says, and that accelerate() says it."""
    with published.code_base() as code:
        monkeypatch.setattr(aot.CODE_BASE, "targets", code.targets)
        with vosops.accelerate(published.MultiheadAttention(16, 2)) as report:
            assert aot.CODE_BASE.enabled
            assert "MultiheadLocalAttentionV3.forward" in report.replaced
            assert "attention dropout in training" in report.kept
            assert "V3, which raise an error as published" in str(report)
            assert "None in place of the attention matrix" in str(report)
        assert not aot.CODE_BASE.enabled
    assert published.MultiheadAttention.forward is published.published


def run_published(peers: Path, model: str, out: Path, *options: str) -> dict[str, np.ndarray]:
    """Their own engine over a clip, in a process of its own: its modules have names like `utils`."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.dropin_aot", str(peers), model, str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("model", ["aott", "aotl", "r50_aotl", "deaott", "deaotl"])
def test_published_engine(model: str, peers: Path, tmp_path: Path) -> None:
    """12 frames, 3 objects, random weights, memory grown every second frame: before, inside, after."""
    done = run_published(peers, model, tmp_path / "out.npz", "--size", "97x145")
    assert len(np.unique(done["labels_before"])) > 1
    assert (done["labels_before"] == done["labels_enabled"]).mean() >= 0.9999
    assert np.abs(done["probabilities_before"] - done["probabilities_enabled"]).max() < 1e-4
    assert (done["probabilities_before"] == done["probabilities_after"]).all()
    assert done["memory_before"].shape == done["memory_enabled"].shape
    assert np.abs(done["memory_before"] - done["memory_enabled"]).max() < 1e-3


def test_published_engine_without_the_extension(peers: Path, tmp_path: Path) -> None:
    """Neither the extension nor install(): the published code takes V3, which raises, and runs inside."""
    size = ("--size", "97x145")
    expected = run_published(peers, "aott", tmp_path / "with.npz", *size)
    done = run_published(peers, "aott", tmp_path / "without.npz", *size, "--without-sampler")
    assert "must match the size" in str(done["error_before"])
    assert np.abs(expected["probabilities_before"] - done["probabilities_enabled"]).max() < 1e-4
