# SPDX-License-Identifier: Apache-2.0
"""KMN: STM's network and training, a kernel in its sessions; Hide-and-Seek."""

from __future__ import annotations

import pytest
import torch

import vosops
from vosops.models.kmn import KMN, hide_and_seek
from vosops.models.session import SessionSettings
from vosops.models.stm import STM

from .stm_helpers import boxes, clip, filled, run


@pytest.fixture(scope="module")
def model() -> KMN:
    return filled(KMN())


def test_network_and_training_are_those_of_stm(model: KMN) -> None:
    stm = STM().eval()
    stm.load_state_dict(model.state_dict())
    frames, masks = clip(3), boxes(2)
    with torch.no_grad():
        assert torch.equal(model(frames[None], masks[:, 1:]), stm(frames[None], masks[:, 1:]))


def test_a_session_reads_with_the_kernel(model: KMN) -> None:
    """The values read equal KMN's formula: exp(score) times the Gaussian, normalised."""
    frames, masks = clip(3, 64, 96), boxes(1, 64, 96)
    given = []
    hook = model.Decoder.register_forward_hook(lambda _, arguments, logits: given.append(arguments[0]))
    list(run(model.open_session(SessionSettings(memory_every=1)), frames, masks, [1]))
    hook.remove()
    stored = model.open_session(SessionSettings(memory_every=1))
    list(run(stored, frames, masks, [1]))
    bank = stored.state_dict()["banks"][1]
    query = model.encode_query(frames[2:]).key.double().flatten(2)[0]  # [128, Q]
    key = bank["key"].double().flatten(2)[0]  # [128, M]
    value = bank["groups"][0]["value"].double().flatten(2)[0]  # [512, M]
    scores = query.T @ key  # [Q, M]
    cells = torch.cartesian_prod(torch.arange(4), torch.arange(6)).double()
    centers = cells[scores.argmax(0)]  # [M, 2]
    gaussian = torch.exp(-(cells[:, None] - centers).square().sum(-1) / (2 * 7.0**2))
    scaled = scores / 128**0.5
    weights = torch.exp(scaled - scaled.amax(1, keepdim=True)) * gaussian
    read = (value @ (weights / weights.sum(1, keepdim=True)).T).view(512, 4, 6)
    torch.testing.assert_close(given[-1][0, :512], read.float(), rtol=1e-4, atol=1e-4)
    plain = value @ scaled.softmax(1).T
    assert (plain.view(512, 4, 6) - read).abs().max() > 1e-2


def test_sigma_is_the_kernels(model: KMN) -> None:
    assert model.kernel == vosops.KernelPrior(sigma=7.0)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        KMN(sigma=0.0)


def test_backends_agree(model: KMN, cpu_backend: None) -> None:
    def segment() -> torch.Tensor:
        session = model.open_session(SessionSettings(memory_every=2))
        return torch.cat(list(run(session, clip(4), boxes(2), [1, 2])))

    compiled = segment()
    with vosops.use_backend("reference"):
        torch.testing.assert_close(segment(), compiled, rtol=1e-4, atol=5e-5)


def test_forward_trains() -> None:
    model = KMN().train()
    logits = model(clip(3, 32, 48)[None], boxes(2, 32, 48)[:, 1:])
    torch.nn.functional.cross_entropy(logits[0], boxes(2, 32, 48).argmax(1).repeat(2, 1, 1)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_hidden_cells_are_the_same_in_frame_and_mask() -> None:
    frames, masks = torch.rand(2, 3, 3, 50, 70), torch.ones(2, 3, 2, 50, 70)
    seen, kept = hide_and_seek(frames, masks, cell=16, generator=torch.Generator().manual_seed(1))
    hidden = kept[:, :, 0] == 0  # [B, T, H, W]
    assert torch.equal(kept[:, :, 1] == 0, hidden)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    torch.testing.assert_close(seen, torch.where(hidden[:, :, None], mean, frames), rtol=0, atol=0)
    cells = hidden[..., ::16, ::16]  # [B, T, 4, 5]
    assert torch.equal(
        cells.repeat_interleave(16, -2).repeat_interleave(16, -1)[..., :50, :70], hidden
    )  # whole cells, the last of each row and column cut
    assert 0.3 < cells.float().mean() < 0.7
    assert not torch.equal(cells[0, 0], cells[0, 1])  # every frame has its own
    assert masks.min() == 1  # the caller's stay


def test_hiding_follows_its_generator_and_probability() -> None:
    frames, masks = torch.rand(1, 2, 3, 32, 32), torch.ones(1, 2, 1, 32, 32, dtype=torch.bool)
    first, second = (
        hide_and_seek(frames, masks, cell=8, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert first[1].dtype == torch.bool
    assert torch.equal(hide_and_seek(frames, masks, probability=0.0)[0], frames)
    assert not hide_and_seek(frames, masks, probability=1.0)[1].any()


@pytest.mark.parametrize(
    ("frames", "masks", "options", "message"),
    [
        ((1, 2, 4, 8, 8), (1, 2, 1, 8, 8), {}, "frames must be floating-point of shape"),
        ((1, 2, 3, 8, 8), (1, 1, 1, 8, 8), {}, r"masks must have shape \(B, T, O, H, W\)"),
        ((1, 2, 3, 8, 8), (1, 2, 1, 8, 8), {"cell": 0}, "cell must be at least 1"),
        ((1, 2, 3, 8, 8), (1, 2, 1, 8, 8), {"probability": 1.5}, "probability must lie in"),
    ],
)
def test_bad_input_is_named(frames: tuple, masks: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hide_and_seek(torch.rand(frames), torch.rand(masks), **options)
