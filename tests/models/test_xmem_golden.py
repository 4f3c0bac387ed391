# SPDX-License-Identifier: Apache-2.0
"""XMem against the public implementation: names and shapes of its weights, reads and usage of its memory."""

import json

import pytest
import torch

from tests.models.weights import GOLDEN, Golden
from vosops.memory.long_term import LongTermMemory
from vosops.models.xmem import XMem
from vosops.ops.memory_read import memory_gather, memory_match


def test_names_and_shapes_are_those_of_the_checkpoint():
    ours = {name: list(value.shape) for name, value in XMem().state_dict().items()}
    assert ours == json.loads((GOLDEN / "state_dicts" / "XMem.json").read_text())


@pytest.mark.parametrize("case", ["case0", "case1", "case2", "case4"])
def test_memory_reads_the_golden_numbers(case):
    """Read and usage through LongTermMemory; no shrinkage is r = 1, no selection is e = 1 but for a constant.

    case3 (shrinkage without selection) is no read of XMem's memory: tests/ops/test_golden.py has it.
    """
    golden = Golden("ops_memory_read_xmem")
    config = golden.config["cases"][case]["params"]

    def load(name):
        return golden[f"{case}.{name}"]

    for top_k, suffix in ((config["top_k"], ""), (None, "_no_top_k")):
        reads, usages = [], []
        for row in range(config["B"]):
            key, value, query = (
                load(name)[row : row + 1] for name in ("memory_key", "memory_value", "query_key")
            )
            shrinkage = (
                load("shrinkage")[row : row + 1] if config["shrinkage"] else torch.ones_like(key[:, :1])
            )
            selection = load("selection")[row : row + 1] if config["selection"] else torch.ones_like(query)
            memory = LongTermMemory()
            for t in range(config["T"]):
                memory.append(t, key[:, :, t], value[:, None, :, t], [1], shrinkage[:, :, t], selection)
            reads.append(memory.read(query, selection, top_k=top_k)[:, 0])
            usages.append(memory.usage[None])
        golden.check(f"{case}.read{suffix}", torch.cat(reads))
        golden.check(f"{case}.usage{suffix}", torch.cat(usages))


@pytest.mark.parametrize("case", [f"case{i}" for i in range(5)])
def test_match_and_gather_read_the_golden_numbers(case):
    golden = Golden("ops_memory_read_xmem")
    config = golden.config["cases"][case]["params"]
    operands = {name: golden[f"{case}.{name}"] for name in ("shrinkage", "selection") if config[name]}
    match = memory_match(
        golden[f"{case}.query_key"],
        golden[f"{case}.memory_key"],
        similarity="l2",
        top_k=config["top_k"],
        **operands,
    )
    golden.check(f"{case}.read", memory_gather(match, golden[f"{case}.memory_value"][:, None])[:, 0])
