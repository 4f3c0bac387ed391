# SPDX-License-Identifier: Apache-2.0
"""The modules beyond the golden files: importing, stochastic depth, gradients, dtypes, compiling."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vosops import nn
from vosops.nn.lstt import DropPath

SIZE = (4, 6)


def block_of(kind):
    torch.manual_seed(0)
    if kind == "gated":
        return nn.GatedPropagationModule(2, 64)
    return nn.LSTT(2, 64, block=nn.LSTTBlockV2 if kind == "v2" else nn.LSTTBlock)


def memories(module, batch=2):
    x = torch.randn(batch, 24, 64)
    _, currents = module(x, None, torch.randn(batch, 24, 64), size=SIZE)
    return [nn.Read(m, m) for m in module.memorise(currents, torch.randn(batch, 24, 64))]


def test_the_modules_need_torch_only():
    code = "import sys, vosops.nn; sys.exit(any(m in sys.modules for m in ('torchvision', 'timm', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_example():
    text = (Path(__file__).parents[2] / "docs" / "aot.md").read_text()
    names = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[-1], names)
    assert names["tokens"].shape == (1, 31 * 54, 256)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    kept = drop(x)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (kept == kept[:, :1, :1]).all()  # a clip as a whole
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


@pytest.mark.parametrize("kind", ["v1", "v2", "gated"])
def test_batches_are_independent_and_gradients_reach_all(kind):
    module = block_of(kind).eval()
    reads = memories(module)
    x = torch.randn(2, 24, 64, requires_grad=True)
    position = nn.sine_position(SIZE, 64, torch.device("cpu"))
    outputs, _ = module(x, reads, None, size=SIZE, position=position)
    for row in range(2):
        single = [nn.Read(*(nn.Memory(*(t[row : row + 1] for t in m)) for m in read)) for read in reads]
        alone, _ = module(x[row : row + 1], single, None, size=SIZE, position=position)
        for ours, expected in zip(outputs, alone, strict=True):
            torch.testing.assert_close(ours[row : row + 1], expected, atol=1e-5, rtol=1e-5)
    sum(out.square().sum() for out in outputs).backward()
    assert x.grad.abs().sum() > 0
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert missing == []


@pytest.mark.parametrize("kind", ["v1", "v2", "gated"])
def test_compiles_whole(kind):
    module = block_of(kind).eval()
    with torch.no_grad():
        reads, x = memories(module, 1), torch.randn(1, 24, 64)
        expected, _ = module(x, reads, None, size=SIZE)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        ours, _ = compiled(x, reads, None, size=SIZE)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["v1", "v2", "gated"])
def test_modules_in_short_types(kind, dtype):
    """The published window attention crashes in bfloat16 and float16."""
    module = block_of(kind).eval()
    with torch.no_grad():
        reads, x = memories(module, 1), torch.randn(1, 24, 64)
        expected, _ = module(x, reads, None, size=SIZE)
        short = [nn.Read(*(nn.Memory(*(t.to(dtype) for t in m)) for m in read)) for read in reads]
        ours, _ = module.to(dtype)(x.to(dtype), short, None, size=SIZE)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.float(), b, atol=0.1, rtol=0.1)


def test_top_k_is_the_long_term_memorys_alone():
    module = block_of("v1").eval()
    with torch.no_grad():
        reads, x = memories(module, 1), torch.randn(1, 24, 64)
        dense, _ = module(x, reads, None, size=SIZE)
        every, _ = module(x, reads, None, size=SIZE, top_k=24)
        few, _ = module(x, reads, None, size=SIZE, top_k=3)
    assert torch.equal(dense[0], every[0])
    assert not torch.allclose(dense[0], few[0])
