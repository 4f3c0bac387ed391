# SPDX-License-Identifier: Apache-2.0
"""Shared blocks: convolving parts once for all objects changes nothing, batch norm stays fixed."""

import pytest
import torch
from torch import nn

from vosops.models.blocks import (
    CBAM,
    FeatureFusion,
    ResBlock,
    UpsampleBlock,
    convolve_parts,
    freeze_batch_norm,
    map_objects,
    object_chunks,
    other_masks,
    per_object,
)
from vosops.models.encoders import ResNetTrunk, normalize_imagenet


def joined(shared, own):
    """What the published code convolves: the shared features repeated for every object."""
    return shared.repeat_interleave(len(own) // len(shared), 0)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_convolution_of_parts_is_that_of_their_concatenation(batch):
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 6, 3, padding=1, stride=2).double()
    own, shared, other = (torch.randn(n, 4, 9, 7).double() for n in (batch * 3, batch, batch * 3))
    expected = conv(torch.cat((own, joined(shared, own), other), 1))
    torch.testing.assert_close(convolve_parts(conv, (own, shared, other)), expected)
    torch.testing.assert_close(convolve_parts(conv, [expected_input(own, shared, other)]), expected)


def expected_input(own, shared, other):
    return torch.cat((own, joined(shared, own), other), 1)


@pytest.mark.parametrize("out_channels", [5, 12])
def test_residual_block_of_parts(out_channels):
    torch.manual_seed(0)
    block = ResBlock(12, out_channels).double()
    own, shared = torch.randn(6, 4, 5, 7).double(), torch.randn(2, 8, 5, 7).double()
    whole = torch.cat((own, joined(shared, own)), 1)
    expected = block.conv2(block.conv1(whole.relu()).relu())
    expected = expected + (whole if out_channels == 12 else block.downsample(whole))
    torch.testing.assert_close(block(own, shared), expected)
    assert (block.downsample is None) == (out_channels == 12)


def test_fusion_and_upsampling_share_what_is_shared():
    torch.manual_seed(0)
    fuse, up = FeatureFusion(24, 16).double(), UpsampleBlock(8, 16, 4).double()
    own, shared = torch.randn(4, 16, 6, 6).double(), torch.randn(2, 8, 6, 6).double()
    fused = fuse(own, shared)
    torch.testing.assert_close(fused, fuse(torch.cat((own, joined(shared, own)), 1)))
    skip = torch.randn(2, 8, 12, 12).double()
    torch.testing.assert_close(up(skip, fused), up(joined(skip, fused), fused))
    assert up(skip, fused).shape == (4, 4, 12, 12)


def test_names_of_the_published_checkpoints():
    assert [name for name, _ in CBAM(32).named_parameters()] == [
        "ChannelGate.mlp.1.weight",
        "ChannelGate.mlp.1.bias",
        "ChannelGate.mlp.3.weight",
        "ChannelGate.mlp.3.bias",
        "SpatialGate.spatial.conv.weight",
        "SpatialGate.spatial.conv.bias",
    ]
    assert set(ResBlock(4, 6).state_dict()) == {
        f"{part}.{kind}" for part in ("conv1", "conv2", "downsample") for kind in ("weight", "bias")
    }
    trunk = ResNetTrunk(18, stages=("layer1", "layer2", "layer3"), in_channels=5, conv_bias=True)
    assert trunk.conv1.weight.shape == (64, 5, 7, 7)
    assert "layer2.0.downsample.0.bias" in trunk.state_dict()
    assert "res2.0.conv1.bias" not in ResNetTrunk().state_dict()


def test_trunk_gives_three_strides():
    f16, f8, f4 = ResNetTrunk(18, stages=("a", "b", "c"))(torch.zeros(2, 3, 64, 96))
    assert (f16.shape, f8.shape, f4.shape) == ((2, 256, 4, 6), (2, 128, 8, 12), (2, 64, 16, 24))
    with pytest.raises(ValueError, match="depth must be 18 or 50 and stages three names, got 34"):
        ResNetTrunk(34)


def test_frozen_batch_norm_keeps_its_statistics_and_takes_no_gradient():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    freeze_batch_norm(module)
    module(torch.randn(2, 3, 5, 5) + 3).sum().backward()
    assert module[1].num_batches_tracked == 0
    assert module[1].weight.grad is None
    assert module[0].weight.grad is not None


def test_objects_come_in_chunks_of_bounded_size():
    assert list(object_chunks(5, 1)) == [slice(0, 5)]
    chunks = list(object_chunks(30, 1 << 23))
    assert [len(range(30)[c]) for c in chunks] == [8, 8, 8, 6]
    assert list(object_chunks(3, 1 << 40)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(object_chunks(0, 7)) == []
    whole = torch.arange(60.0).view(2, 30)
    assert torch.equal(map_objects(lambda c: whole[:, c], 30, 1 << 25, dim=1), whole)


def test_helpers():
    masks = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(other_masks(masks)[:, 1], masks[:, 0] + masks[:, 2])
    shared = torch.randn(2, 5)
    assert torch.equal(per_object(shared, 6)[3:], shared[1].expand(3, 5))
    assert per_object(shared, 2) is shared
    with pytest.raises(ValueError, match="rows must be a multiple of the frames, 2, got 5"):
        per_object(shared, 5)
    white = normalize_imagenet(torch.ones(1, 3, 2, 2))
    assert white[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-3)
