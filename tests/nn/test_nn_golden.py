# SPDX-License-Identifier: Apache-2.0
"""The transformer's modules against numbers of the public reference code (tests/golden/README.md)."""

import numpy as np
import pytest
import torch

from tests.models.weights import Golden, value
from vosops.nn import (
    GatedPropagation,
    GatedPropagationBlock,
    IdentityBank,
    LocalGatedPropagation,
    LSTTBlock,
    LSTTBlockV2,
    Memory,
    Read,
    SelfGatedPropagation,
    ShortTermAttention,
    sine_position,
)


def filled(module, case):
    """The weights of a case in a module whose state dict has the same names and shapes."""
    weights = case["weights"]
    shapes = {name: list(x.shape) for name, x in module.state_dict().items()}
    assert shapes == weights["state_dict"]
    drawn = {
        name: torch.from_numpy(np.asarray(value(name, shape, weights["gain"], weights["boost"])))
        for name, shape in shapes.items()
    }
    module.load_state_dict(drawn)
    return module.eval()


def tokens(golden, name):
    """(N, B, C) of the published code as (B, N, C)."""
    return golden[name].transpose(0, 1)


class Steps:
    """Three frames through one block: a reference frame, one that reads it, one that reads both."""

    def __init__(self, golden, case, block):
        self.golden, self.case, self.block = golden, golden.config["cases"][case], block
        self.name = case
        params = self.case["params"]
        self.size = (params["h"], params["w"])

    def input(self, name):
        return tokens(self.golden, self.case["inputs"][name])

    def check(self, name, ours):
        array = self.case["outputs"][name]
        expected = self.golden[array]
        # Short-term memories are maps there.
        ours = ours.mT.unflatten(2, self.size) if expected.dim() == 4 else ours.transpose(0, 1)
        self.golden.check(array, ours)

    def check_memory(self, frame, memory):
        branches = memory.value.chunk(1 + self.name.startswith("gpm"), 2)
        names = ("memory_k", "memory_v", "memory_id_v")
        for name, ours in zip(names, (memory.key, *branches), strict=False):
            if f"{name}{frame}" in self.case["outputs"]:
                self.check(f"{name}{frame}", ours)


def joined(new, old):
    return Memory(*(torch.cat(pair, 1) for pair in zip(new, old, strict=True)))


@pytest.mark.parametrize(("case", "kind"), [("lstt_v1", LSTTBlock), ("lstt_v2", LSTTBlockV2)])
def test_lstt_blocks(case, kind):
    golden = Golden("ops_propagation_layers")
    steps = Steps(golden, case, filled(kind(64, 8), golden.config["cases"][case]))
    options = {"size": steps.size, "position": steps.input("pos")}
    block = steps.block
    with torch.no_grad():
        out, current = block(steps.input("x0"), None, steps.input("id0"), **options)
        first = block.memorise(current, steps.input("id0"))
        steps.check("out0", out)
        steps.check_memory(0, first)
        out, current = block(steps.input("x1"), Read(first, first), None, **options)
        second = block.memorise(current, steps.input("id1"))
        steps.check("out1", out)
        steps.check_memory(1, second)
        out, _ = block(steps.input("x0"), Read(joined(second, first), second), None, **options)
        steps.check("out2", out)


@pytest.mark.parametrize("layer", [0, 1])
def test_gated_propagation_blocks(layer):
    golden, case = Golden("ops_propagation_layers"), f"gpm_layer{layer}"
    block = filled(GatedPropagationBlock(64, first=layer == 0), golden.config["cases"][case])
    steps = Steps(golden, case, block)
    branches = [steps.input(f"t{i}") if layer else None for i in range(2)]

    def run(frame, read, identity=None):
        return block(steps.input(f"x{frame}"), branches[frame], read, identity, size=steps.size)

    def check(step, out, branch):
        steps.check(f"out{step}", out)
        steps.check(f"out_id{step}", branch)

    with torch.no_grad():
        *out, current = run(0, None, steps.input("id0"))
        first = block.memorise(current, steps.input("id0"))
        check(0, *out)
        steps.check_memory(0, first)
        *out, current = run(1, Read(first, first))
        second = block.memorise(current, steps.input("id1"))
        check(1, *out)
        steps.check_memory(1, second)
        *out, _ = run(0, Read(joined(second, first), second))
        check(2, *out)


@pytest.mark.parametrize("case", ["global_plain_4x5", "global_plain_6x9", "global_top_k_6x9"])
def test_gated_propagation(case):
    golden = Golden("ops_gated_propagation")
    entry = golden.config["cases"][case]
    params, names = entry["params"], entry["inputs"]
    module = filled(GatedPropagation(128, 64), entry)
    with torch.no_grad():
        inputs = [tokens(golden, names[name]) for name in "QKVU"]
        out = module(*inputs, (params["h"], params["w"]), params.get("top_k"))
    golden.check(entry["outputs"]["out"], out.transpose(0, 1))


@pytest.mark.parametrize("case", ["global_self_4x5", "global_self_6x9", "global_self_heads_6x9"])
def test_self_gated_propagation(case):
    golden = Golden("ops_gated_propagation")
    entry = golden.config["cases"][case]
    params = entry["params"]
    module = filled(SelfGatedPropagation(32, params["d_att"], params["num_head"]), entry)
    query, values, gate = (tokens(golden, entry["inputs"][name]) for name in "QVU")
    if not (torch.equal(query, values) and torch.equal(query, gate)):
        # The published module takes three inputs; a block gives it one.
        module.linear_QK.register_forward_pre_hook(lambda *_: (query,))
        gates = iter(gate.chunk(2, 2))
        for linear in (module.linear_U1, module.linear_U2):
            part = next(gates)
            linear.register_forward_pre_hook(lambda *_, part=part: (part,))
    with torch.no_grad():
        out = module(*values.chunk(2, 2), (params["h"], params["w"]))
    golden.check(entry["outputs"]["out"], out.transpose(0, 1))


@pytest.mark.parametrize("case", ["local_plain_4x5", "local_plain_6x9"])
def test_local_gated_propagation(case):
    golden = Golden("ops_gated_propagation")
    entry = golden.config["cases"][case]
    params = entry["params"]
    size = params["h"], params["w"]
    module = filled(LocalGatedPropagation(params["d_att"], 128, 64, params["num_head"]), entry)
    query, key, values = (golden[entry["inputs"][n]].flatten(2).transpose(1, 2) for n in "qkv")
    gate = golden[entry["inputs"]["u"]]
    gate = gate.flatten(2).transpose(1, 2) if gate.dim() == 4 else gate.transpose(0, 1)
    with torch.no_grad():
        out = module(query, key, values, gate, size)
    golden.check(entry["outputs"]["out"], out.transpose(0, 1))


def test_short_term_attention():
    golden = Golden("ops_local_attention")
    for case, entry in golden.config["cases"].items():
        params = entry["params"]
        if "use_linear" in case or "use_dis" in case or "_V2" not in case:
            continue
        window = 2 * params["max_dis"] + 1
        module = filled(ShortTermAttention(params["d_model"], params["num_head"], window), entry)
        with torch.no_grad():
            out = module(*(golden[entry["inputs"][name]] for name in "qkv"))
        golden.check(entry["outputs"]["out"], out.transpose(0, 1))


@pytest.mark.parametrize("case", ["aot_33x81", "aot_49x65", "aot_unaligned_48x64"])
def test_identity_bank(case):
    golden = Golden("ops_identity")
    entry = golden.config["cases"][case]
    bank = IdentityBank(10, 256, aligned="unaligned" not in case)
    prefix = "patch_wise_id_bank."
    weights = {"state_dict": {}, **entry["weights"]}
    bank.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(value(name, shape, weights["gain"], weights["boost"]))
            for name, shape in weights["state_dict"].items()
        }
    )
    labels, soft = (golden[entry["inputs"][name]] for name in ("labels", "soft"))
    size = golden[entry["outputs"]["embedding"]].shape[1:]
    with torch.no_grad():
        for name, mask in (("embedding", labels), ("embedding_soft", soft)):
            mask = mask[None] if mask.dim() == (2 if name == "embedding" else 3) else mask
            golden.check(entry["outputs"][name], bank(mask)[0].T.unflatten(1, size))


def test_sine_position():
    golden = Golden("ops_identity")
    params = golden.config["cases"]["position"]["params"]
    size = params["h"], params["w"]
    ours = sine_position(size, 256, torch.device("cpu"))
    golden.check("position.embedding", ours[0].T.unflatten(1, size))
