# SPDX-License-Identifier: Apache-2.0
"""What training minimises: cross-entropy of the hardest pixels, soft Jaccard, and their mean over clips."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LossConfig

VOID = 255
_EPSILON = 1e-6


def hard_fraction(done: float, config: LossConfig) -> float:
    """The fraction of pixels whose loss counts: 1 up to `hard_from`, falling linearly to `hard_fraction` at
    `hard_to`, and staying there.

    Args:
        done: share of the training that is over, 0 to 1.
        config: its three settings; 0, 0.5, 0.15 are AOT's, 0.13, 0.47, 0.15 STCN's.

    Source: STCN (Cheng et al., NeurIPS 2021) and AOT (Yang et al., NeurIPS 2021), published training code.
    """
    width = config.hard_to - config.hard_from
    ratio = float(done >= config.hard_to) if width == 0 else (done - config.hard_from) / width
    ratio = min(max(ratio, 0.0), 1.0)
    return 1 - ratio * (1 - config.hard_fraction)


def hard_cross_entropy(logits: Tensor, labels: Tensor, fraction: float) -> Tensor:
    """Bootstrapped cross-entropy: the mean over the pixels of greatest loss.

    Args:
        logits: (C, H, W), or (T, C, H, W) for the mean over frames, each with its own hardest pixels.
        labels: (H, W) or (T, H, W) integers below C, or 255: such pixels count with loss 0.
        fraction: of all pixels, above 0; at least one counts.

    Returns:
        A scalar, float32 or wider.

    Note:
        Cost: a pass over the logits, and below fraction 1 a selection among H W values a frame.

    Source: Wu et al., Bridging category-level and instance-level semantic image segmentation, 2016; AOT,
    STCN.
    """
    if logits.dim() == 3:
        logits, labels = logits[None], labels[None]
    losses = F.cross_entropy(_wide(logits), labels.long(), ignore_index=VOID, reduction="none").flatten(1)
    if fraction < 1:
        kept = max(1, int(fraction * losses.shape[1]))
        losses = losses.topk(kept, dim=1, sorted=False).values
    return losses.mean()


def soft_jaccard(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - intersection over union of probabilities and labels, mean over the classes that the labels show.

    Args:
        logits, labels: as of `hard_cross_entropy`, the background a class like the others; void pixels
            (255) are left out of intersection and union.

    Returns:
        A scalar in [0, 1], the mean over frames; 0 for frames that are void altogether.

    Source: AOT's published code (Tversky index with both weights 1); Rahman and Wang, ISVC 2016.
    """
    if logits.dim() == 3:
        logits, labels = logits[None], labels[None]
    valid = (labels != VOID)[:, None]
    probabilities = _wide(logits).softmax(1) * valid
    classes = torch.arange(logits.shape[1], device=labels.device)[:, None, None]
    truth = (labels[:, None] == classes).to(probabilities.dtype)  # [T, C, H, W]
    both = (probabilities * truth).sum((2, 3))
    size = truth.sum((2, 3))
    union = probabilities.sum((2, 3)) + size - both
    loss = 1 - (both + _EPSILON) / (union + _EPSILON)
    shown = (size > 0).to(loss.dtype)
    return ((loss * shown).sum(1) / shown.sum(1).clamp(min=1)).mean()


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class ClipLoss:
    """The loss of a batch and its terms: scalars, `total` with a gradient, the others without."""

    total: Tensor
    cross_entropy: Tensor
    jaccard: Tensor


def clip_loss(
    logits: Tensor,
    labels: Tensor,
    objects: Tensor,
    config: LossConfig,
    done: float,
    *,
    reference: float | None = None,
) -> ClipLoss:
    """The loss of a batch of clips, each over its own objects.

    Kind "stcn" is the hard cross-entropy, "aot" half of it and half of the soft Jaccard. A clip's loss is the
    mean over its frames, the batch's the mean over its clips: a batch that is split over processes has the
    mean of their losses.

    Args:
        logits: (B, T, 1+O, H, W), background first.
        labels: (B, T, H, W) integers, of the same frames; 255 is void.
        objects: (B,) the number of objects of each clip; the channels beyond are not looked at.
        config: kind and hard pixels.
        done: share of the training that is over.
        reference: weight of the first of the T frames, which segmented itself; None if all are predicted.

    Source: AOT, section 4.3 of its published training; STCN.
    """
    fraction = hard_fraction(done, config)
    totals, entropies, jaccards = [], [], []
    for clip, truth, count in zip(logits, labels, objects.tolist(), strict=True):
        own = clip[:, : 1 + count]
        parts = [(own, truth, 1.0)] if reference is None else [(own[1:], truth[1:], 1.0)]
        if reference:
            parts.append((own[:1], truth[:1], reference))
        total: Tensor | float = 0.0
        for maps, target, weight in parts:
            entropy = hard_cross_entropy(maps, target, fraction)
            if config.kind == "aot":
                jaccard = soft_jaccard(maps, target)
                total = total + weight * (entropy + jaccard) / 2
            else:
                jaccard = entropy.new_zeros(())
                total = total + weight * entropy
            if maps is parts[0][0]:
                entropies.append(entropy.detach())
                jaccards.append(jaccard.detach())
        totals.append(total)
    return ClipLoss(
        torch.stack([t for t in totals if isinstance(t, Tensor)]).mean(),
        torch.stack(entropies).mean(),
        torch.stack(jaccards).mean(),
    )
