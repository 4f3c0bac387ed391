# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes

import pytest

from . import emulation, local_emulation


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulation.library(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(scope="session")
def built_local(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return local_emulation.library(tmp_path_factory.mktemp("local_emulation"))
