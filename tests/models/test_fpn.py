# SPDX-License-Identifier: Apache-2.0
"""AOT's decoder against its definition in float64, and how rows share an image."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.weights import GOLDEN
from vosops.models import blocks
from vosops.models.fpn import FPNDecoder

WIDTHS = (12, 20, 28)


def decoder(align_corners: bool = True) -> FPNDecoder:
    torch.manual_seed(0)
    made = FPNDecoder(48, 5, shortcut_channels=WIDTHS, align_corners=align_corners).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def maps(batch: int, rows: int, align_corners: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    one = int(align_corners)
    shortcuts = [
        torch.randn(batch, width, 2 * scale + one, 3 * scale + one, dtype=torch.float64)
        for width, scale in zip(WIDTHS, (4, 2, 1), strict=True)
    ]
    size = shortcuts[2].shape[2:]
    inputs = [torch.randn(rows, width, *size, dtype=torch.float64) for width in (16, 32)]
    return inputs, shortcuts


def plain(made: FPNDecoder, inputs: list[Tensor], shortcuts: list[Tensor]) -> Tensor:
    """The definition: every row with its own copy of the shortcuts."""
    rows = inputs[0].shape[0]
    f4, f8, f16 = (x.repeat_interleave(rows // x.shape[0], 0) for x in shortcuts)
    weights = made.state_dict(keep_vars=True)

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)

    def stage(name: str, x: Tensor, padding: int) -> Tensor:
        x = conv(f"{name}.conv", x, padding)
        groups = x.reshape(rows, 8, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        scale, offset = weights[f"{name}.gn.weight"], weights[f"{name}.gn.bias"]
        return torch.relu(x * scale[:, None, None] + offset[:, None, None])

    def grow(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=made.align_corners)

    x = stage("conv_in", torch.cat(inputs, 1), 0)
    x = stage("conv_16x", x + conv("adapter_16x", f16), 1)
    x = stage("conv_8x", grow(x, f8) + conv("adapter_8x", f8), 1)
    x = stage("conv_4x", grow(x, f4) + conv("adapter_4x", f4), 1)
    return conv("conv_out", x)


@pytest.mark.parametrize(
    ("file", "in_channels", "widths"),
    [
        ("AOTT", 512, (24, 32, 96)),
        ("R50_AOTL", 1024, (256, 512, 1024)),
        ("SwinB_AOTL", 1024, (128, 256, 512)),
        ("R50_DeAOTL", 512, (256, 512, 1024)),
        ("SwinB_DeAOTL", 512, (128, 256, 512)),
    ],
)
def test_names_and_shapes_are_the_published_ones(
    file: str, in_channels: int, widths: tuple[int, ...]
) -> None:
    published = json.loads((GOLDEN / "state_dicts" / f"{file}.json").read_text())
    made = FPNDecoder(in_channels, shortcut_channels=widths, align_corners=True)
    ours = {f"decoder.{name}": list(value.shape) for name, value in made.state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if name.startswith("decoder.")}


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 3), (2, 2), (2, 6)])
def test_definition_and_its_gradients(batch: int, rows: int, align_corners: bool) -> None:
    made = decoder(align_corners)
    inputs, shortcuts = maps(batch, rows, align_corners)
    leaves = [x.requires_grad_() for x in (*inputs, *shortcuts, *made.parameters())]
    ours, expected = made(inputs, shortcuts), plain(made, inputs, shortcuts)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, upstream)
    torch.testing.assert_close(mine, torch.autograd.grad(expected, leaves, upstream), rtol=1e-9, atol=1e-9)


def test_chunks_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder()
    inputs, shortcuts = maps(2, 10)
    with torch.no_grad():
        whole = made(inputs, shortcuts)
        monkeypatch.setattr(blocks, "_CHUNK_ELEMENTS", 2 * 2 * 128 * shortcuts[0][0, 0].numel())
        rows = []
        made.conv_4x.register_forward_hook(lambda module, given, result: rows.append(len(result)))
        torch.testing.assert_close(made(inputs, shortcuts), whole, rtol=1e-10, atol=1e-10)
    assert rows == [4, 4, 2]


def test_channels_last_stays() -> None:
    made = decoder().float().to(memory_format=torch.channels_last)
    inputs, shortcuts = ([x.float() for x in given] for given in maps(1, 2))
    with torch.no_grad():
        expected = made(inputs, shortcuts)
        formats = []
        for part in (made.conv_in, made.conv_16x, made.conv_8x, made.conv_4x):
            part.register_forward_hook(
                lambda module, given, result: formats.extend(
                    x.is_contiguous(memory_format=torch.channels_last) for x in (given[0], result)
                )
            )
        last = [
            [x.contiguous(memory_format=torch.channels_last) for x in given] for given in (inputs, shortcuts)
        ]
        ours = made(*last)
    assert formats == [True] * 8
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_inputs_are_left_alone() -> None:
    made = decoder()
    inputs, shortcuts = maps(1, 1)
    copies = [x.clone() for x in (*inputs, *shortcuts)]
    with torch.no_grad():
        made(inputs[:1] + inputs[1:], shortcuts)
    for before, after in zip(copies, (*inputs, *shortcuts), strict=True):
        assert torch.equal(before, after)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"shortcut_channels must be three widths .* got \[1, 2\]"):
        FPNDecoder(8, shortcut_channels=(1, 2), align_corners=True)
    made = decoder()
    inputs, shortcuts = maps(2, 4)
    with pytest.raises(ValueError, match="shortcuts must be three maps .* got 4"):
        made(inputs, [*shortcuts, shortcuts[2]])
    with pytest.raises(ValueError, match="at least one map"):
        made([], shortcuts)
    with pytest.raises(ValueError, match="multiple of the images, 2, got 3"):
        made([x[:3] for x in inputs], shortcuts)
    with pytest.raises(ValueError, match=r"inputs must be \(4, C, 3, 4\), got \(4, 32, 3, 3\)"):
        made([inputs[0], inputs[1][..., :3]], shortcuts)
    with pytest.raises(ValueError, match="inputs must have 48 channels together, got 32"):
        made([inputs[1]], shortcuts)
