# SPDX-License-Identifier: Apache-2.0
"""The refinement after the decoder."""

from __future__ import annotations

import pytest
import torch

from vosops.models.blocks import freeze_batch_norm
from vosops.models.refine import MaskRefiner


@pytest.fixture(scope="module")
def refiner() -> MaskRefiner:
    torch.manual_seed(0)
    refiner = MaskRefiner().eval()
    freeze_batch_norm(refiner)
    return refiner


@pytest.mark.parametrize("size", [(64, 96), (48, 80), (32, 32)])
def test_any_multiple_of_16_keeps_its_size(refiner: MaskRefiner, size: tuple[int, int]) -> None:
    with torch.no_grad():
        refined = refiner(torch.rand(1, 3, *size), torch.randn(3, 1, *size))
    assert refined.shape == (3, 1, *size)


def test_it_starts_close_to_the_coarse_mask(refiner: MaskRefiner) -> None:
    image, coarse = torch.rand(1, 3, 64, 64), torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        change = refiner(image, coarse) - coarse
    assert 0 < change.abs().max() < 0.5


def test_every_object_is_refined_from_its_own_mask_and_frame(refiner: MaskRefiner) -> None:
    images, coarse = torch.rand(2, 3, 64, 64), torch.randn(4, 1, 64, 64)
    with torch.no_grad():
        together = refiner(images, coarse)
        alone = [refiner(images[i // 2 : i // 2 + 1], coarse[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_it_sees_image_and_mask(refiner: MaskRefiner) -> None:
    image = torch.rand(1, 3, 64, 64).requires_grad_()
    coarse = torch.randn(1, 1, 64, 64).requires_grad_()
    (refiner(image, coarse) - coarse).sum().backward()
    assert image.grad.abs().sum() > 0
    assert coarse.grad.abs().sum() > 0
    refiner.zero_grad()
