# SPDX-License-Identifier: Apache-2.0
"""The context between read and decoder."""

from __future__ import annotations

import torch

from vosops.models.aspp import ReadContext
from vosops.models.blocks import freeze_batch_norm


def _context(channels: int = 32) -> ReadContext:
    torch.manual_seed(0)
    context = ReadContext(channels).eval()
    freeze_batch_norm(context)
    return context


def test_it_starts_close_to_the_identity() -> None:
    context = _context(1024)
    x = torch.randn(1, 1024, 6, 9)
    with torch.no_grad():
        change = context(x) - x
    assert 0 < change.abs().max() < 0.1


def test_dilations_reach_6_12_and_18_cells() -> None:
    context = _context()
    rates = sorted(
        part.dilation[0]
        for part in context.modules()
        if isinstance(part, torch.nn.Conv2d) and part.kernel_size[0] == 3
    )
    assert rates == [6, 12, 18]
    x = torch.zeros(1, 32, 41, 41, requires_grad=True)
    # The frame's mean reaches every cell, so look at the largest gradients only.
    context(x + torch.randn_like(x))[0, :, 20, 20].sum().backward()
    reach = x.grad[0].abs().sum(0) > 2 * x.grad[0, :, 0, 1].abs().sum()
    assert {int(c) for c in reach.nonzero().flatten()} <= {2, 8, 14, 20, 26, 32, 38}
    assert {2, 8, 14, 26, 32, 38} <= {int(c) for c in reach.nonzero().flatten()}


def test_frozen_batch_norm_leaves_random_weights_as_they_are() -> None:
    context = _context()
    norm = context.aspp.convs[1][1]
    x = torch.randn(2, 256, 4, 4)
    torch.testing.assert_close(norm(x), x, rtol=1e-4, atol=1e-4)
    assert not norm.weight.requires_grad


def test_one_row_of_one_cell_works_in_training() -> None:
    context = _context().train()
    freeze_batch_norm(context)
    assert context(torch.randn(1, 32, 1, 1)).shape == (1, 32, 1, 1)
