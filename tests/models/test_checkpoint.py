# SPDX-License-Identifier: Apache-2.0
"""Reading published files: nesting, prefixes, formats, and exact reports of what does not fit."""

import pytest
import torch
from torch import nn

from vosops.models import CheckpointError
from vosops.models.checkpoint import adapted, compare, load_weights, read_state_dict


@pytest.fixture
def network():
    torch.manual_seed(0)
    module = nn.Sequential()
    module.add_module("value_encoder", nn.Sequential())
    module.value_encoder.add_module("conv1", nn.Conv2d(5, 4, 7, bias=False))
    module.value_encoder.add_module("bn1", nn.BatchNorm2d(4))
    return module


def nested(state):
    return {"it": 150_000, "network": state, "optimizer": {"state": {0: {"step": 1}}}, "scheduler": {}}


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        nested,
        lambda state: {"state_dict": state},
        lambda state: {"model": {"state_dict": state}, "epoch": 3},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: nested({f"module.{name}": value for name, value in state.items()}),
    ],
)
def test_reads_state_dicts_wherever_they_lie(network, tmp_path, wrap):
    torch.save(wrap(network.state_dict()), tmp_path / "file.pth")
    found = read_state_dict(tmp_path / "file.pth")
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_reads_safetensors(network, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(network.state_dict(), tmp_path / "file.safetensors")
    assert read_state_dict(tmp_path / "file.safetensors").keys() == network.state_dict().keys()


class NotWeights:
    pass


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights: no such file: .*gone\.pth"):
        read_state_dict(tmp_path / "gone.pth")
    path = tmp_path / "file.pth"
    for content, message in (
        ({}, "must hold a state dict, got an empty dictionary"),
        ([1, 2], "must hold a state dict, got list"),
        ({"epoch": 3, "optimizer": {}}, "must hold a state dict, got a dictionary of epoch, optimizer"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            read_state_dict(path)
    torch.save({"model": NotWeights()}, path)
    with pytest.raises(CheckpointError, match=r"file\.pth cannot be read as weights only"):
        read_state_dict(path)
    for name in ("file.pth", "file.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(CheckpointError, match=f"weights: {name} cannot be read"):
            read_state_dict(tmp_path / name)


def test_loads_half_precision_and_files_without_counters(network):
    state = {
        name: value.half()
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    other = nn.Sequential()
    other.add_module("value_encoder", nn.Sequential())
    other.value_encoder.add_module("conv1", nn.Conv2d(5, 4, 7, bias=False))
    other.value_encoder.add_module("bn1", nn.BatchNorm2d(4))
    load_weights(other, state, name="stcn", file="half.pth")
    weight = other.value_encoder.conv1.weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, network.value_encoder.conv1.weight, atol=1e-3, rtol=1e-3)


def test_a_single_object_value_encoder_is_widened_by_zeros(network):
    state = dict(network.state_dict())
    name = "value_encoder.conv1.weight"
    narrow = state[name][:, :4].clone()
    wide = adapted({**state, name: narrow}, state)
    assert torch.equal(wide[name][:, :4], narrow)
    assert not wide[name][:, 4:].any()
    assert adapted(state, state) == state
    load_weights(network, {**state, name: narrow}, name="stcn", file="stage0.pth")
    assert not network.value_encoder.conv1.weight[:, 4].any()


def test_every_misfit_is_reported_and_nothing_is_loaded(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    del state["value_encoder.bn1.bias"], state["value_encoder.bn1.running_mean"]
    state["value_encoder.conv1.weight"] = torch.zeros(4, 3, 7, 7)
    state["extra.weight"] = state["extra.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, state, name="stcn", file="other.pth")
    error = caught.value
    assert error.missing == ["value_encoder.bn1.bias", "value_encoder.bn1.running_mean"]
    assert error.unexpected == ["extra.weight", "extra.bias"]
    assert error.shapes == {"value_encoder.conv1.weight": ([4, 3, 7, 7], [4, 5, 7, 7])}
    assert error.looks_like == []
    text = str(error)
    assert "other.pth does not fit stcn (5 misfits)" in text
    for name in (*error.missing, *error.unexpected, "[4, 3, 7, 7] in the file, [4, 5, 7, 7] in the model"):
        assert name in text
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not compare(before, before)
