# SPDX-License-Identifier: Apache-2.0
"""The deterministic weights behind tests/golden, from the names and shapes of a state dict alone.

An entry NAME of shape S is drawn as standard_normal(S) of a generator seeded by crc32(NAME), then
scaled as `value` says.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from vosops.models import MODELS

GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {(info.target, info.options.get("block")): name for name, info in reversed(MODELS.items())}.values()
"""The first registered model of each kind; the others differ in encoder and depth."""


class Golden:
    """One golden file: its arrays by name, and its configuration."""

    def __init__(self, name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files if key != "config"}
            self.config = json.loads(str(file["config"]))

    def __getitem__(self, name):
        """An array as a tensor."""
        return torch.from_numpy(self.arrays[name])

    def check(self, name, ours, relative=1e-4):
        """`ours` (already strided as the name's suffix says) against the array, within its own tolerance."""
        expected = self[name]
        assert ours.shape == expected.shape, f"{name}: {tuple(ours.shape)}, not {tuple(expected.shape)}"
        atol = self.config["noise"][name]["atol"]
        torch.testing.assert_close(
            ours, expected, atol=atol, rtol=relative, equal_nan=True, msg=name_of(name)
        )


def name_of(name):
    return lambda message: f"{name}: {message}"


def value(name, shape, gain=1.0, boost=None):
    """What the rule puts into the entry `name`."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if name.endswith("running_mean"):
        return 0.1 * drawn
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(drawn)
    if len(shape) <= 1:
        return 1 + 0.1 * drawn if name.endswith("weight") else 0.02 * drawn
    louder = math.prod(factor for part, factor in (boost or {}).items() if part in name)
    return gain * louder / math.sqrt(math.prod(shape[1:])) * drawn


def fill(model, config=None):
    """Puts the rule's weights into `model`; the entries of config["keep"] stay as they are."""
    config = config or {"gain": 1.0}
    state = {}
    for name, old in model.state_dict().items():
        if any(part in name for part in config.get("keep", ())):
            state[name] = old
        else:
            drawn = value(name, tuple(old.shape), config["gain"], config.get("boost"))
            state[name] = torch.from_numpy(np.asarray(drawn)).to(old.dtype)
    model.load_state_dict(state)
    return model.eval()
