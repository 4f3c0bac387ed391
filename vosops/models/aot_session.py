# SPDX-License-Identifier: Apache-2.0
"""The memory of one video for AOT and DeAOT: groups of ten objects, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vosops.memory import EveryNth, MemoryBank, SharedPolicy
from vosops.memory.checks import check_ids, check_leaving, check_present
from vosops.nn import Memory, Read
from vosops.nn.attention import as_map, as_tokens
from vosops.nn.lstt import Current

from .aot import AOT, IDENTITIES, Features
from .session import Session, SessionSettings, check_saved

_EPSILON = 1e-5  # of probabilities that several groups share


@dataclass
class _Group:
    """Objects of one pass.

    identities: id to channel, 1 to 10. A channel is not given twice: the memory still holds its old object.
    given: how many channels were given out.
    long: a bank per block.
    short: of the previous frame, per block.
    currents: of the frame segmented last, per block, until its mask is known.
    """

    identities: dict[int, int] = field(default_factory=dict)
    given: int = 0
    long: list[MemoryBank] = field(default_factory=list)
    short: list[Memory] = field(default_factory=list)
    currents: list[Current] = field(default_factory=list)


class AOTSession(Session[Features]):
    """AOT's memory. All groups share the encoder; an object enters the first group with a free identity.

    A frame with given masks is a reference frame: it passes through the transformer reading itself, enters
    every group's long-term memory, and a policy gives it up last. Every frame replaces the short-term memory,
    with the labels that were predicted (each pixel one object, at the network's size, as published).

    Args:
        model: whose network encodes, propagates and decodes.
        settings: a `policy` decides over the long-term memory, all of which stays by default. The short-term
            memory is part of the network: include_previous may not be False.

    Raises:
        ValueError: include_previous is False.

    Note:
        Cost of a frame: one encoding, and per group one pass through blocks and decoder. Memory per group
        and block: a frame of keys and values in the long-term bank (512 numbers a token, 1,152 for DeAOT),
        and the previous frame.
    """

    def __init__(self, model: AOT, settings: SessionSettings) -> None:
        if settings.include_previous is False:
            raise ValueError(
                "include_previous must not be False: short-term attention always reads the previous frame"
            )
        self._model = model
        self._every = settings.memory_every or model.memory_every
        self._top_k = (model.top_k if settings.top_k is None else settings.top_k) or None
        self._policy = settings.policy or EveryNth(1)
        self._groups: list[_Group] = []
        self._last = 0  # the frame last remembered for good

    @property
    def object_ids(self) -> list[int]:
        return [object_id for group in self._groups for object_id in group.identities]

    @property
    def memory_nbytes(self) -> int:
        banks = sum(bank.nbytes for group in self._groups for bank in group.long)
        short = sum(x.nbytes for group in self._groups for memory in group.short for x in memory)
        return banks + short

    def encode(self, image: Tensor) -> Features:
        return self._model.encode(image)

    def segment(self, features: Features) -> Tensor:
        logits = []
        for group in self._groups:
            reads = [Read(_tokens(bank), short) for bank, short in zip(group.long, group.short, strict=True)]
            outputs, group.currents = self._model.propagate(features, reads, None, self._top_k)
            present = partial(_channels, numbers=[0, *group.identities.values()])
            logits.append(self._model.decode(outputs, features, present))
        return merge_groups(logits)

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
        """As `Session.remember`.

        Raises:
            ValueError: object_ids lacks an object that is present, or the policy has no room for two frames;
                the memory is unchanged.
        """
        ids = check_ids(object_ids)
        entering = check_present(ids, self.object_ids)
        groups = [replace(group, identities=dict(group.identities)) for group in self._groups]
        for object_id in entering:
            if not groups or groups[-1].given == IDENTITIES:
                groups.append(_Group())
            groups[-1].given += 1
            groups[-1].identities[object_id] = groups[-1].given
        reference = given or bool(entering)
        stays = reference or (self._every is not None and index - self._last >= self._every)
        labels = probabilities.max(
            1
        ).indices  # [1, H, W], in the order of ids; argmax takes eight times as long
        for group in groups:
            identity = self._model.embed(_labels_of(group, labels, ids), features)
            if reference:
                _, group.currents = self._model.propagate(features, None, identity)
            group.short = self._model.LSTT.memorise(group.currents, identity)
            group.currents = []
        if stays:
            self._append(index, groups, features.size, lasting=reference)
            self._last = index
        self._groups = groups

    def remove(self, object_ids: Sequence[int]) -> None:
        leaving = check_leaving(object_ids, self.object_ids)
        for group in self._groups:
            for object_id in leaving:
                group.identities.pop(object_id, None)
        self._groups = [group for group in self._groups if group.identities]

    def state_dict(self) -> dict[str, Any]:
        policy = self._shared(self._groups)
        for group in self._groups:
            for bank in group.long:
                bank.policy = policy  # the one that loads it
        return {
            **self._settings(),
            "last": self._last,
            "groups": [
                {
                    "identities": dict(group.identities),
                    "given": group.given,
                    "long": [bank.state_dict() for bank in group.long],
                    "short": [tuple(x.clone() for x in memory) for memory in group.short],
                    "currents": [tuple(x.clone() for x in current) for current in group.currents],
                }
                for group in self._groups
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state back, of a session with the same model and settings.

        Raises:
            ValueError: the settings differ; nothing has changed.
            KeyError: `state` is not of `state_dict`; nothing has changed.
        """
        check_saved(state, self._settings())
        last, groups = int(state["last"]), []
        policy = self._shared(state["groups"])
        for saved in state["groups"]:
            banks = [MemoryBank(policy) for _ in saved["long"]]
            for bank, content in zip(banks, saved["long"], strict=True):
                bank.load_state_dict(content)
            short = [Memory(*(x.clone() for x in memory)) for memory in saved["short"]]
            currents = [tuple(x.clone() for x in current) for current in saved["currents"]]
            groups.append(_Group(dict(saved["identities"]), int(saved["given"]), banks, short, currents))
        self._last, self._groups = last, groups

    def _append(self, index: int, groups: list[_Group], size: tuple[int, int], *, lasting: bool) -> None:
        """Gives the frame that is every group's short-term memory to the long-term banks."""
        policy = self._shared(groups)
        for group in groups:
            banks = group.long or [MemoryBank(policy) for _ in group.short]
            for bank, memory in zip(banks, group.short, strict=True):
                bank.policy = policy
                key, value = (as_map(x, size) for x in memory)
                bank.append(index, key, value[:, None], [1], lasting=lasting)
            group.long = banks

    def _shared(self, groups: Sequence[object]) -> SharedPolicy:
        """The policy of each bank: all groups and blocks share its bytes."""
        return SharedPolicy(self._policy, max(1, len(groups) * len(self._model.LSTT.layers)))

    def _settings(self) -> dict[str, Any]:
        """What a state must share with the session that takes it back."""
        return {"memory_every": self._every, "policy": repr(self._policy), "top_k": self._top_k}


def merge_groups(logits: Sequence[Tensor]) -> Tensor:
    """Probabilities (1, 1 + O, H, W) of the groups' logits (1, 1 + O_i, H, W), background first.

    Of several groups the backgrounds are multiplied, and odds decide, as in AOT's published code.
    """
    if len(logits) == 1:
        return logits[0].softmax(1)
    parts = [x.softmax(1) for x in logits]
    background = torch.stack([part[:, :1] for part in parts]).prod(0)
    merged = torch.cat([background, *(part[:, 1:] for part in parts)], 1)
    return merged.clamp(_EPSILON, 1 - _EPSILON).logit().softmax(1)


def _labels_of(group: _Group, labels: Tensor, ids: Sequence[int]) -> Tensor:
    """The label map (1, H, W) of one group, uint8: its identities where `labels`, the place of an object
    among `ids` from 1 on, has its objects; background elsewhere."""
    table = torch.zeros(1 + len(ids), dtype=torch.uint8)
    for place, object_id in enumerate(ids, 1):
        table[place] = group.identities.get(object_id, 0)
    return table.to(labels.device)[labels]


def _tokens(bank: MemoryBank) -> Memory:
    """All that a bank holds, as tokens (1, T * h * w, C) without a copy."""
    (group,) = bank.groups
    return Memory(as_tokens(group.key), as_tokens(group.value[:, 0]))


def _channels(logits: Tensor, numbers: list[int]) -> Tensor:
    return logits[:, numbers]
