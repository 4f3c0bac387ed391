# SPDX-License-Identifier: Apache-2.0
"""AOT and DeAOT against numbers of the public reference implementation: features, memories, every frame."""

import pytest
import torch

from tests.models.weights import Golden, fill
from vosops.models import SessionSettings, create
from vosops.propagate import Tracker

NAMES = {
    "AOTT": "aott",
    "AOTS": "aots",
    "R50_AOTL": "r50_aotl",
    "SwinB_AOTL": "swinb_aotl",
    "R50_DeAOTL": "r50_deaotl",
}


class Run:
    """The published loop through the tracker: what the network computed, and the results per frame."""

    def __init__(self, file, name):
        self.golden = Golden(file)
        self.model = fill(create(name), self.golden.config)
        arrays, official = self.golden.arrays, self.golden.config["official"]
        gap = official["TEST_LONG_TERM_MEM_GAP"]
        new = {frame: int(i) for i, frame in official["new_objects"].items()}
        self.passes, self.logits, self.attentions = [], [], {}
        handles = [
            self.model.LSTT.register_forward_hook(lambda m, i, out: self.passes.append(out)),
            self.model.decoder.register_forward_hook(lambda m, i, out: self.logits.append(out)),
        ]
        for index, layer in enumerate(self.model.LSTT.layers):
            for part in ("long_term", "short_term"):
                note = self._note(f"{part}_last_layer{index}")
                handles.append(getattr(layer, f"{part}_attn").register_forward_hook(note))
        self.tracker = Tracker(self.model, SessionSettings(memory_every=gap))
        frames = arrays["frames"]
        self.tracker.add(frames[0], arrays["mask0"])
        self.probabilities, self.memory, self.first, self.attention = [], [], None, []
        for t in range(1, len(frames)):
            self.tracker.step(frames[t])
            session = self.tracker._session
            if self.first is None:  # the memory of the first frame is written with the second
                self.first = [bank.groups[0] for bank in session._groups[0].long]
                self.first = [(g.key.clone(), g.value.clone()) for g in self.first]
            self.memory.append(len(session._groups[0].long[0]))
            if t in new:
                self.tracker.add(frames[t], arrays["new_mask"])
            self.probabilities.append(self.tracker.probabilities)
        for handle in handles:
            handle.remove()

    def _note(self, name):
        def hook(module, inputs, output):
            self.attentions[name] = output

        return hook

    def check_strided(self, prefix, ours):
        """Tokens (1, N, C) against the array of the prefix, (N, 1, C) with every n-th channel kept."""
        (name,) = [key for key in self.golden.arrays if key.rpartition("_s2x")[0] == prefix]
        self.golden.check(name, ours.transpose(0, 1)[..., :: int(name.rpartition("x")[2])])


@pytest.fixture(scope="module", params=list(NAMES))
def run(request):
    return Run(request.param, NAMES[request.param])


def test_features(run):
    golden = run.golden
    pixels = torch.from_numpy(golden.arrays["frames"][0]).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        features = run.model.encode(run.model.prepare(pixels))
        maps = {f"encoder_{s}x": x for s, x in zip((4, 8, 16), features.shortcuts, strict=True)}
        maps["projected"] = features.tokens.mT.unflatten(2, features.size)
        for name in golden.arrays:
            base, _, kept = name.partition("_frame0_s1x")
            if base in maps:
                ours = maps[base][:, :: int(kept)]
                step = -(-ours.shape[2] // golden.arrays[name].shape[2])
                golden.check(name, ours[..., ::step, ::step])
        labels = golden["mask0"].long()[None]
        run.check_strided("identity_frame0", run.model.embed(labels, features))


def test_memory_of_the_first_frame(run):
    for layer, (key, value) in enumerate(run.first):
        run.check_strided(f"memory_k_frame0_layer{layer}", key.flatten(2).mT)
        value = value[:, 0].flatten(2).mT
        branches = ("v", "idv") if "DeAOT" in type(run.model).__name__ else ("v",)
        for name, part in zip(branches, value.chunk(len(branches), 2), strict=True):
            run.check_strided(f"memory_{name}_frame0_layer{layer}", part)


def test_transformer(run):
    assert len(run.attentions) == 2 * len(run.model.LSTT.layers)
    for name, ours in run.attentions.items():
        run.check_strided(name, ours)
    for frame, (outputs, _) in (("frame0", run.passes[0]), ("last", run.passes[-1])):
        # DeAOT's decoder gets the last layer alone.
        layers = len(run.model.LSTT.layers)
        for layer, ours in zip(range(layers - len(outputs), layers), outputs, strict=True):
            run.check_strided(f"lstt_{frame}_layer{layer}", ours)


def test_every_frame(run):
    golden = run.golden
    labels = golden.arrays["labels"]
    for t, ours in enumerate(run.probabilities, 1):
        assert (ours.argmax(0).numpy() == labels[t]).all(), f"labels of frame {t}"
    golden.check("prob_last", run.probabilities[-1])
    expected, given = golden["logits4"], golden.config["official"]["num_objects"]
    atol = golden.config["noise"]["logits4"]["atol"]
    for t, ours in enumerate(run.logits):
        present = ~expected[t, :, 0, 0].isnan()
        torch.testing.assert_close(
            ours[0, : 1 + given][present], expected[t][present], atol=atol, rtol=1e-4, msg=f"frame {t + 1}"
        )
    assert len(run.logits) == len(expected)


def test_memory_grows_as_published(run):
    assert run.memory == run.golden.config["run"]["memory_frames"]


def test_twelve_objects_take_two_passes():
    run = Run("AOTT_12_objects", "aott")
    golden = run.golden
    assert run.tracker.object_ids == list(range(1, 13))
    assert [group.given for group in run.tracker._session._groups] == [10, 2]
    labels = golden.arrays["labels"]
    for t, ours in enumerate(run.probabilities, 1):
        assert (ours.argmax(0).numpy() == labels[t]).all(), f"labels of frame {t}"
    golden.check("prob_last", run.probabilities[-1])
    for group in range(2):
        name = f"logits4_group{group}"
        golden.check(name, torch.cat(run.logits[group::2])[:, : golden[name].shape[1]])
