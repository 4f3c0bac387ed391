# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels without a GPU: the tests of tests/gpu marked `interpreter`, on CPU tensors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
# Operator -> how many of its tests run in the interpreter at least.
OPERATORS = {"aggregate": 5, "attention": 60, "identity": 1, "local_attention": 1, "memory_read": 60}


def files(operator: str) -> list[str]:
    """The test files of an operator, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"tests/gpu/test_{operator}*.py"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_in_the_interpreter(operator: str) -> None:
    """A process of its own: TRITON_INTERPRET counts only before triton is imported."""
    if not files(operator):
        pytest.skip(f"tests/gpu has no tests of {operator}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        *(sys.executable, "-m", "pytest", *files(operator)),
        *("-m", "interpreter", "-q", "-p", "no:cacheprovider"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    least = OPERATORS[operator]
    assert int(passed[1]) >= least, f"only {passed[1]} tests ran in the interpreter:\n{done.stdout}"


def test_no_file_is_left_out() -> None:
    assert sorted(name for operator in OPERATORS for name in files(operator)) == files("")
