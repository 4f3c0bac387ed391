# SPDX-License-Identifier: Apache-2.0
"""The published code itself, by its own inference loops: the same masks before and after enable().

VOSOPS_PEERS names a folder with checkouts (XMem, Cutie, STCN, STM, Mask-Propagation); without it the tests
skip. Weights are random, as equal numbers do not depend on them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# A memory that compresses and evicts within the clip.
_SMALL_LONG_TERM = {
    "xmem-long": {"mem_every": 1, "num_prototypes": 16, "max_long_term_elements": 40},
    "cutie-long": {
        "mem_every": 1,
        "long_term": {
            "count_usage": True,
            "max_mem_frames": 10,
            "min_mem_frames": 5,
            "num_prototypes": 16,
            "max_num_tokens": 60,
            "buffer_tokens": 10,
        },
    },
}


@pytest.fixture
def peers() -> Path:
    """The folder of checkouts."""
    folder = os.environ.get("VOSOPS_PEERS")
    if not folder:
        pytest.skip("VOSOPS_PEERS names no folder with checkouts of the published code")
    return Path(folder)


@pytest.mark.parametrize(
    "name", ["xmem", "xmem-long", "cutie", "cutie-long", "stcn", "stm", "mivos", "mivos-kernel"]
)
def test_masks_and_probabilities_are_those_of_the_published_code(name: str, peers: Path) -> None:
    pytest.importorskip("torchvision")
    from benchmarks.peers.checkouts import FOLDERS

    if not (peers / FOLDERS[name]).is_dir():
        pytest.skip(f"VOSOPS_PEERS has no checkout {FOLDERS[name]}")
    frames = 24 if name in _SMALL_LONG_TERM else 12
    # 60 positions in a frame: MiVOS, as published, cannot keep its top 50 of fewer.
    options: dict[str, Any] = {"--frames": frames, "--height": 96, "--width": 160, "--objects": 3}
    options |= {"--repeats": 0, "--settings": json.dumps(_SMALL_LONG_TERM.get(name, {}))}
    # A process of its own: several checkouts name their packages alike.
    command = [sys.executable, "-m", "benchmarks.dropin", "--here", "--peers", str(peers), "--model", name]
    command += [str(part) for pair in options.items() for part in pair]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["mask_agreement"] >= 0.9999
    assert row["largest_difference"] <= 1e-4
    assert row["replaced"]
    if name in _SMALL_LONG_TERM:
        most = 10 * (96 // 16) * (160 // 16) + 60
        assert row["memory_positions"] <= most
