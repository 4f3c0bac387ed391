# SPDX-License-Identifier: Apache-2.0
"""XMem's three memories of one video: sensory, working and long-term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vosops.memory import LongTerm, LongTermMemory, MemoryBank
from vosops.memory.checks import check_present

from .session import Session, SessionSettings

if TYPE_CHECKING:
    from .xmem import Features, XMem

TOP_K, MEMORY_EVERY = 30, 5


class XMemSession(Session["Features"]):
    """XMem's memory of one video.

    Sensory memory: (1, O, Ch, h, w) per object, zeros when it enters. A frame that is remembered updates it
    from the value (deep update), any other from the decoder; both start from what it was before the frame.
    As `remember` is what tells the two apart, `segment` leaves the decoder's update aside until then, and
    the last frame of a video, never remembered, updates nothing.

    Working and long-term memory: `LongTermMemory`, by default with the published settings. Any other policy
    is the published `--disable_long_term`: a `MemoryBank` of the frames remembered, EveryNth(1) as
    published, without limit. Unlike the published code, which counts the usage of long-term positions only
    in videos that will fill their memory, usage is always counted.

    Args:
        model: whose memory it is.
        settings: memory_every is 5 and top_k 30 by default.

    Raises:
        ValueError: include_previous, which XMem does not have: its sensory memory carries the previous frame.
    """

    def __init__(self, model: XMem, settings: SessionSettings) -> None:
        if settings.include_previous:
            raise ValueError(
                "include_previous must be False or None for XMem, whose sensory memory carries the previous "
                "frame; got True"
            )
        policy = LongTerm() if settings.policy is None else settings.policy
        self._model = model
        self._every = settings.memory_every or MEMORY_EVERY
        top_k = TOP_K if settings.top_k is None else settings.top_k
        self._top_k = top_k or None
        self._memory = LongTermMemory(policy) if isinstance(policy, LongTerm) else MemoryBank(policy)
        self._last = 0  # the frame last remembered
        self._hidden: Tensor | None = None  # [1, O, Ch, h, w] before the frame that is segmented
        self._next_hidden: Tensor | None = None  # after it, if it will not be remembered

    @property
    def object_ids(self) -> list[int]:
        return self._memory.object_ids

    @property
    def memory_nbytes(self) -> int:
        hidden = [tensor for tensor in (self._hidden, self._next_hidden) if tensor is not None]
        return self._memory.nbytes + sum(tensor.nbytes for tensor in hidden)

    def encode(self, image: Tensor) -> Features:
        return self._model.encode(image)

    def segment(self, features: Features) -> Tensor:
        logits, self._next_hidden = self._model.decode(self.read(features), features, self._hidden)
        return logits.softmax(1)

    def read(self, features: Features) -> Tensor:
        """What every object reads from working and long-term memory: (1, O, Cv, h, w); counts usage."""
        if isinstance(self._memory, LongTermMemory):
            return self._memory.read(features.key, features.selection, top_k=self._top_k)
        read = self._memory.read(
            features.key, similarity="l2", selection=features.selection, top_k=self._top_k
        )
        assert isinstance(read, Tensor)
        return read

    def remember(
        self,
        index: int,
        image: Tensor,
        features: Features,
        probabilities: Tensor,
        object_ids: Sequence[int],
        *,
        given: bool,
    ) -> None:
        present = self.object_ids
        entering = check_present(object_ids, present)
        if not (given or entering or index - self._last >= self._every):
            if self._next_hidden is not None:
                self._hidden, self._next_hidden = self._next_hidden, None
            return
        order = present + entering  # that of the memory, and so of the sensory memory
        masks = probabilities[:, 1:][:, [list(object_ids).index(object_id) for object_id in order]]
        hidden, new = self._hidden, self._model.new_hidden(features, len(entering))
        if new is not None:
            hidden = new if hidden is None else torch.cat((hidden, new), 1)
        value, hidden = self._model.encode_value(image, masks, features, hidden, deep_update=True)
        arguments = (index, features.key, value, order, features.shrinkage)
        if isinstance(self._memory, LongTermMemory):
            self._memory.append(*arguments, features.selection)
        else:
            self._memory.append(*arguments)
        self._hidden, self._next_hidden, self._last = hidden, None, index

    def remove(self, object_ids: Sequence[int]) -> None:
        before = self.object_ids
        self._memory.remove(object_ids)
        kept = [number for number, object_id in enumerate(before) if object_id not in object_ids]
        for name in ("_hidden", "_next_hidden"):
            hidden = getattr(self, name)
            if hidden is not None:
                setattr(self, name, hidden[:, kept] if kept else None)

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self._memory.state_dict(),
            "last": self._last,
            "hidden": None if self._hidden is None else self._hidden.clone(),
            "next_hidden": None if self._next_hidden is None else self._next_hidden.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        last, hidden, next_hidden = int(state["last"]), state["hidden"], state["next_hidden"]
        self._memory.load_state_dict(state["memory"])
        self._last = last
        self._hidden = None if hidden is None else hidden.clone()
        self._next_hidden = None if next_hidden is None else next_hidden.clone()
