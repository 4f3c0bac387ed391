# SPDX-License-Identifier: Apache-2.0
"""The regression set of `make bench`: pytest-benchmark times vosops alone, release against release.

    pytest benchmarks/test_regression.py --benchmark-enable --benchmark-autosave

With --benchmark-compare --benchmark-compare-fail=median:20% it fails where a case became slower than in the
last saved run; compare runs of one quiet machine only. Every case is first held against float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .case import Settings
from .memory_read import OPERATOR

_CASES = {
    "stcn-240p-t5-o1": Settings(),
    "stcn-240p-t5-o1-dense": Settings(),
    "xmem-240p-o2": Settings(),
    "kmn-240p-t5-o1": Settings(),
    "kmn-240p-t5-o1-k50": Settings(),
    "stcn-t10-o1": Settings(),
    "cutie-fifo-o3": Settings(),
    "stcn-t5-o1": Settings(layout="position_major"),
}
_BACKWARD = ("stcn-240p-t5-o1", "stcn-240p-t5-o1-dense", "xmem-240p-o2", "kmn-240p-t5-o1", "stcn-t5-o1")
_BFLOAT16 = ("stcn-240p-t5-o1", "stcn-240p-t5-o1-dense")


@pytest.mark.parametrize("shape", _CASES)
def test_forward(benchmark: Any, shape: str) -> None:
    _run(benchmark, shape, _CASES[shape])


@pytest.mark.parametrize("shape", _BACKWARD)
def test_forward_backward(benchmark: Any, shape: str) -> None:
    _run(benchmark, shape, Settings(backward=True))


@pytest.mark.parametrize("shape", _BFLOAT16)
def test_forward_bfloat16(benchmark: Any, shape: str) -> None:
    _run(benchmark, shape, Settings(dtype="bfloat16"))


def _run(benchmark: Any, shape: str, settings: Settings) -> None:
    case = OPERATOR.case(shape, settings, 0)
    assert case.error("vosops") <= case.tolerance()
    benchmark.extra_info |= {**case.facts(), "dtype": settings.dtype, "threads": torch.get_num_threads()}
    benchmark(case.call("vosops"))
