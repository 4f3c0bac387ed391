# SPDX-License-Identifier: Apache-2.0
"""SCM: STM with a spatially constrained memory reader, the champion solution of the Media AI challenge.

Four parts on top of STM, each with a switch of its own: the reader's prior (here, at inference only), the
context of `aspp`, the refinement of `refine` and the ResNeSt-101 encoders (here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.ops.priors import MaskPrior

from .aspp import ReadContext
from .blocks import freeze_batch_norm, per_object
from .encoders import Pyramid, normalize_imagenet
from .refine import MaskRefiner
from .session import Session, SessionSettings
from .stm import STM, QueryFeatures
from .stm_session import STMSession, masks_on_frame

_STRIDE = 16
_BRANCH_SCALE = 0.2  # keeps the variance over 30 residual blocks within a factor of about 3


class ResNeStEncoder(nn.Module):
    """timm's ResNeSt-101e to stride 16; as memory encoder its first convolution sees the masks as channels.

    Args:
        in_channels: 3, or 5 with the object's mask and the masks of all others.

    Source: Zhang et al., ResNeSt: Split-Attention Networks, CVPRW 2022. Nothing is downloaded.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.trunk = timm.create_model(
            "resnest101e", pretrained=False, features_only=True, out_indices=(1, 2, 3), in_chans=in_channels
        )
        # timm starts every residual branch at scale 0; frozen there, it would never open.
        for name, scale in self.trunk.named_parameters():
            if name.endswith("bn3.weight"):
                nn.init.constant_(scale, _BRANCH_SCALE)

    def forward(self, image: Tensor, *masks: Tensor) -> Pyramid:
        """Image (B, 3, H, W) in [0, 1] and masks (B*O, 1, H, W) to a Pyramid of B*O rows (B without)."""
        x = normalize_imagenet(image)
        if masks:
            x = torch.cat((per_object(x, masks[0].shape[0]), *masks), 1)
        f4, f8, f16 = self.trunk(x)
        return Pyramid(f16, f8, f4)


class SCM(STM):
    """STM with four parts that switch on and off.

    Args:
        backbone: "resnest101e", or "resnet50", STM's own with its parameter names.
        aspp: context between the read and the decoder (`ReadContext`).
        refine: correction of every mask against the image (`MaskRefiner`); refined masks are remembered.
        prior: sessions read with `MaskPrior`: where the object was in the previous frame corrects the matched
            positions. Training reads without it.

    Raises:
        ValueError: another backbone.

    Note:
        SCM("resnet50", aspp=False, refine=False, prior=False) is STM: the same parameters, the same numbers.
        Several scales and flips: `vosops.propagate.augment.AugmentedSegmenter`.

    Source: the champion solution of the Media AI challenge (spatially constrained memory reader); STM.
    """

    def __init__(
        self,
        backbone: Literal["resnest101e", "resnet50"] = "resnest101e",
        *,
        aspp: bool = True,
        refine: bool = True,
        prior: bool = True,
    ) -> None:
        if backbone not in ("resnest101e", "resnet50"):
            raise ValueError(f"backbone must be 'resnest101e' or 'resnet50', got {backbone!r}")
        super().__init__((ResNeStEncoder(5), ResNeStEncoder(3)) if backbone == "resnest101e" else None)
        self.aspp = ReadContext() if aspp else nn.Identity()
        self.refine = MaskRefiner() if refine else None
        self.prior = prior
        freeze_batch_norm(self)

    def decode(self, features: QueryFeatures, read: Tensor) -> Tensor:
        """Object logits (rows, 1, H, W) from the values read (rows, 512, h, w), rows = B*O."""
        logit = self.coarse_logit(features, self.aspp(self.join(features, read)))
        return logit if self.refine is None else self.refine(features.image, logit)

    def open_session(self, settings: SessionSettings) -> Session[QueryFeatures]:
        """A new, empty memory for one video: with the prior a `SpatialSession`, else STM's.

        Raises:
            TypeError, ValueError: a setting out of its range.
        """
        return SpatialSession(self, settings) if self.prior else STMSession(self, settings)


class SpatialSession(STMSession):
    """STM's memory whose reads are constrained by where each object was in the previous frame.

    Beside the bank of an object lie its mask at every memory cell, in slot order, and its previous mask,
    both as means over cells of 16 x 16 pixels. An object that was not seen in the previous frame is read
    with the plain kernel (`MaskPrior`).
    """

    def __init__(self, model: STM, settings: SessionSettings) -> None:
        super().__init__(model, settings)
        self._previous_mask: dict[int, Tensor] = {}  # by object  [h, w]
        self._memory_masks: dict[int, dict[int, Tensor]] = {}  # by object and frame  [h, w]

    @property
    def memory_nbytes(self) -> int:
        masks = [*self._previous_mask.values(), *(m for o in self._memory_masks.values() for m in o.values())]
        return super().memory_nbytes + sum(mask.nbytes for mask in masks)

    def remember(
        self,
        index: int,
        image: Tensor,
        features: QueryFeatures,
        probabilities: Tensor,
        object_ids: Sequence[int],
        *,
        given: bool,
    ) -> None:
        super().remember(index, image, features, probabilities, object_ids, given=given)
        if not object_ids:
            return
        cells = F.avg_pool2d(masks_on_frame(image, probabilities), _STRIDE)[0]  # [O, h, w]
        for object_id, mask in zip(object_ids, cells.unbind(), strict=True):
            self._previous_mask[object_id] = mask.clone()
            held = {**self._memory_masks.get(object_id, {}), index: self._previous_mask[object_id]}
            frames = self._banks[object_id].frames
            self._memory_masks[object_id] = {frame: held[frame] for frame in frames}

    def remove(self, object_ids: Sequence[int]) -> None:
        super().remove(object_ids)
        for object_id in set(object_ids):
            del self._previous_mask[object_id], self._memory_masks[object_id]

    def state_dict(self) -> dict[str, Any]:
        previous = {object_id: mask.clone() for object_id, mask in self._previous_mask.items()}
        memory = {
            object_id: {frame: mask.clone() for frame, mask in masks.items()}
            for object_id, masks in self._memory_masks.items()
        }
        return {**super().state_dict(), "previous_mask": previous, "memory_masks": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        previous = {object_id: mask.clone() for object_id, mask in state["previous_mask"].items()}
        memory = {
            object_id: {frame: mask.clone() for frame, mask in masks.items()}
            for object_id, masks in state["memory_masks"].items()
        }
        super().load_state_dict(state)
        self._previous_mask, self._memory_masks = previous, memory

    def _prior(self, object_id: int) -> MaskPrior:
        memory = torch.stack(list(self._memory_masks[object_id].values()))  # [T, h, w]
        return MaskPrior(self._previous_mask[object_id][None], memory[None])
