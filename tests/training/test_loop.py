# SPDX-License-Identifier: Apache-2.0
"""The loop: losses fall, a killed run goes on as if nothing had happened, processes share a batch."""

import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.training.runs import first_gradients, losses, tiny_config, train, write_clips
from vosops import models
from vosops.models import CheckpointError
from vosops.models.stcn import STCN
from vosops.propagate import Tracker
from vosops.training import loop
from vosops.training.config import ConfigError, dump, load_config
from vosops.training.judge import first_masks
from vosops.training.losses import clip_loss
from vosops.training.record import COLUMNS, read_log


@pytest.fixture(autouse=True)
def _as_outside_of_tests():
    """Runs in processes of their own are compared with runs in this one."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return folder


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of eight steps that nothing disturbed."""
    config = tiny_config(tmp_path_factory.mktemp("runs") / "whole", clips)
    return config, train(config)


@pytest.mark.parametrize("model", ["stcn_tiny", "aot_tiny"])
@pytest.mark.parametrize("source", ["clips", "train_data"])
def test_fifty_steps_make_the_loss_fall(source, model, request, tmp_path):
    """On rendered clips, and on real ones of both stages: DAVIS videos and photographs with regions."""
    folder = request.getfixturevalue(source)
    assignments = ["steps=50", "frames=2", "optim.lr=2e-3", "optim.ema=0.02", "checkpoint_every=50"]
    if source == "train_data":
        regions = {"layout": "regions", "path": str(folder / "static_bsds500")}
        davis = {"layout": "davis", "path": str(folder), "sequences": "2017/train.txt"}
        assignments.append(f"data={{sources: [{regions}, {davis}], clips_per_epoch: 6}}")
    config = tiny_config(tmp_path / "run", folder, *assignments, model=model)
    torch.manual_seed(config.seed)
    before = mean_loss(loop.build_model(config), config)
    outcome = train(config)
    assert outcome.step == len(read_log(config.run)) == 50
    after = mean_loss(models.load(model, outcome.weights), config)
    assert after < 0.8 * before


@torch.no_grad()
def mean_loss(model, config):
    """Over the clips of two epochs: single steps differ by their clips more than by what was learnt."""
    data = loop.build_dataset(config.data, frames=2, crop=64, max_objects=3, seed=0)
    batches, values = loop.Batches(data, replace(config, steps=6)), []
    for batch in batches.since(0):
        logits = model.eval()(batch.frames, first_masks(batch.labels, int(batch.objects.max())))
        loss = clip_loss(logits, batch.labels[:, 1:], batch.objects, config.loss, 0.0)
        values.append(loss.total.item())
    return np.mean(values)


def test_what_a_run_leaves_behind(clips, tmp_path):
    held = (
        f"held_out={{data: {{sources: [{{layout: davis, path: {clips}}}]}}, clips: 2, frames: 3, every: 2}}"
    )
    config = tiny_config(
        tmp_path / "run", clips, held, "steps=4", "overlay_every=2", "log_every=2", model="aot_tiny"
    )
    outcome = train(config)
    assert outcome == loop.Outcome(4, config.run / "model.safetensors")
    assert load_config(config.run / "config.yaml") == config
    rows = read_log(config.run)
    assert [row["step"] for row in rows] == ["2", "4"]
    assert tuple(rows[0]) == COLUMNS
    assert all(0 <= float(row["held_out_j"]) <= 1 for row in rows)
    with Image.open(config.run / "overlays" / "000002.jpg") as image:
        assert image.size == (3 * 64, 2 * 2 * 64)
    assert list((config.run / "tensorboard").glob("events.*"))
    assert not list(config.run.glob(".*"))

    averaged = models.load("aot_tiny", config.run / "checkpoint.pth")
    shipped = models.load("aot_tiny", outcome.weights)
    assert outcome.weights.stat().st_size < 8e6
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(shipped.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    tracker = Tracker(shipped)
    mask = np.zeros((64, 96), np.uint8)
    mask[10:40, 20:60] = 1
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    tracker.add(frames[0], mask)
    assert tracker.step(frames[1]).shape == (2, 64, 96)


@pytest.mark.parametrize("model", ["stcn_tiny", "aot_tiny"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(model, clips, tmp_path, finished):
    """By the clock after every step, in the middle of an epoch and of a row of the log."""
    if model == "stcn_tiny":
        whole, _ = finished
    else:
        whole = tiny_config(tmp_path / "whole", clips, "steps=5", "log_every=2", model=model)
        train(whole)
    config = tiny_config(
        tmp_path / "cut", clips, f"steps={whole.steps}", f"log_every={whole.log_every}", model=model
    )
    assert train(config, minutes=1e-9).weights is None
    for step in range(2, 4):
        assert train(config, minutes=1e-9, resume=True).step == step
    outcome = train(config, resume=True)
    columns = [name for name in COLUMNS if name != "seconds"]
    assert losses(config.run, *columns) == losses(whole.run, *columns)
    ours, expected = load_file(outcome.weights), load_file(whole.run / "model.safetensors")
    assert set(ours) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_a_killed_run_goes_on_bit_for_bit(clips, tmp_path, finished):
    whole, _ = finished
    config = tiny_config(tmp_path / "killed", clips)
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    command = [sys.executable, "-m", "vosops", "train", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    last = random.SystemRandom().randint(config.checkpoint_every, config.steps - 1)
    deadline = time.monotonic() + 240
    # A step is in the log a moment before its checkpoint is on the disk.
    there = (config.run / "checkpoint.pth").is_file
    while process.poll() is None and not (len(read_log(config.run)) >= last and there()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    errors = process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL, errors
    assert len(read_log(config.run)) >= last
    train(config, resume=True)
    assert losses(config.run) == losses(whole.run), f"killed after {last} steps"


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(clips, tmp_path):
    config = tiny_config(tmp_path / "run", clips, "batch=4")
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    module = ["-m", "tests.training.runs", str(file), str(tmp_path / "gradients.pth")]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *module], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = torch.load(tmp_path / "gradients.pth")
    alone = first_gradients(config)
    assert set(together) == set(alone)
    for name, gradient in alone.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(together[name], gradient, atol=1e-4 * scale + 1e-9, rtol=1e-4, msg=name)


def test_a_batch_is_split_in_order(clips, tmp_path):
    config = tiny_config(tmp_path / "run", clips, "batch=4", "data.clips_per_epoch=9")
    data = loop.build_dataset(config.data, frames=2, crop=64, max_objects=2, seed=0)
    whole = list(loop.Batches(data, config).since(0))
    parts = [list(loop.Batches(data, config, rank=rank, processes=2).since(0)) for rank in (0, 1)]
    assert len(whole) == config.steps
    for batch, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(batch.frames, torch.cat([half.frames for half in halves]))
    later = next(iter(loop.Batches(data, config).since(5)))
    assert torch.equal(later.frames, whole[5].frames)
    assert not torch.equal(whole[0].frames, whole[2].frames)  # another epoch


def test_the_end_of_a_stage_begins_the_next(clips, tmp_path, finished):
    _, outcome = finished
    config = tiny_config(tmp_path / "next", clips, f"model.weights={outcome.weights}")
    model, loaded = loop.build_model(config), models.load("stcn_tiny", outcome.weights)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_frozen_modules_do_not_move(clips, tmp_path):
    frozen = "model.freeze=[key_encoder.features.0, key_encoder.features.1]"
    config = tiny_config(tmp_path / "run", clips, frozen, "steps=2", "half=false", "optim.ema=null")
    torch.manual_seed(config.seed)
    before = loop.build_model(config).state_dict()
    train(config)
    after = models.load("stcn_tiny", config.run / "model.safetensors").state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not any(name.startswith(("key_encoder.features.0.", "key_encoder.features.1.")) for name in moved)
    assert "key_encoder.features.2.conv.0.0.weight" in moved


def test_bfloat16(clips, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    values = []
    for precision in ("bf16", "no"):
        config = tiny_config(tmp_path / precision, clips, f"precision={precision}", "steps=1")
        train(config)
        values.append(float(losses(config.run)[0][0]))
        AcceleratorState._reset_state(True)
    assert values[0] == pytest.approx(values[1], rel=0.03)
    assert values[0] != values[1]


def test_recomputed_blocks_change_nothing(clips, tmp_path):
    gradients = [
        first_gradients(tiny_config(tmp_path / "run", clips, f"recompute={value}")) for value in (False, True)
    ]
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


def test_an_infinite_loss_ends_the_run(clips, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", clips, "checkpoint_every=1")
    original = STCN.forward

    def overflow(self, frames, masks):
        broken.append(1)
        return original(self, frames, masks) * (float("nan") if len(broken) > 2 else 1.0)

    broken = []
    monkeypatch.setattr(STCN, "forward", overflow)
    with pytest.raises(
        loop.TrainingError, match=r"the loss of step 2 is nan; the last checkpoint in .* stays"
    ):
        train(config)
    monkeypatch.undo()
    assert train(config, resume=True).step == config.steps


@pytest.mark.parametrize(
    ("assignments", "error", "message"),
    [
        (["model.name=stmn"], ConfigError, r"model: model must be one of stm, .*stcn_tiny, .*got 'stmn'"),
        (["model.options.layers=2"], ConfigError, r"model: .*unexpected keyword argument 'layers'"),
        (
            ["model.freeze=[encoder]"],
            ConfigError,
            r"no module 'encoder'; there are key_encoder, value_encoder",
        ),
        (["crop=80"], ConfigError, r"crop must be a multiple of 32 for stcn_tiny, got 80"),
        (
            ["model.name=aot_tiny", "max_objects=11"],
            ConfigError,
            r"max_objects must be at most 10 for aot_tiny",
        ),
        (["batch=7"], ConfigError, r"batch must be at most data.clips_per_epoch, 6, got 7"),
        (["precision=fp16"], ConfigError, r"precision must be no or bf16 on a CPU, got fp16"),
        (["model.weights=none.pth"], FileNotFoundError, r"no such file: none.pth"),
        (["model.encoder_weights=none.st"], FileNotFoundError, r"encoder_weights: no such file: none.st"),
        (["data.sources.0.path=nowhere"], ValueError, r"nowhere: no such folder of training data"),
    ],
)
def test_bad_runs_do_not_begin(assignments, error, message, clips, tmp_path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    config = tiny_config(tmp_path / "run", clips, *assignments)
    with pytest.raises(error, match=message):
        train(config)
    assert not config.run.exists()
    AcceleratorState._reset_state(True)


def test_runs_that_cannot_be_gone_on_with(clips, tmp_path, finished):
    config, _ = finished
    with pytest.raises(FileExistsError, match="holds a run: go on with --resume"):
        train(config)
    with pytest.raises(FileNotFoundError, match=r"no run to go on with: .*checkpoint.pth is missing"):
        train(tiny_config(tmp_path / "none", clips), resume=True)
    changed = tiny_config(config.run, clips, "optim.lr=1e-4", "crop=96", "checkpoint_every=2")
    with pytest.raises(
        ConfigError, match=r"another configuration.*\n  optim.lr: 0.001, 0.0001\n  crop: 64, 96"
    ):
        train(changed, resume=True)
    with pytest.raises(ConfigError, match="minutes must be above 0"):
        train(config, resume=True, minutes=0)
    broken = tiny_config(tmp_path / "broken", clips)
    broken.run.mkdir()
    (broken.run / "checkpoint.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"checkpoint.pth cannot be read"):
        train(broken, resume=True)


def test_a_finished_run_stays_finished(finished):
    config, outcome = finished
    before = losses(config.run)
    assert train(replace(config, checkpoint_every=7), resume=True) == outcome
    assert losses(config.run) == before
