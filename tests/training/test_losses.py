# SPDX-License-Identifier: Apache-2.0
"""The losses against plain float64 restatements, and their gradients."""

import numpy as np
import pytest
import torch

from vosops.training.config import LossConfig
from vosops.training.losses import clip_loss, hard_cross_entropy, hard_fraction, soft_jaccard

VOID = 255


def probabilities(logits):
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


def plain_entropy(logits, labels, fraction):
    """One frame, (C, H, W) and (H, W), pixel by pixel."""
    p = probabilities(logits)
    values = [
        0.0 if labels[y, x] == VOID else -np.log(p[labels[y, x], y, x]) for y, x in np.ndindex(labels.shape)
    ]
    kept = max(1, int(fraction * len(values)))
    return np.mean(sorted(values, reverse=True)[:kept])


def plain_jaccard(logits, labels):
    """One frame, class by class."""
    p, valid, losses = probabilities(logits), labels != VOID, []
    for c in range(len(logits)):
        truth = labels == c
        if truth.any():
            both = p[c][truth].sum()
            union = p[c][valid].sum() + truth.sum() - both
            losses.append(1 - (both + 1e-6) / (union + 1e-6))
    return np.mean(losses) if losses else 0.0


@pytest.fixture
def frames():
    rng = np.random.default_rng(3)
    logits = 3 * rng.standard_normal((2, 4, 6, 7))
    labels = rng.integers(0, 3, (2, 6, 7))  # class 3 is never shown
    labels[rng.random(labels.shape) < 0.2] = VOID
    return logits, labels


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.15, 1e-6])
def test_hard_cross_entropy(frames, fraction):
    logits, labels = frames
    expected = np.mean([plain_entropy(*pair, fraction) for pair in zip(logits, labels, strict=True)])
    ours = hard_cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), fraction)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    single = hard_cross_entropy(torch.from_numpy(logits[0]), torch.from_numpy(labels[0]), fraction)
    assert single.item() == pytest.approx(plain_entropy(logits[0], labels[0], fraction), rel=1e-12)


def test_soft_jaccard(frames):
    logits, labels = frames
    expected = np.mean([plain_jaccard(*pair) for pair in zip(logits, labels, strict=True)])
    ours = soft_jaccard(torch.from_numpy(logits), torch.from_numpy(labels))
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_a_frame_of_void_has_no_loss():
    logits, labels = torch.randn(3, 4, 4, requires_grad=True), torch.full((4, 4), VOID)
    for loss in (hard_cross_entropy(logits, labels, 0.5), soft_jaccard(logits, labels)):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert not gradient.any()


def test_a_right_answer_has_no_loss():
    labels = torch.tensor([[0, 1], [2, 2]])
    logits = 100 * torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1).double()
    assert hard_cross_entropy(logits, labels, 1.0) < 1e-12
    assert soft_jaccard(logits, labels) < 1e-12


def test_gradients(frames):
    logits, labels = (torch.from_numpy(x) for x in frames)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hard_cross_entropy(x, labels, 0.4), (logits,))
    assert torch.autograd.gradcheck(lambda x: soft_jaccard(x, labels), (logits,))


def test_half_precision_is_summed_in_float32(frames):
    logits, labels = (torch.from_numpy(x) for x in frames)
    for loss in (lambda x: hard_cross_entropy(x, labels, 0.5), lambda x: soft_jaccard(x, labels)):
        low = loss(logits.bfloat16())
        assert low.dtype == torch.float32
        assert low.item() == pytest.approx(loss(logits.bfloat16().double()).item(), rel=1e-5)


def test_schedule_of_hard_pixels():
    aot, stcn = LossConfig(), LossConfig("stcn", hard_from=0.2, hard_to=0.6)
    assert [hard_fraction(done, aot) for done in (0, 0.25, 0.5, 1)] == pytest.approx([1, 0.575, 0.15, 0.15])
    shares = (0, 0.2, 0.4, 0.6, 0.9)
    assert [hard_fraction(done, stcn) for done in shares] == pytest.approx([1, 1, 0.575, 0.15, 0.15])
    at_once = LossConfig(hard_from=0.3, hard_to=0.3)
    assert [hard_fraction(done, at_once) for done in (0.29, 0.3)] == pytest.approx([1, 0.15])


@pytest.mark.parametrize("kind", ["aot", "stcn"])
@pytest.mark.parametrize("reference", [None, 0.0, 0.7])
def test_loss_of_a_batch(kind, reference):
    """Every clip over its own objects; the first frame apart, with its weight."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    objects = torch.tensor([1, 3])
    labels = torch.stack([torch.randint(0, 1 + int(n), (3, 5, 6)) for n in objects])
    config, done = LossConfig(kind), 0.4
    loss = clip_loss(logits, labels, objects, config, done, reference=reference)
    fraction = hard_fraction(done, config)
    expected = []
    for clip, truth, count in zip(logits.numpy(), labels.numpy(), (1, 3), strict=True):
        frames = []
        for maps, target in zip(clip[:, : 1 + count], truth, strict=True):
            entropy = plain_entropy(maps, target, fraction)
            frames.append((entropy + plain_jaccard(maps, target)) / 2 if kind == "aot" else entropy)
        if reference is None:
            expected.append(np.mean(frames))
        else:
            expected.append(np.mean(frames[1:]) + reference * frames[0])
    assert loss.total.item() == pytest.approx(np.mean(expected), rel=1e-12)
    assert not loss.cross_entropy.requires_grad
