# SPDX-License-Identifier: Apache-2.0
"""AOT's encoders: published names, golden maps, and networks of timm."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet50

from tests.models.weights import GOLDEN, Golden, fill
from vosops.models.aot_encoders import build_encoder
from vosops.models.encoders import normalize_imagenet

PUBLISHED = {
    "mobilenetv2": ("AOTT", "AOTS", "AOTT_12_objects"),
    "resnet50": ("R50_AOTL", "R50_DeAOTL"),
    "resnet101": ("R101_AOTL",),
    "resnest101": ("RS101_AOTL",),
    "swin_base": ("SwinB_AOTL",),
}


class Published(NamedTuple):
    name: str
    files: tuple[str, ...]
    model: nn.ModuleDict


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> Published:
    torch.manual_seed(0)
    encoder = build_encoder(request.param)
    projector = nn.Conv2d(encoder.channels[3], 256, 1)
    model = nn.ModuleDict({"encoder": encoder, "encoder_projector": projector}).eval()
    return Published(request.param, PUBLISHED[request.param], model)


def randomise(network: nn.Module) -> None:
    """Other statistics than 0 and 1, and maps that stay within a few powers of ten."""
    generator = torch.Generator().manual_seed(1)
    for name, entry in network.state_dict().items():
        if entry.is_floating_point():
            drawn = torch.randn(entry.shape, generator=generator)
            if entry.dim() > 1:
                entry.copy_(drawn / math.sqrt(math.prod(entry.shape[1:])))
            else:
                entry.copy_(0.1 * drawn + (1.0 if name.endswith(("weight", "running_var")) else 0.0))


def test_names_and_shapes_are_the_published_ones(published: Published) -> None:
    entries = json.loads((GOLDEN / "state_dicts" / f"{published.files[0]}.json").read_text())
    expected = {entry: shape for entry, shape in entries.items() if entry.startswith("encoder")}
    model = published.model
    assert {entry: list(value.shape) for entry, value in model.state_dict().items()} == expected
    norms = {entry.rpartition(".")[0] for entry in expected if entry.endswith("running_var")}
    assert not norms & {entry.rpartition(".")[0] for entry, _ in model.named_parameters()}
    assert model["encoder"].align_corners == (published.name != "swin_base")


def test_gradients_reach_every_parameter(published: Published) -> None:
    check_gradients(published.model["encoder"])


def test_golden_maps(published: Published) -> None:
    files = [file for file in published.files if (GOLDEN / f"{file}.npz").exists()]
    if not files:
        pytest.skip(f"the reference numbers have no model on {published.name}")
    for file in files:
        golden = Golden(file)
        model = fill(published.model, golden.config)
        frame = torch.from_numpy(golden.arrays["frames"][0]).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            maps = model["encoder"](normalize_imagenet(frame))
            projected = model["encoder_projector"](maps[3])
        arrays = [array for array in golden.arrays if array.startswith(("encoder", "projected"))]
        assert len(arrays) == 4
        for array in arrays:
            which, step = array.split("_")[1], int(array.rpartition("x")[2])
            ours = {"4x": maps[0][..., ::2, ::2], "8x": maps[1], "16x": maps[2], "frame0": projected}[which]
            golden.check(array, ours[:, ::step])


def check_gradients(encoder: nn.Module) -> None:
    image = torch.randn(1, 3, 33, 33).requires_grad_()
    sum(feature.square().mean() for feature in encoder(image)).backward()
    assert image.grad.abs().sum() > 0
    missing = [key for key, value in encoder.named_parameters() if value.grad is None or not value.grad.any()]
    assert not missing
    encoder.zero_grad()


def plain_maps(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(network, "features"):
        maps = []
        for index, block in enumerate(network.features):
            x = block(x)
            if index in (3, 6, 13, 18):
                maps.append(x)
        return maps
    x = network.maxpool(torch.relu(network.bn1(network.conv1(x))))
    f4 = network.layer1(x)
    f8 = network.layer2(f4)
    return [f4, f8, network.layer3(f8)]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("mobilenetv2", mobilenet_v2),
        ("resnet50", resnet50),
        ("resnest101", lambda: timm.create_model("resnest101e")),
    ],
)
def test_folded_normalisation_is_the_plain_networks(name: str, plain) -> None:
    network = plain().eval()
    randomise(network)
    network.double()
    encoder = build_encoder(name).double()
    names = encoder.state_dict()
    encoder.load_state_dict({key: value for key, value in network.state_dict().items() if key in names})
    image = torch.randn(2, 3, 49, 33, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = encoder(image), plain_maps(network, image)
    # MobileNetV2 trades stride for dilation behind the map at stride 16.
    for mine, expected in zip(ours, theirs[:3], strict=False):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
    if name == "mobilenetv2":
        assert ours[3].shape == (2, 1280, 4, 3)


def test_mobilenet_dilates_its_last_stages() -> None:
    """Every second position of the dilated stages is what the strided network computes from the same map."""
    network = mobilenet_v2().double().eval()
    randomise(network)
    encoder = build_encoder("mobilenetv2").double()
    encoder.load_state_dict(
        {key: value for key, value in network.state_dict().items() if key in encoder.state_dict()}
    )
    f16 = torch.randn(1, 96, 9, 13, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.features[14:](f16)[..., ::2, ::2], network.features[14:](f16), rtol=1e-10, atol=1e-10
        )


def test_swin_is_timms_where_no_padding_is_needed() -> None:
    name = "swin_tiny_patch4_window7_224"
    encoder = build_encoder(f"timm:{name}").eval()
    network = timm.create_model(name).eval()
    state = encoder.state_dict()
    for key, value in network.state_dict().items():
        parts = key.split(".")
        if parts[2:3] == ["downsample"]:
            key = ".".join(["layers", str(int(parts[1]) - 1), *parts[2:]])
        if key in state:
            state[key] = value
    encoder.load_state_dict(state)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        x = network.patch_embed(image)
        for index, stage in enumerate(network.layers[:3]):
            x = stage(x)
            expected = torch.nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(encoder(image)[index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet50", "timm:swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("size", [(97, 65), (96, 64), (70, 101)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    encoder = build_encoder(name).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(2, 3, *size))
    for feature, channels, stride in zip(maps, encoder.channels, (4, 8, 16, 16), strict=True):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


def test_swin_rows_are_independent_and_train_with_stochastic_depth() -> None:
    encoder = build_encoder("timm:swin_tiny_patch4_window7_224")
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(encoder(images)[3], encoder(images)[3])
        encoder.eval()
        alone = torch.cat([encoder(image[None])[3] for image in images])
        torch.testing.assert_close(encoder(images)[3], alone, rtol=1e-4, atol=1e-5)
    rates = [block.drop_path1.drop_prob for stage in encoder.layers for block in stage.blocks[1:]]
    # Spread over all stages of the network, the last one included.
    assert rates[-1] == pytest.approx(0.3 * 9 / 11)


def test_gradients_reach_every_parameter_of_a_network_of_timm() -> None:
    torch.manual_seed(0)
    check_gradients(build_encoder("timm:resnext50_32x4d"))


@pytest.mark.parametrize(
    ("name", "channels", "align_corners"),
    [
        ("tf_efficientnetv2_s", (48, 64, 160, 256), True),
        ("efficientnet_b5", (40, 64, 176, 512), True),
        ("resnext101_32x8d", (256, 512, 1024, 2048), True),
        ("swin_base_patch4_window12_384", (128, 256, 512, 512), False),
        ("convnext_atto", (40, 80, 160, 320), False),
        ("pvt_v2_b0", (32, 64, 160, 160), True),
    ],
)
def test_networks_of_timm(name: str, channels: tuple[int, ...], align_corners: bool) -> None:
    encoder = build_encoder(f"timm:{name}")
    assert (encoder.channels, encoder.align_corners) == (channels, align_corners)
    size = (81, 65) if align_corners else (80, 64)
    with torch.no_grad():
        maps = encoder(torch.randn(1, 3, *size))
    for feature, width, stride in zip(maps, channels, (4, 8, 16, 16), strict=True):
        assert feature.shape == (1, width, -(-size[0] // stride), -(-size[1] // stride))
        assert feature.isfinite().all()
    assert not [part for part in encoder.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg", "mobilenetv2, resnet50.*'vgg'"),
        ("resnext50_32x4d", "timm:NAME"),
        ("timm:nothing", "'timm:nothing'"),
        ("timm:vit_tiny_patch16_224", "strides 4, 8 and 16"),
        ("timm:swinv2_tiny_window8_256", "any size"),
        ("timm:hrnet_w18_small", "any size"),
    ],
)
def test_unsuitable_names(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder(name)


def test_a_name_is_a_str() -> None:
    with pytest.raises(TypeError, match="name must be a str, got int"):
        build_encoder(50)  # type: ignore[arg-type]


def test_no_graph_breaks() -> None:
    stages = build_encoder("mobilenetv2").eval().features[:3]
    image = torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        compiled = torch.compile(stages, backend="eager", fullgraph=True)(image)
        torch.testing.assert_close(compiled, stages(image))
