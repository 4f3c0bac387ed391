# SPDX-License-Identifier: Apache-2.0
"""Every registered model can be created, described and loaded; another model's file is recognised."""

import socket

import pytest
import torch

from vosops import models
from vosops.models import CheckpointError, registry
from vosops.models.stcn import STCN


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a model tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def state_of(name):
    """Names and shapes of a model's file, without its weights."""
    with torch.device("meta"):
        return registry.MODELS[name].model_class()().state_dict()


@pytest.mark.parametrize("name", list(models.MODELS))
def test_table(name):
    info = models.MODELS[name]
    assert info.name == name
    assert info.source
    assert info.checkpoint
    assert info.operators
    assert issubclass(info.model_class(), models.VideoModel)
    assert info.parameters() > 10_000_000


def test_published_sizes():
    sizes = {name: models.MODELS[name].parameters() for name in ("stcn", "stm", "xmem")}
    assert sizes == {"stcn": 54_434_180, "stm": 38_925_570, "xmem": 62_185_224}
    assert [len(state_of(name)) for name in sizes] == [405, 558, 412]


def test_create_and_load(tmp_path):
    torch.manual_seed(0)
    model = models.create("stcn")
    assert isinstance(model, STCN)
    assert not model.training
    path = tmp_path / "stcn.pth"
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    narrow = weights["module.value_encoder.conv1.weight"][:, :4].clone()
    torch.save(weights, path)
    loaded = models.load("stcn", path)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    torch.save({"network": {**weights, "module.value_encoder.conv1.weight": narrow}, "it": 1}, path)
    first = models.load("stcn", path).value_encoder.conv1.weight
    assert torch.equal(first[:, :4], narrow)
    assert not first[:, 4].any()
    path.unlink()  # 218 MB that pytest would keep


def test_unknown_names():
    for call in (lambda: models.create("stmn"), lambda: models.load("stmn", "file.pth")):
        with pytest.raises(ValueError, match=r"model must be one of stm, .*xmem, got 'stmn'"):
            call()


@pytest.mark.parametrize(
    ("file", "asked", "said"),
    [
        ("xmem", "stcn", "an xmem checkpoint"),
        ("stcn", "xmem", "a stcn checkpoint"),
        ("stm", "stcn", "a stm or kmn checkpoint"),
        ("stcn", "stm", "a stcn checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_recognised(file, asked, said, tmp_path):
    path = tmp_path / "file.pth"
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in state_of(file).items()}, path)
    with pytest.raises(CheckpointError, match=f"file.pth does not fit {asked}: this looks like {said}"):
        models.load(asked, path)


def test_a_foreign_file_looks_like_nothing():
    assert registry.recognise({"layer.weight": torch.zeros(3)}) == []
