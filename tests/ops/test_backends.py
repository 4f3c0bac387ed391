# SPDX-License-Identifier: Apache-2.0
"""Which backend serves a call: by itself, when forced, and what the report says."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vosops
from vosops.ops import backends, crossovers
from vosops.ops.memory_read import limits

from .helpers import problem


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU, as far as the choice of a backend looks."""

    @staticmethod
    def of(tensor: Tensor) -> OnGpu:
        return tensor.as_subclass(OnGpu)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


@pytest.fixture
def every_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every backend were there, on a GPU of compute capability 9.0, and none forced."""
    monkeypatch.setattr(backends, "_unavailable", lambda backend: None)
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def choose(
    dtype: torch.dtype = torch.bfloat16, *, gpu: bool = True, top_k: int | None = 20, memory: int = 1000
) -> str:
    tensors = {
        "query_key": torch.empty(1, 16, 10, dtype=dtype),
        "memory_key": torch.empty(1, 16, memory, dtype=dtype),
        "memory_value": torch.empty(1, 2, 8, memory, dtype=dtype),
    }
    if gpu:
        tensors = {name: OnGpu.of(tensor) for name, tensor in tensors.items()}
    return backends.choose(
        "memory_read", tensors, lambda backend: limits.reasons_against(backend, tensors, top_k, None)
    )


def test_by_device_and_dtype(every_backend: None) -> None:
    assert choose(gpu=False) == "cpu"
    assert choose() == "triton"
    assert choose(torch.float32) == "triton"
    assert choose(top_k=None) == "triton"


def test_what_nothing_else_serves_goes_to_the_reference(every_backend: None) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"memory_read falls back to the reference backend \(cpu: .*float64"
    ):
        assert choose(torch.float64, gpu=False) == "reference"
    with pytest.warns(RuntimeWarning, match="triton: top_k is 129, it keeps at most"):
        assert choose(top_k=129) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the same call again says nothing
        assert choose(top_k=129) == "reference"


def test_cuda_is_taken_only_where_a_measurement_says_so(
    every_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = crossovers.Crossover("memory_read", (9, 0), (torch.bfloat16,), 5000, "memory_read-stand-in.json")
    assert choose(memory=6000) == "triton"
    monkeypatch.setattr(crossovers, "MEASURED", (row,))
    assert choose(memory=6000) == "cuda"
    assert choose(memory=5000) == "cuda"
    assert choose(memory=4999) == "triton"
    assert choose(torch.float16, memory=6000) == "triton"
    assert choose(torch.float32, memory=6000) == "triton", "it cannot serve it, whatever the table says"
    assert choose(memory=6000, top_k=None) == "triton"
    assert choose(memory=6000, gpu=False) == "cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose(memory=6000) == "triton"


def test_every_crossover_names_its_benchmark() -> None:
    results = Path(vosops.__file__).parents[1] / "benchmarks" / "results"
    for row in crossovers.MEASURED:
        assert (results / row.source).is_file(), row


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_gpu_backend_never_falls_back(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    with vosops.use_backend(backend), pytest.raises(vosops.BackendError) as caught:
        vosops.memory_read(**problem("dot"))
    message = str(caught.value)
    assert f"memory_read: backend '{backend}' was asked for but cannot serve this call" in message
    assert "query_key is on cpu, the backend runs on CUDA devices" in message


def test_reasons_of_the_triton_backend(every_backend: None) -> None:
    key = OnGpu.of(torch.empty(1, 300, 500))
    crop = OnGpu.of(torch.empty(1, 8, 5, 6, 7, 8)[:, :, :-1, :-1, :-1, :-1])
    many, wide = limits.reasons_against("triton", {"memory_key": key}, 200, None)
    assert many == f"top_k is 200, it keeps at most {limits.LARGEST_TOP_K}"
    assert wide.startswith("memory_key has Ck = 300 channels, it serves at most ")
    assert limits.reasons_against("triton", {"memory_key": crop}, None, None) == [
        "memory_key has positions that take more than three strides"
    ]
    assert limits.reasons_against("triton", {"memory_key": crop[..., :1]}, None, None) == []


def test_reasons_of_the_cuda_backend(every_backend: None) -> None:
    tensors = {
        "query_key": OnGpu.of(torch.empty(1, 8, 3, dtype=torch.bfloat16)),
        "memory_key": OnGpu.of(torch.empty(1, 8, 5)),
        "memory_value": OnGpu.of(torch.empty(1, 1, 4, 5)),
    }
    dense, mixed = limits.reasons_against("cuda", tensors, None, None)
    assert dense == "it has no dense read, top_k is None"
    assert "keys must all be bfloat16 or all float16, got query_key torch.bfloat16, memory_key" in mixed
    served = {name: OnGpu.of(tensor.bfloat16()) for name, tensor in tensors.items()}
    assert limits.reasons_against("cuda", served, 3, None) == []
    (prior,) = limits.reasons_against("cuda", served, 3, vosops.KernelPrior())
    assert "KernelPrior" in prior
    odd = {**served, "memory_key": OnGpu.of(torch.empty(1, 9, 5, dtype=torch.bfloat16))}
    (channels,) = limits.reasons_against("cuda", odd, 3, None)
    assert channels == "memory_key has Ck = 9, it serves multiples of 8"


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    report = vosops.backend_report()
    assert set(report) == set(backends.BACKENDS)
    assert report["reference"] == "available"
    for text in report.values():
        assert text.startswith(("available", "not available: "))
    monkeypatch.setattr(backends, "_unavailable", lambda backend: None)
    monkeypatch.setattr(backends, "interpreted", lambda: True)
    assert vosops.backend_report()["triton"] == "available (interpreted, on CPU tensors)"
    if not crossovers.MEASURED:
        assert vosops.backend_report()["cuda"] == "available when forced: not measured against triton yet"
    row = crossovers.Crossover("memory_read", (9, 0), (torch.bfloat16,), 5000, "memory_read-stand-in.json")
    monkeypatch.setattr(crossovers, "MEASURED", (row,))
    assert vosops.backend_report()["cuda"] == "available"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_no_gpu_is_a_reason() -> None:
    code = "import vosops; r = vosops.backend_report(); print(r['triton']); print(r['cuda'])"
    done = run_python(code, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith("not available: ")


def test_importing_vosops_imports_no_more_than_torch_does() -> None:
    listing = "print(sorted({m.partition('.')[0] for m in sys.modules} - sys.stdlib_module_names))"
    before = run_python(f"import sys, torch; {listing}").stdout
    after = run_python(f"import sys, vosops; {listing}")
    assert after.returncode == 0, after.stderr
    assert set(eval(after.stdout)) - set(eval(before)) == {"vosops"}


def test_the_gpu_kernels_are_imported_by_their_first_call() -> None:
    code = (
        "import sys, torch, vosops\n"
        "q, k, v = torch.randn(1, 4, 5), torch.randn(1, 4, 6), torch.randn(1, 1, 3, 6)\n"
        "vosops.memory_read(q, k, v, top_k=2)\n"
        "print([m for m in sys.modules if 'vosops' in m and 'triton' in m], 'triton' in sys.modules)\n"
    )
    done = run_python(code)
    assert done.stdout.strip() == "[] False", done.stderr
