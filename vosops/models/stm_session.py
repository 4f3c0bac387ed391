# SPDX-License-Identifier: Apache-2.0
"""The memory of one video for STM and the models built on it: one bank of keys and values per object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vosops.memory import EveryNth, MemoryBank, SharedPolicy
from vosops.memory.checks import check_leaving, check_present
from vosops.ops.aggregate import soft_aggregate
from vosops.ops.priors import Prior

from .blocks import map_objects, object_chunks
from .session import Session, SessionSettings, check_saved
from .stm import STM, QueryFeatures, clamped_others, merge_slots

_MEMORY_EVERY = 5


class STMSession(Session[QueryFeatures]):
    """STM's memory: a `MemoryBank` per object, since the mask enters the encoder of the keys.

    By default (the published loop) a frame is remembered every 5 and the previous one until the next
    replaces it; all that is remembered for good stays. Under `ByteBudget` the objects share the bytes.

    Args:
        model: whose network encodes and decodes.
        settings: a `policy` decides over the frames remembered for good; the previous frame takes one slot.

    Note:
        Cost of a frame: one query encoding, and per object one memory encoding (with include_previous),
        one dense read of 2 Q M (128 + 512) operations and one decoding. Objects are encoded and decoded
        in chunks, so that only the memory grows with their number: T * H/16 * W/16 * 640 numbers each.
    """

    def __init__(self, model: STM, settings: SessionSettings) -> None:
        self.model = model
        self._every = settings.memory_every or _MEMORY_EVERY
        self._previous = settings.include_previous is not False
        self._top_k = settings.top_k or None
        self._policy = settings.policy or EveryNth(1)
        self._banks: dict[int, MemoryBank] = {}
        self._last: int | None = None  # frame remembered for good
        self._temporary: int | None = None

    @property
    def object_ids(self) -> list[int]:
        return list(self._banks)

    @property
    def memory_nbytes(self) -> int:
        return sum(bank.nbytes for bank in self._banks.values())

    def encode(self, image: Tensor) -> QueryFeatures:
        return self.model.encode_query(image[:, :3])

    def segment(self, features: QueryFeatures) -> Tensor:
        height, width = features.image.shape[2:]
        ids = self.object_ids
        if not ids:
            return features.image.new_ones(1, 1, height, width)

        def decode(chunk: slice) -> Tensor:
            read = torch.cat([self._read(object_id, features.key) for object_id in ids[chunk]])
            return self.model.decode(features, read).sigmoid()

        objects = map_objects(decode, len(ids), 16 * height * width)  # [O, 1, H, W]
        return merge_slots(soft_aggregate(objects.transpose(0, 1)))

    def remember(
        self,
        index: int,
        image: Tensor,  # [1, 3 or 4, H, W]
        features: QueryFeatures,
        probabilities: Tensor,  # [1, 1+O, H, W]
        object_ids: Sequence[int],
        *,
        given: bool,
    ) -> None:
        """As `Session.remember`. Masks are cut to the frame where `image` says where it ends (`STM.prepare`).

        Raises:
            ValueError: object_ids lacks an object that is present, or the policy has no room for two frames;
                the memory is unchanged.
        """
        if len(set(object_ids)) < len(object_ids) or len(object_ids) != probabilities.shape[1] - 1:
            raise ValueError(
                f"object_ids must be {probabilities.shape[1] - 1} distinct ids, one per channel of "
                f"probabilities after the background, got {list(object_ids)}"
            )
        entering = check_present(object_ids, self.object_ids)
        if not object_ids:
            return
        masks = masks_on_frame(image, probabilities)
        stays = given or bool(entering) or self._last is None or index - self._last >= self._every
        if stays or self._previous:
            self._append(index, image[:, :3], masks, object_ids)
            self._temporary = None if stays else index
            self._last = index if stays else self._last

    def remove(self, object_ids: Sequence[int]) -> None:
        for object_id in check_leaving(object_ids, self.object_ids):
            del self._banks[object_id]

    def state_dict(self) -> dict[str, Any]:
        for bank in self._banks.values():
            bank.policy = SharedPolicy(self._policy, len(self._banks))  # the one that loads it
        return {
            **self._settings(),
            "last": self._last,
            "temporary": self._temporary,
            "banks": {object_id: bank.state_dict() for object_id, bank in self._banks.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, of a session with the same model and settings.

        Raises:
            ValueError: the settings differ; nothing has changed.
            KeyError: `state` is not of `state_dict`; nothing has changed.
        """
        check_saved(state, self._settings())
        last, temporary, banks = state["last"], state["temporary"], {}
        for object_id, saved in state["banks"].items():
            bank = MemoryBank(SharedPolicy(self._policy, len(state["banks"])))
            bank.load_state_dict(saved)
            banks[object_id] = bank
        self._last, self._temporary, self._banks = last, temporary, banks

    def _prior(self, object_id: int) -> Prior | None:
        """The prior of an object's next read."""
        return self.model.kernel

    def _read(self, object_id: int, query_key: Tensor) -> Tensor:
        """Values read for one object.  # [1, 512, h, w]"""
        bank = self._banks[object_id]
        read = bank.read(query_key, top_k=self._top_k, prior=self._prior(object_id))
        assert isinstance(read, Tensor)
        return read[:, 0]

    def _append(self, index: int, image: Tensor, masks: Tensor, object_ids: Sequence[int]) -> None:
        """Encodes the objects' masks (1, O, H, W) and gives keys and values to their banks."""
        others = clamped_others(masks)
        policy = SharedPolicy(self._policy, len(object_ids), self._temporary)
        for chunk in object_chunks(len(object_ids), 16 * image.shape[2] * image.shape[3]):
            keys, values = self.model.encode_memory(image, masks[:, chunk], others[:, chunk])
            rows = zip(object_ids[chunk], keys.split(1), values.unsqueeze(1).split(1), strict=True)
            for object_id, key, value in rows:
                bank = self._banks[object_id] if object_id in self._banks else MemoryBank(policy)
                bank.policy = policy
                bank.append(index, key, value, [object_id])
                self._banks[object_id] = bank

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the session that takes it back."""
        return {
            "memory_every": self._every,
            "include_previous": self._previous,
            "policy": repr(self._policy),
            "top_k": self._top_k,
        }


def masks_on_frame(image: Tensor, probabilities: Tensor) -> Tensor:
    """Masks (1, O, H, W) of the objects, 0 on the padding.

    Args:
        image: (1, 4, H, W) of `STM.prepare`, or (1, 3, H, W) of a frame without padding.
        probabilities: (1, 1+O, H, W), background first.
    """
    return probabilities[:, 1:] * image[:, 3:] if image.shape[1] == 4 else probabilities[:, 1:]
