# SPDX-License-Identifier: Apache-2.0
"""Timing and peak memory tell what they claim."""

from __future__ import annotations

import os
import time

import pytest
import torch

from benchmarks import environment, measure

CPU = torch.device("cpu")
needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell a process's peak memory"
)


def test_interleaved_takes_turns_and_rotates():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = measure.interleaved(calls, CPU, repeats=3)
    assert order == list("abcbcacab")
    assert {timing.repeats for timing in timings.values()} == {3}
    assert list(timings) == ["a", "b", "c"]


def test_times_are_milliseconds():
    timing = measure.interleaved({"sleep": lambda: time.sleep(0.02)}, CPU, repeats=3)["sleep"]
    assert 20 <= timing.p20_ms <= timing.median_ms <= timing.p80_ms < 200


def test_budget_ends_after_three_rounds():
    timings = measure.interleaved({"sleep": lambda: time.sleep(0.005)}, CPU, repeats=50, budget_s=0)
    assert timings["sleep"].repeats == 3
    assert measure.interleaved({"one": lambda: None}, CPU, repeats=1)["one"].repeats == 1
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure.interleaved({}, CPU, repeats=0)


@needs_peak
@pytest.mark.parametrize("mebibytes", [40, 200])
def test_peak_extra_memory(mebibytes):
    def call() -> torch.Tensor:
        torch.ones(mebibytes << 18)  # freed at once: only the peak shows it
        return torch.ones(10 << 18)

    measured = measure.peak_extra_bytes(call, CPU) / 2**20
    assert mebibytes - 2 <= measured <= mebibytes + 16


@needs_peak
def test_peak_is_that_of_the_call_alone():
    measure.peak_extra_bytes(lambda: torch.ones(100 << 18), CPU)
    assert measure.peak_extra_bytes(lambda: None, CPU) < 4 << 20


def test_ceilings_are_remembered():
    first = measure.ceilings(16, torch.float32, CPU, 1)
    assert first.peak >= first.product > 1e8
    assert first.copy > 1e8
    assert measure.ceilings(16, torch.float32, CPU, 1) is first


def test_environment_has_no_host_name():
    about = environment.collect(CPU)
    text = " ".join(str(value) for value in about.values())
    assert os.uname().nodename not in text.split()
    assert about["threads"] == torch.get_num_threads()
    assert about["gpu"] is None
