# SPDX-License-Identifier: Apache-2.0
"""What only AOT's training has: identities, memories written with given labels, the first frame's loss."""

import pytest
import torch

from tests.models.weights import fill
from tests.training.runs import tiny_config, write_clips
from vosops.models import create
from vosops.models.aot import Supervision
from vosops.training import loop

PLAIN = torch.tensor([[1, 2], [1, 2]])


@pytest.fixture(scope="module")
def model():
    return fill(create("aot_tiny"), {"gain": 0.9, "boost": {"patch_wise_id_bank": 8.0}})


@pytest.fixture(scope="module")
def clips():
    """Frames (2, 4, 3, 49, 65), first masks of two objects, labels; the second clip has one object."""
    torch.manual_seed(0)
    frames = torch.rand(2, 4, 3, 6, 8).repeat_interleave(9, 3).repeat_interleave(9, 4)[..., :49, :65]
    labels = torch.zeros(2, 4, 49, 65, dtype=torch.uint8)
    for t in range(4):
        labels[:, t, 8 + 3 * t : 30 + 3 * t, 8:30] = 1
        labels[0, t, 20:45, 34:60] = 2
    masks = torch.stack([labels[:, 0] == i for i in (1, 2)], 1).float()
    return frames, masks, labels


def run(model, clips, **options):
    frames, masks, _ = clips
    given = {"objects": torch.tensor([2, 2]), "identities": PLAIN} | options
    with torch.no_grad():
        return model(frames, masks, Supervision(**given))


def test_plain_supervision_changes_nothing(model, clips):
    frames, masks, _ = clips
    with torch.no_grad():
        expected = model(frames, masks)
    assert torch.equal(run(model, clips), expected)
    with_first = run(model, clips, reference=True)
    assert with_first.shape == (2, 4, 3, 49, 65)
    assert torch.equal(with_first[:, 1:], expected)


def test_an_identity_is_only_a_name(model, clips):
    """Objects that take other identities are as before in a model whose identities are exchanged likewise."""
    expected = run(model, clips)
    exchanged = create("aot_tiny")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    order = [0, 3, 7, *(i for i in range(1, 11) if i not in (3, 7))]  # new channel 1 is old channel 3
    state["patch_wise_id_bank.weight"] = state["patch_wise_id_bank.weight"][:, order]
    for name in ("weight", "bias"):
        state[f"decoder.conv_out.{name}"] = state[f"decoder.conv_out.{name}"][order]
    exchanged.load_state_dict(state)
    ours = run(model, clips, identities=torch.tensor([[3, 7], [3, 7]]))
    torch.testing.assert_close(ours, run(exchanged, clips), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, expected, atol=1e-2)
    # Each clip has its own.
    mixed = run(model, clips, identities=torch.tensor([[3, 7], [1, 2]]))
    torch.testing.assert_close(mixed[0], ours[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], expected[1], atol=1e-4, rtol=1e-4)


def test_objects_that_are_not_there(model, clips):
    logits = run(model, clips, objects=torch.tensor([2, 1]))
    assert (logits[1, :, 2] == -1e4).all()
    assert (logits[0] > -1e4).all()
    frames, masks, _ = clips
    with torch.no_grad():
        alone = model(frames[1:], masks[1:, :1])
    torch.testing.assert_close(logits[1, :, :2], alone[0], atol=1e-4, rtol=1e-4)


def test_memories_with_given_labels(model, clips):
    """Given what it predicted itself, the model predicts the same; given the truth, something else."""
    predicted = run(model, clips)
    labels = torch.cat((clips[2][:, :1], predicted.argmax(2).to(torch.uint8)), 1)
    torch.testing.assert_close(run(model, clips, labels=labels), predicted, atol=1e-4, rtol=1e-4)
    void = torch.where(clips[2] == 0, torch.tensor(255, dtype=torch.uint8), clips[2])
    for other in (clips[2], void):
        given = run(model, clips, labels=other)
        torch.testing.assert_close(given[:, 0], predicted[:, 0])  # nothing was remembered before it
        assert not torch.allclose(given[:, 1], predicted[:, 1], atol=1e-2)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    config = tiny_config(
        folder / "run", folder, "aot.reference=0.5", "aot.sequential_from=0.5", model="aot_tiny"
    )
    return loop._Run(config, False, loop.Console(quiet=True))


def test_phases_of_the_training(begun, monkeypatch):
    """True labels and the first frame in the first half; predictions and a fixed bank in the second."""
    calls = []
    original = type(begun.model).forward

    def spy(self, frames, masks, supervision):
        calls.append(supervision)
        return original(self, frames, masks, supervision)

    monkeypatch.setattr(type(begun.model), "forward", spy)
    bank = begun.model.patch_wise_id_bank.weight
    moved = []
    for batch in begun.batches.since(0):
        before = bank.detach().clone()
        begun._train_step(batch)
        begun.step += 1
        moved.append(not torch.equal(before, bank))
    assert [call.labels is not None for call in calls] == [True] * 4 + [False] * 4
    assert [call.reference for call in calls] == [True] * 4 + [False] * 4
    assert moved == [True] * 4 + [False] * 4


def test_identities_are_a_function_of_seed_step_and_clip(begun):
    begun.step = 3
    first = begun._identities(4, 5)
    assert first.shape == (4, 5)
    assert all(len(set(row)) == 5 and set(row) <= set(range(1, 11)) for row in first.tolist())
    assert len({tuple(row) for row in first.tolist()}) == 4
    assert torch.equal(begun._identities(4, 5), first)
    begun.step = 4
    assert not torch.equal(begun._identities(4, 5), first)
    begun.rank = 1  # of two processes: the later clips
    begun.step = 3
    assert torch.equal(begun._identities(2, 5), first[2:])
    begun.rank = 0
