# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, the learning rate, averaged weights, and ImageNet weights for the encoder."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import mobilenet_v2

from vosops import models
from vosops.models.aot_encoders import MobileNetV2Encoder
from vosops.models.checkpoint import CheckpointError
from vosops.models.encoders import normalize_imagenet
from vosops.training.checkpoint import load_mobilenet, read_checkpoint, write_checkpoint, write_weights
from vosops.training.config import OptimConfig
from vosops.training.optim import WeightAverage, is_encoder, learning_rate, make_optimizer, set_learning_rate


def test_groups_of_aot():
    with torch.device("meta"):
        model = models.create("aot_tiny").train()
    config = OptimConfig(weight_decay=0.07)
    optimizer = make_optimizer(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            bare = parameter.dim() == 1 or "relative_emb_v" in name or "conv_out" in name
            assert group["weight_decay"] == (0 if bare else 0.07), name
            assert group["encoder"] == name.startswith("encoder."), name
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert any("relative_emb_v" in name for name in seen)
    set_learning_rate(optimizer, 2e-4, config)
    rates = {group["encoder"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({False: 2e-4, True: 1e-5 + 0.1 * 19e-5})


def test_the_encoder_is_what_was_pretrained():
    with torch.device("meta"):
        model = models.create("stcn_tiny")
    names = {name for name, _ in model.named_parameters() if is_encoder(name)}
    assert names
    assert all(name.startswith("key_encoder.") for name in names)
    assert not any(name.startswith("key_encoder.top.") for name in names)


def test_nothing_to_train_is_an_error():
    model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        make_optimizer(model, OptimConfig())


def test_learning_rate():
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup=0.1, power=0.9)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[5] == pytest.approx(1e-5 + 0.5 * 99e-5)
    assert rates[10] == max(rates) == pytest.approx(1e-3)
    assert rates[55] == pytest.approx(1e-5 + 99e-5 * 0.5**0.9)
    assert all(a > b > 1e-5 for a, b in pairwise(rates[10:]))
    assert learning_rate(0, 100, OptimConfig(warmup=0.0, lr=3e-4)) == pytest.approx(3e-4)


def test_average():
    """Against the recurrence written out; counters are taken over."""
    model = torch.nn.BatchNorm1d(2)
    average = WeightAverage(model, 0.5, 10)
    assert average.decay == pytest.approx(0.8)
    expected = model.weight.detach().double().clone()
    for n in range(40):
        model.weight.data = torch.randn(2)
        model.num_batches_tracked += 1
        average.update(model)
        decay = min(0.8, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.state["weight"], expected.float())
    assert average.state["num_batches_tracked"] == 40
    other = WeightAverage(model, 0.5, 10)
    other.load(average.state, 40)
    assert torch.equal(other.state["weight"], average.state["weight"])
    assert not average.state["weight"].requires_grad


def test_checkpoints_are_whole_or_the_old_ones(tmp_path):
    path = tmp_path / "checkpoint.pth"
    write_checkpoint(path, {"step": 1, "weights": torch.ones(3)})

    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        write_checkpoint(path, {"step": 2, "weights": Unwritable()})
    assert read_checkpoint(path)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint.pth cannot be read"):
        read_checkpoint(path)


def test_weights_that_do_not_fit_half_precision_are_named(tmp_path):
    state = {"fine": torch.ones(2), "large": torch.full((2,), 1e6)}
    with pytest.raises(OverflowError, match="large does not fit into float16"):
        write_weights(tmp_path / "model.safetensors", state, half=True, about={})
    write_weights(tmp_path / "model.safetensors", state, half=False, about={"model": "x"})


@pytest.fixture(scope="module")
def imagenet_file(tmp_path_factory):
    """A network for images of TensorFlow's range, with all of its normalisation folded."""
    torch.manual_seed(0)
    state = mobilenet_v2(weights=None).state_dict()
    for name, value in state.items():
        if name.endswith(("running_mean", "bias")):
            state[name] = 0.1 * torch.randn_like(value)
    path = tmp_path_factory.mktemp("weights") / "mobilenet.safetensors"
    state = {name: value for name, value in state.items() if "num_batches" not in name}
    save_file(state, path, metadata={"input": "RGB, (uint8-127)/127.5"})
    return path, state


def test_imagenet_weights_see_what_they_were_trained_on(imagenet_file):
    path, state = imagenet_file
    encoder, plain = MobileNetV2Encoder(320).eval(), MobileNetV2Encoder(320).eval()
    loaded = load_mobilenet(torch.nn.ModuleDict({"encoder": encoder}), path)
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert loaded == len(plain.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        ours = encoder.features[0](normalize_imagenet(image))
        expected = plain.features[0](2 * image - 127 / 127.5)
    # The rim sees a padding of another grey.
    torch.testing.assert_close(ours[..., 1:, 1:], expected[..., 1:, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stcn_tiny", "aot_tiny"])
def test_imagenet_weights_reach_the_tiny_models(imagenet_file, name):
    path, state = imagenet_file
    model = models.create(name)
    load_mobilenet(model, path)
    (encoder,) = (part for part in model.modules() if isinstance(part, MobileNetV2Encoder))
    weight = encoder.get_submodule("features.5.conv.0.0").weight
    assert torch.equal(weight, state["features.5.conv.0.0.weight"])


def test_imagenet_weights_that_do_not_fit(imagenet_file, tmp_path):
    path, state = imagenet_file
    with pytest.raises(ValueError, match="encoder_weights: Linear has no MobileNetV2 encoder"):
        load_mobilenet(torch.nn.Linear(1, 1), path)
    model = torch.nn.ModuleDict({"encoder": MobileNetV2Encoder(96)})
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_mobilenet(model, tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"features.0.0.weight": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match=r"must hold features.0.0.weight \[32, 3, 3, 3\], got \[3\]"):
        load_mobilenet(model, other)
    save_file(state, other, metadata={"input": "BGR"})
    with pytest.raises(CheckpointError, match="an input that is not known: BGR"):
        load_mobilenet(model, other)
    other.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_mobilenet(model, other)
