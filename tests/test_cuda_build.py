# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile for Ampere and Hopper, without spills and with the matrix units; no GPU needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
MATCH = ("memory_read/cuda_match_half", "memory_read/cuda_match_bfloat16")
LOCAL = ("local_attention/cuda_half", "local_attention/cuda_bfloat16")
SOURCES = (*MATCH, "memory_read/cuda_gather", *LOCAL)
TARGETS = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not found:
        pytest.skip("nvcc, the CUDA compiler, is not installed")
    return found


@cache
def cuobjdump() -> str | None:
    """The toolkit's disassembler, or the one that Triton brings."""
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(beside))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, str]]:
    """(source, target) -> its cubin and what ptxas reported."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("cubins")

    def build(job: tuple[str, str]) -> tuple[Path, str]:
        source, target = job
        cubin = folder / f"{source.replace('/', '.')}.{target}.cubin"
        include = Path(torch.__file__).parent / "include"
        command = [
            compiler, "-std=c++20", "-O3", "-cubin", "-gencode", TARGETS[target], "-Xptxas", "-v",
            "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-isystem", str(include),
            "-o", str(cubin), str(ROOT / "csrc" / f"{source}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return cubin, done.stdout + done.stderr

    jobs = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(build, jobs), strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_nothing_spills(builds: dict[tuple[str, str], tuple[Path, str]], source: str, target: str) -> None:
    report = builds[source, target][1]
    kernels = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert kernels, report
    assert all(kernel == ("0", "0", "0") for kernel in kernels), report
    assert "serialized" not in report, "ptxas takes the wgmma instructions apart: " + report


def kernels_of(cubin: Path) -> dict[str, str]:
    """Mangled name -> its instructions."""
    disassembler = cuobjdump()
    if not disassembler:
        pytest.skip("cuobjdump is not installed, nor is Triton, which brings one")
    command = [disassembler, "-sass", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = (part.split("\n", 1) for part in re.split(r"Function : ", listing)[1:])
    return {name.strip(): code for name, code in parts}


def matrix_instructions(code: str) -> set[str]:
    return set(re.findall(r"\b(HG?MMA)\.", code))


@pytest.mark.parametrize(("target", "instructions"), [("sm_80", {"HMMA"}), ("sm_90a", {"HMMA", "HGMMA"})])
@pytest.mark.parametrize("source", MATCH)
def test_scores_come_from_the_matrix_units(
    builds: dict[tuple[str, str], tuple[Path, str]], source: str, target: str, instructions: set[str]
) -> None:
    kernels = kernels_of(builds[source, target][0])
    matches = {name: code for name, code in kernels.items() if "match_kernel" in name}
    assert matches
    assert set().union(*map(matrix_instructions, kernels.values())) == instructions
    for name, code in matches.items():
        group = name.split("match_kernelI")[1].split("Lb")[2][0] == "1"  # the template argument Group
        expected = {"HGMMA"} if group else {"HMMA"}
        if group and target == "sm_80":
            expected = set()  # traps; never launched
        assert matrix_instructions(code) == expected, name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", LOCAL)
def test_local_attention_multiplies_on_the_matrix_units(
    builds: dict[tuple[str, str], tuple[Path, str]], source: str, target: str
) -> None:
    kernels = kernels_of(builds[source, target][0])
    for stage in ("forward", "query", "spread", "table"):
        (code,) = (code for name, code in kernels.items() if f"local_{stage}_kernel" in name)
        assert matrix_instructions(code) == {"HMMA"}, stage
        assert "LDGSTS" in code, "no asynchronous copies"


def test_the_build_says_what_is_wrong_with_its_settings(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    cases = {
        "VOSOPS_BUILD_CUDA must be auto, 0 or 1, got 'yes'": {"VOSOPS_BUILD_CUDA": "yes"},
        "VOSOPS_BUILD_CUDA=1 builds on the CPU operators": {
            "VOSOPS_BUILD_CPU": "0",
            "VOSOPS_BUILD_CUDA": "1",
        },
    }
    for message, setting in cases.items():
        done = subprocess.run(command, cwd=ROOT, env=os.environ | setting, capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stderr
