# SPDX-License-Identifier: Apache-2.0
"""Every registered model can be created, described and loaded; another model's file is recognised."""

import json
import socket

import pytest
import torch

from tests.models.weights import GOLDEN
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
        return registry.MODELS[name].build().state_dict()


@pytest.mark.parametrize("name", list(models.MODELS))
def test_table(name):
    info = models.MODELS[name]
    assert info.name == name
    assert info.source
    assert info.checkpoint
    assert info.operators
    assert issubclass(info.model_class(), models.VideoModel)
    assert (info.parameters() < 5_000_000) == name.endswith("_tiny")


AOT_SIZES = {  # parameters in millions, entries of the state dict without the unread token
    "aott": (5.734, 322),
    "aots": (6.998, 356),
    "aotb": (8.262, 390),
    "aotl": (8.262, 390),
    "r50_aotl": (14.910, 345),
    "r101_aotl": (33.850, 600),
    "rs101_aotl": (36.367, 850),
    "swinb_aotl": (65.399, 454),
    "deaott": (7.238, 325),
    "deaots": (10.203, 362),
    "deaotb": (13.167, 399),
    "deaotl": (13.167, 399),
    "r50_deaotl": (19.815, 354),
    "swinb_deaotl": (70.304, 463),
}


@pytest.mark.parametrize("name", list(AOT_SIZES))
def test_published_sizes_of_aot(name):
    millions, entries = AOT_SIZES[name]
    assert models.MODELS[name].parameters() / 1e6 == pytest.approx(millions, abs=1e-3)
    assert len(state_of(name)) == entries


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("AOTT", "aott"),
        ("AOTS", "aots"),
        ("R50_AOTL", "r50_aotl"),
        ("SwinB_AOTL", "swinb_aotl"),
        ("R50_DeAOTL", "r50_deaotl"),
    ],
)
def test_published_names_of_aot(file, name):
    published = json.loads((GOLDEN / "state_dicts" / f"{file}.json").read_text())
    published.pop("LSTT.mask_token", None)
    assert {key: list(value.shape) for key, value in state_of(name).items()} == published


def test_training_files_of_aot(tmp_path):
    """Averaged weights go before others; prefix, unread token and optimizer state do not matter."""
    torch.manual_seed(0)
    model = models.create("aott")
    plain = {f"module.{key}": value for key, value in model.state_dict().items()}
    plain["module.LSTT.mask_token"] = torch.zeros(1, 1, 256)
    path = tmp_path / "save_step_100000.pth"
    torch.save({"state_dict": plain, "optimizer": {"state": {0: torch.zeros(3)}, "lr": 1e-4}}, path)
    for name, value in models.load("aott", path).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    averaged = {key: value + 1 for key, value in plain.items() if value.is_floating_point()}
    torch.save({"state_dict": plain, "state_dict_ema": averaged}, path)
    bias = models.load("aott", path).encoder_projector.bias
    assert torch.equal(bias, model.encoder_projector.bias + 1)
    del plain["module.decoder.conv_out.bias"]
    torch.save(plain, path)
    with pytest.raises(CheckpointError, match=r"missing \(1\): decoder.conv_out.bias"):
        models.load("aott", path)


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
        with pytest.raises(ValueError, match=r"model must be one of stm, .*xmem, .*, got 'stmn'"):
            call()


@pytest.mark.parametrize(
    ("file", "asked", "said"),
    [
        ("xmem", "stcn", "an xmem checkpoint"),
        ("stcn", "xmem", "a stcn checkpoint"),
        ("stm", "stcn", "a stm or kmn checkpoint"),
        ("stcn", "stm", "a stcn checkpoint"),
        ("aotb", "aots", "an aotb or aotl checkpoint"),
        ("r50_deaotl", "r50_aotl", "an r50_deaotl checkpoint"),
        ("aott", "xmem", "an aott checkpoint"),
    ],
)
def test_a_checkpoint_of_another_model_is_recognised(file, asked, said, tmp_path):
    path = tmp_path / "file.pth"
    torch.save({name: torch.zeros(()).expand(value.shape) for name, value in state_of(file).items()}, path)
    with pytest.raises(CheckpointError, match=f"file.pth does not fit {asked}: this looks like {said}"):
        models.load(asked, path)


def test_a_foreign_file_looks_like_nothing():
    assert registry.recognise({"layer.weight": torch.zeros(3)}) == []
