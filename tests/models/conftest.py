# SPDX-License-Identifier: Apache-2.0
"""All tests of models run on one thread: frames this small gain nothing from more."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def on_one_thread(one_thread: None) -> None:
    """All tests of models."""
