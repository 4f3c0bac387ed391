# SPDX-License-Identifier: Apache-2.0
"""What an installation says when the compiled operators cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build(tmp_path: Path, choice: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext` on a machine without a compiler, into a folder of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment |= {"PATH": str(tmp_path / "nothing"), "VOSOPS_BUILD_CPU": choice}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_compiler_it_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    done = build(tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert "installing without compiled operators: no C++ compiler found" in done.stderr
    assert "apt-get install g++" in done.stderr


def test_asked_for_it_fails(tmp_path: Path) -> None:
    done = build(tmp_path, "1")
    assert done.returncode != 0
    assert "no C++ compiler found" in done.stderr


@pytest.mark.parametrize("choice", ["yes", "2"])
def test_unknown_choice(tmp_path: Path, choice: str) -> None:
    done = build(tmp_path, choice)
    assert done.returncode != 0
    assert f"VOSOPS_BUILD_CPU must be auto, 0 or 1, got '{choice}'" in done.stderr
