# SPDX-License-Identifier: Apache-2.0
"""What the whole-frame benchmark runs: the models' sessions with filled memories, and their published peers.

Every implementation has `frame()`: milliseconds of each stage, and the frame's probabilities.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vosops import models
from vosops.memory import Bounded, bank, long_term
from vosops.memory.long_term import LongTerm
from vosops.models import SessionSettings
from vosops.models.aot import AOT
from vosops.models.aot_session import AOTSession

from .peers import aot_frame, stcn_frame

MEMORY_EVERY = 5

Times = dict[str, float]  # stage -> milliseconds


@dataclass(frozen=True)
class FrameCase:
    """One model at one size.

    Args:
        model: name in `vosops.models.MODELS`.
        size: (height, width) of the frame, pixels.
        objects: how many are followed.
        frames: whole frames in the memory, of AOT in the long-term memory; 1 stays 1.
        prototypes: long-term positions beside them (XMem); 10,000 and 10 frames are its cap.
    """

    model: str
    size: tuple[int, int]
    objects: int
    frames: int
    prototypes: int = 0


@dataclass(frozen=True)
class Family:
    """What a frame of a kind of models is made of.

    Args:
        stages: name -> how many of it a frame has.
        match: the stage whose share of the frame is told.
        inner: stages that run inside of another -> (that other, the name of the function that does them, the
            modules or classes that call it by this name).
    """

    stages: dict[str, float]
    match: str
    inner: dict[str, tuple[str, str, tuple[Any, ...]]]


MATCHING = Family(
    {"encode": 1, "read": 1, "decode": 1, "memorise": 1 / MEMORY_EVERY},
    "read",
    {"read": ("decode", "memory_read", (bank, long_term))},
)
ASSOCIATING = Family(
    {"encode": 1, "propagate": 1, "decode": 1, "memorise": 1, "append": 1 / MEMORY_EVERY},
    "propagate",
    {"propagate": ("decode", "propagate", (AOT,)), "append": ("memorise", "_append", (AOTSession,))},
)


def random_model(name: str) -> Any:
    """A registered model whose features keep their size from layer to layer and listen to the masks.

    The default initialisation grows through the residual blocks until affinities overflow in the published
    softmax, which subtracts no maximum.
    """
    torch.manual_seed(0)
    model = models.create(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model.eval()


class Ours:
    """A registered model's session with a filled memory."""

    def __init__(self, case: FrameCase) -> None:
        self.model = random_model(case.model).to(memory_format=torch.channels_last)
        self.family = ASSOCIATING if isinstance(self.model, AOT) else MATCHING
        policy = LongTerm(case.frames + 2) if case.prototypes else Bounded(case.frames + 1)
        # A memory of one frame is that of the models which remember the reference frame alone.
        every = MEMORY_EVERY if case.frames > 1 else None
        self.session = self.model.open_session(SessionSettings(memory_every=every, policy=policy))
        self.ids = list(range(1, case.objects + 1))
        frame = torch.rand(1, 3, *case.size)
        self.image = self.model.prepare(frame).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, case.objects + 1, (1, 1, *(-(-side // 64) for side in case.size)))
        labels = torch.nn.functional.interpolate(labels.float(), case.size).round()
        masks = self.model.prepare_mask(torch.cat([(labels == i).float() for i in self.ids], 1))
        self.probabilities = torch.cat((1 - masks.sum(1, keepdim=True), masks), 1)
        self.index = 0
        with torch.no_grad():
            self._fill(case)
        self.state = self.session.state_dict()

    def _fill(self, case: FrameCase) -> None:
        extended = case.prototypes or self.family is ASSOCIATING
        # Small changes of the first frame: every frame is near it, none equals it.
        for _ in range(1 if extended else case.frames):
            image = self.image + 0.1 * torch.randn_like(self.image)
            self.remember(image, self.session.encode(image), given=True)
        if extended:
            state = self.session.state_dict()
            if case.prototypes:
                _extend(state["memory"], case)
            else:
                _repeat(state["groups"], case.frames)
            self.index = case.frames * MEMORY_EVERY
            self.session.load_state_dict(state | {"last": self.index - MEMORY_EVERY})

    def remember(self, image: Tensor, features: Any, *, given: bool) -> None:
        """Memorises a frame, MEMORY_EVERY after the one before."""
        self.session.remember(self.index, image, features, self.probabilities, self.ids, given=given)
        self.index += MEMORY_EVERY

    def step(self, lap: Callable[[str], None] = lambda _: None) -> Tensor:
        """A frame; `lap` is called after "encode", "decode" and "memorise"."""
        features = self.session.encode(self.image)
        lap("encode")
        probabilities = self.session.segment(features)
        lap("decode")
        # To AOT a given mask makes a reference frame, which costs a pass more: not what every fifth frame is.
        self.remember(self.image, features, given=self.family is MATCHING)
        lap("memorise")
        return probabilities

    def frame(self) -> tuple[Times, Tensor]:
        """Milliseconds of each stage, and the probabilities."""
        index = self.index
        self.session.load_state_dict(self.state)  # every frame meets the same memory
        with ExitStack() as stack:
            inner = {
                stage: (outer, stack.enter_context(_time_of(name, owners)))
                for stage, (outer, name, owners) in self.family.inner.items()
            }
            watch = Watch()
            probabilities = self.step(watch.lap)
        for stage, (outer, spent) in inner.items():
            watch.times[stage] = sum(spent)
            watch.times[outer] -= sum(spent)
        self.index = index
        return watch.times, probabilities


class PublishedLSTT:
    """A frame of AOT or DeAOT by the published formulas; `sdpa`: with SDPA for dense attention."""

    def __init__(self, ours: Ours, case: FrameCase, *, sdpa: bool) -> None:
        self._engine = aot_frame.PublishedAOT(ours.model, sdpa=sdpa)
        self._engine.take(ours.state)
        self._image, self._probabilities = ours.image.contiguous(), ours.probabilities
        self._appends = case.frames > 1

    def frame(self) -> tuple[Times, Tensor]:
        """As `Ours.frame`."""
        engine, groups = self._engine, [replace(group) for group in self._engine.groups]
        watch = Watch()
        maps = engine.encode(self._image)
        watch.lap("encode")
        probabilities = engine.segment(maps, watch.lap)
        engine.remember(maps, self._probabilities.argmax(1))
        watch.lap("memorise")
        if self._appends:
            engine.append()
        watch.lap("append")
        engine.groups = groups
        return watch.times, probabilities


class Published:
    """A frame with the published read and bank; `network` too: the published formulas around it."""

    def __init__(self, ours: Ours, case: FrameCase, *, network: bool) -> None:
        self._ours, self._network = ours, network
        self._xmem = case.model == "xmem"
        self._image = ours.image
        self._model: Any = ours.model
        if network:
            self._model = copy.deepcopy(ours.model).to(memory_format=torch.contiguous_format)
            self._image = ours.image.contiguous()
        self._memory = _published_memory(ours, self._xmem)
        self._hidden = ours.state["hidden"] if self._xmem else None
        self._masks = ours.probabilities[:, 1:]

    def frame(self) -> tuple[Times, Tensor]:
        """As `Ours.frame`."""
        watch, model = Watch(), self._model
        features = model.encode(self._image)
        watch.lap("encode")
        read = self._memory.read(features)
        watch.lap("read")
        probabilities = self._decode(read, features)
        watch.lap("decode")
        self._memory.grown(self._value(features), features)
        watch.lap("memorise")
        return watch.times, probabilities

    def _decode(self, read: Tensor, features: Any) -> Tensor:
        if self._xmem:
            if self._network:
                return stcn_frame.xmem_decode(self._model, read, features, self._hidden)
            return self._model.decode(read, features, self._hidden)[0].softmax(1)
        if self._network:
            return stcn_frame.stcn_decode(self._model, read, features)
        return self._model.decode(read, features).softmax(1)

    def _value(self, features: Any) -> Tensor:
        arguments = (self._image, self._masks, features)
        if self._xmem:
            if self._network:
                return stcn_frame.xmem_value(self._model, *arguments, self._hidden)[0]
            return self._model.encode_value(*arguments, self._hidden, deep_update=True)[0]
        if self._network:
            return stcn_frame.stcn_value(self._model, *arguments)
        return self._model.encode_value(*arguments)


class Watch:
    """Milliseconds by stage: `lap` adds what has passed since the last one."""

    def __init__(self) -> None:
        self.times: Times = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + (now - self._last) * 1e3
        self._last = now


@contextmanager
def _time_of(name: str, owners: tuple[Any, ...]) -> Iterator[list[float]]:
    """Collects the milliseconds of each call of the function that all owners have under `name`."""
    function, spent = getattr(owners[0], name), list[float]()

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **options)
        spent.append((time.perf_counter() - begin) * 1e3)
        return result

    for owner in owners:
        setattr(owner, name, timed)
    try:
        yield spent
    finally:
        for owner in owners:
            setattr(owner, name, function)


def _extend(state: dict[str, Any], case: FrameCase) -> None:
    """Makes a long-term memory's state of one frame one of `frames` frames and `prototypes` prototypes.

    Playing 400 remembered frames would give the same sizes; only these matter for the cost.
    """
    area = len(state["key"])
    rows = torch.arange(case.prototypes + case.frames * area) % area
    state["newest_long"] = 0  # the prototypes are from the first frame
    state["frames"] = [number * MEMORY_EVERY for number in range(case.frames)]
    for name in ("key", "shrinkage", "use", "life"):
        state[name] = state[name][rows]
    state["key"] = state["key"] + 0.05 * torch.randn_like(state["key"]) * state["key"].std()
    frames = torch.tensor(state["frames"]).repeat_interleave(area)
    state["frame"] = torch.cat((frames.new_zeros(case.prototypes), frames))[:, None]
    state["selection"] = state["selection"].repeat(case.frames, 1)
    for group in state["groups"]:
        group["value"] = group["value"][rows]


def _repeat(groups: list[dict[str, Any]], frames: int) -> None:
    """Makes the states of AOT's banks, of one frame, those of `frames` frames ever less like the first."""
    for saved in (state for group in groups for state in group["long"]):
        saved["frames"] = [number * MEMORY_EVERY for number in range(frames)]
        saved["travelled"] = [0.0] * frames  # read by policies that thin alone
        for holder, name in ((saved, "key"), (saved["groups"][0], "value")):
            first = holder[name]
            parts = [first + 0.1 * number * first.std() * torch.randn_like(first) for number in range(frames)]
            holder[name] = torch.cat(parts, 2)


def _published_memory(ours: Ours, xmem: bool) -> stcn_frame.GrownMemory:
    """Our memory's content, channel-major."""
    memory, objects = ours.state["memory"], len(ours.ids)
    value = memory["groups"][0]["value"]
    if xmem:
        value = value.unflatten(1, (objects, -1)).permute(1, 2, 0)[None]  # [1, O, Cv, M]
        return stcn_frame.GrownMemory(memory["key"].mT[None], value, memory["shrinkage"].mT[None], 30)
    return stcn_frame.GrownMemory(
        memory["key"].flatten(2), value.unflatten(1, (objects, -1)).flatten(3), None, 20
    )


def implementations(ours: Ours, case: FrameCase) -> dict[str, Ours | Published | PublishedLSTT]:
    """vosops and the peers there are; STM, KMN and SCM have none here and are timed alone."""
    found: dict[str, Ours | Published | PublishedLSTT] = {"vosops": ours}
    if isinstance(ours.model, AOT):
        found["published"] = PublishedLSTT(ours, case, sdpa=False)
        found["published_sdpa"] = PublishedLSTT(ours, case, sdpa=True)
    elif case.model in ("stcn", "xmem"):
        found["eager_read"] = Published(ours, case, network=False)
        found["published"] = Published(ours, case, network=True)
    return found
