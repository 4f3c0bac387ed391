# SPDX-License-Identifier: Apache-2.0
"""STM against numbers of the public reference implementation: names, intermediates, loop, memory growth."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from vosops.models.session import SessionSettings
from vosops.models.stm import STM
from vosops.propagate.tracker import Tracker

from .weights import GOLDEN, Golden, fill


def _record(module: nn.Module) -> list[tuple[Any, Any]]:
    """Arguments and results of every later call."""
    calls: list[tuple[Any, Any]] = []
    module.register_forward_hook(lambda _, given, result: calls.append((given, result)))
    return calls


def test_names_and_shapes_are_the_published_ones() -> None:
    published = json.loads((GOLDEN / "state_dicts" / "STM.json").read_text())
    assert {name: list(entry.shape) for name, entry in STM().state_dict().items()} == published


def test_stm_repeats_the_published_loop() -> None:
    golden = Golden("STM")
    model = fill(STM(), golden.config)
    memory_maps, memory_pairs = _record(model.Encoder_M), _record(model.KV_M_r4)
    query_maps, query_pairs = _record(model.Encoder_Q), _record(model.KV_Q_r4)
    decoded = _record(model.Decoder)

    tracker = Tracker(model, SessionSettings(memory_every=golden.config["official"]["Mem_every"]))
    frames = golden.arrays["frames"]
    tracker.add(frames[0], golden.arrays["mask0"])
    results = torch.stack([tracker.step(frame) for frame in frames[1:]])

    golden.check("encoder_m_r4_frame0_s1x32", memory_maps[0][1].f16[:, ::32])
    golden.check("memory_key_frame0_s1x4", memory_pairs[0][1][0][:, ::4])
    golden.check("memory_value_frame0_s1x16", memory_pairs[0][1][1][:, ::16])
    golden.check("encoder_q_r4_frame1_s1x32", query_maps[1][1].f16[:, ::32])
    golden.check("query_key_last_s1x4", query_pairs[-1][1][0][:, ::4])
    golden.check("read_last_s1x16", decoded[-1][0][0][:, :512:16])
    golden.check("logits4", torch.stack([logits for _, logits in decoded]))
    golden.check("prob_half", results[..., ::2, ::2])
    golden.check("prob_last", results[-1])
    # Two pixels differ between the reference's own runs in float32 and float64.
    assert int((results.argmax(1) != golden["labels"][1:]).sum()) <= 4

    state = tracker.state_dict()["memory"]
    assert [bank["frames"] for bank in state["banks"].values()] == [[0, 2, 4, 6]] * 3
    assert golden.config["run"]["memory_frames_last"] == 4
