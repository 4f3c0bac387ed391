# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vosops
from vosops.ops import backends


def _usable_isas() -> list[str]:
    build = backends.build_module()
    return build.cpu_isas() if build else ["as built"]


@pytest.fixture(params=_usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for every instruction set this CPU has, by forcing it."""
    build = backends.build_module()
    if build is None:
        yield request.param
        return
    before = build.cpu_isa()
    build.set_cpu_isa(request.param)
    yield request.param
    build.set_cpu_isa(before)


@pytest.fixture
def cpu_backend() -> Iterator[None]:
    """Forces the compiled CPU backend, so that no test passes on the reference by accident."""
    reasons = backends.reasons_against("cpu", {})
    if reasons:
        pytest.skip(f"the cpu backend is not available: {'; '.join(reasons)}")
    with vosops.use_backend("cpu"):
        yield


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    """Uninitialised tensors are filled with NaN, so that an output that is not written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real clips: VOSOPS_DATA, or ../shared/data beside the project."""
    root = Path(os.environ.get("VOSOPS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"real clips are absent (VOSOPS_DATA, {root.name})")
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Frames as small as those of tests gain nothing from more, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
