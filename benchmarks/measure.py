# SPDX-License-Identifier: Apache-2.0
"""Timing, peak memory and the machine's ceilings, on the CPU and on CUDA devices."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

Call = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_FLUSH_BYTES = 256 << 20  # several times the last-level cache of current GPUs


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call over `repeats` calls: the median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run.

    Args:
        product: operations/s of torch.mm over the shape's key channels, result in cache.
        peak: on the CPU the same or, where it is faster, of a convolution, which torch gives to another
            library (the one behind torch.mm leaves half of some CPUs' vector width unused), in this dtype or
            in float32. On CUDA a square torch.mm of side 8192; in float32 the better of it as torch is set
            and a third of its tf32 rate, as three tf32 passes make a float32 product.
        copy: bytes/s, read plus written, of a copy larger than the caches.
    """

    product: float
    peak: float
    copy: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was asked of it; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Call], device: torch.device, *, repeats: int, budget_s: float = 12.0
) -> dict[str, Timing]:
    """Time every call in turn, round after round, so that a disturbance of the machine meets them all.

    The order rotates from round to round. On CUDA, events take the time and a write larger than the L2
    cache precedes every call.

    Args:
        calls: name -> what to time; already warmed up.
        repeats: rounds.
        budget_s: once spent, no further round begins; three rounds (or `repeats`) always run.

    Returns:
        name -> Timing, in the order of `calls`.

    Raises:
        ValueError: repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    names, samples = list(calls), {name: list[float]() for name in calls}
    begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for round_ in range(repeats):
            if round_ >= 3 and time.perf_counter() - begin > budget_s:
                break
            turn = round_ % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                samples[name].append(_time_once(calls[name], device))
    finally:
        gc.enable()
    return {name: _timing(times) for name, times in samples.items()}


def _time_once(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6


def _timing(times: list[float]) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], 1)
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return Timing(statistics.median(times), cuts[1], cuts[7], len(times))


def captured(call: Call) -> tuple[Call, object]:
    """A CUDA graph of `call`, to be timed without what launching costs.

    Args:
        call: already warmed up; must not wait for the GPU.

    Returns:
        (replay, the graph's result, which replaying fills anew and which keeps its memory).

    Raises:
        RuntimeError: the call does something that a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that one call held beyond what was held before it, its result included.

    On CUDA the allocator counts. On Linux it is the peak of the resident set (VmHWM, reset through
    /proc/self/clear_refs) less the resident set before; None where the system does not tell. Scratch
    that a call keeps for the next one, like a BLAS buffer, is counted only by its first call: warm up.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    if not (_STATUS.exists() and os.access(_CLEAR_REFS, os.W_OK)):
        return None
    _trim_heap()
    _CLEAR_REFS.write_text("5")
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _trim_heap() -> None:
    """Give freed pages back to the system: pages that malloc keeps would hide a new allocation."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no field {field}")
    return int(found[1]) * 1024


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated now without swapping; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.M) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


@cache
def ceilings(key_channels: int, dtype: torch.dtype, device: torch.device, threads: int) -> Ceilings:
    """Measure the ceilings for scores over `key_channels` in `dtype`; a second or two, then remembered.

    The product is (n, Ck) x (Ck, m), best of a few n, m; the convolution 3x3 over 256 channels of 32x32.

    Args:
        threads: torch.get_num_threads(); part of what is remembered.
    """
    cuda = device.type == "cuda"
    best = 0.0
    sides = ((1024, 4096), (2048, 8192)) if cuda else ((128, 512), (256, 1024), (512, 1024), (1024, 2048))
    for rows, columns in sides:
        left = torch.randn(rows, key_channels, device=device).to(dtype)
        right = torch.randn(key_channels, columns, device=device).to(dtype)
        result = torch.empty(rows, columns, device=device, dtype=dtype)
        seconds = _best_seconds(lambda a=left, b=right, out=result: torch.mm(a, b, out=out), device)  # type: ignore[misc]
        best = max(best, 2 * rows * columns * key_channels / seconds)
    if cuda:
        return Ceilings(best, max(best, _square_rate(dtype, device)), _copy_rate(2 << 30, device))
    peak = max(best, _convolution_rate(dtype))
    if dtype != torch.float32:  # a kernel may widen what the machine has no instructions for
        peak = max(peak, ceilings(key_channels, torch.float32, device, threads).peak)
    return Ceilings(best, peak, _copy_rate(256 << 20, device))


@cache
def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _convolution_rate(dtype: torch.dtype) -> float:
    image = torch.randn(1, 256, 32, 32).to(dtype)
    weight = torch.randn(256, 256, 3, 3).to(dtype)
    with torch.no_grad():
        seconds = _best_seconds(lambda: F.conv2d(image, weight, padding=1), torch.device("cpu"))
    return 2 * image.numel() * weight[0].numel() / seconds


@cache
def _square_rate(dtype: torch.dtype, device: torch.device, side: int = 8192) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def rate() -> float:
        return 2 * side**3 / _best_seconds(lambda: torch.mm(left, right), device)

    if dtype != torch.float32:
        return rate()
    plain, before = rate(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return max(plain, rate() / 3)
    finally:
        torch.set_float32_matmul_precision(before)


def _best_seconds(call: Call, device: torch.device) -> float:
    """Seconds of the fastest of several batches of calls; a ceiling wants the undisturbed one."""
    call()
    synchronize(device)
    best = float("inf")
    for _ in range(8):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e4)
            continue
        count, begin = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < 0.02:
            call()
            count += 1
        best = min(best, (time.perf_counter() - begin) / count)
    return best
