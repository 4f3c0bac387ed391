# SPDX-License-Identifier: Apache-2.0
"""A model small enough for thousands of frames, behind the interface of all models: colours are the keys."""

import torch
import torch.nn.functional as F
from torch import nn

import vosops
from vosops.memory import EveryNth, MemoryBank
from vosops.models import Session, VideoModel


class ColourModel(VideoModel):
    """A cell's key is its colours, its value the object's mask in it."""

    def __init__(self, stride=8):
        super().__init__()
        self.stride = stride
        self.sharpness = nn.Parameter(torch.tensor(20.0))

    def forward(self, frames, first_mask):
        raise NotImplementedError

    def open_session(self, settings):
        return ColourSession(self, settings)


class ColourSession(Session):
    def __init__(self, model, settings):
        self.model = model
        self.every = settings.memory_every or 1
        self.bank = MemoryBank(settings.policy or EveryNth(1))
        self.last = 0
        self.calls = []  # what the tracker asked for, in order

    @property
    def object_ids(self):
        return self.bank.object_ids

    @property
    def memory_nbytes(self):
        return self.bank.nbytes

    def encode(self, image):
        self.calls.append("encode")
        return F.avg_pool2d(image, self.model.stride) * self.model.sharpness

    def segment(self, features):
        self.calls.append("segment")
        read = self.bank.read(features, similarity="l2", top_k=4)[0, :, 0]
        size = [side * self.model.stride for side in features.shape[2:]]
        objects = F.interpolate(read[None], size, mode="bilinear", align_corners=False)
        return vosops.soft_aggregate(objects.clamp(0, 1)).softmax(1)

    def remember(self, index, image, features, probabilities, object_ids, *, given):
        self.calls.append(("remember", index, tuple(object_ids), given))
        if given or index - self.last >= self.every:
            masks = F.avg_pool2d(probabilities[:, 1:], self.model.stride)
            self.bank.append(index, features, masks[:, :, None], object_ids)
            self.last = index

    def remove(self, object_ids):
        self.bank.remove(object_ids)

    def state_dict(self):
        return {"memory": self.bank.state_dict(), "last": self.last}

    def load_state_dict(self, state):
        self.bank.load_state_dict(state["memory"])
        self.last = state["last"]
