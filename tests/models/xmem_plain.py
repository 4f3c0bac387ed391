# SPDX-License-Identifier: Apache-2.0
"""XMem once more, plainly: convolutions by name out of a state dict, concatenations, dense affinities.

Written from the equations of the paper and the layer lists of the published checkpoints, object by object,
sharing nothing with vosops.models but the names of the weights.
"""

import torch
import torch.nn.functional as F


class PlainXMem:
    """The network as functions of a state dict, and the published loop over frames with a growing memory."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def bn(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, training=False)

    def residual(self, name, x):
        """ResBlock of the published code: activation before convolution."""
        y = self.conv(f"{name}.conv2", F.relu(self.conv(f"{name}.conv1", F.relu(x))))
        return y + (self.conv(f"{name}.downsample", x) if f"{name}.downsample.weight" in self.state else x)

    def trunk(self, name, x, stages):
        x = F.relu(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x, 2)))
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for number, stage in enumerate(stages):
            block = 0
            while f"{name}.{stage}.{block}.conv1.weight" in self.state:
                x = self.trunk_block(f"{name}.{stage}.{block}", x, 2 if number and not block else 1)
                block += 1
            maps.append(x)
        return maps

    def trunk_block(self, name, x, stride):
        deep = f"{name}.conv3.weight" in self.state  # a bottleneck has its stride in the 3x3 convolution
        y = F.relu(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", x, 1 if deep else stride)))
        y = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", y, stride if deep else 1))
        if deep:
            y = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", F.relu(y)))
        if f"{name}.downsample.0.weight" in self.state:
            x = self.bn(f"{name}.downsample.1", self.conv(f"{name}.downsample.0", x, stride))
        return F.relu(x + y)

    def fuse(self, name, x):
        x = self.residual(f"{name}.block1", x)
        gate = f"{name}.attention.ChannelGate.mlp"

        def mlp(pooled):
            pooled = F.relu(F.linear(pooled, self.state[f"{gate}.1.weight"], self.state[f"{gate}.1.bias"]))
            return F.linear(pooled, self.state[f"{gate}.3.weight"], self.state[f"{gate}.3.bias"])

        y = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[..., None, None]
        pooled = torch.cat((y.amax(1, keepdim=True), y.mean(1, keepdim=True)), 1)
        y = y * torch.sigmoid(self.conv(f"{name}.attention.SpatialGate.spatial.conv", pooled))
        return self.residual(f"{name}.block2", x + y)

    def gate(self, name, x, hidden):
        forget, update, new = self.conv(f"{name}.transform", torch.cat((x, hidden), 1)).chunk(3, 1)
        forget, update = torch.sigmoid(forget), torch.sigmoid(update)
        return forget * hidden * (1 - update) + update * torch.tanh(new)

    def encode(self, image):
        """key, shrinkage, selection, [f4, f8, f16]"""
        maps = self.trunk("key_encoder", image, ("res2", "layer2", "layer3"))
        key, d, e = (self.conv(f"key_proj.{name}", maps[2]) for name in ("key_proj", "d_proj", "e_proj"))
        return key, d * d + 1, torch.sigmoid(e), maps

    def encode_value(self, image, f16, masks, number):
        """The value of one object; masks (1, O, H, W)."""
        others = sum(
            (masks[:, i] for i in range(masks.shape[1]) if i != number), torch.zeros_like(masks[:, 0])
        )
        x = torch.cat((image, masks[:, number][:, None], others[:, None]), 1)
        x = self.trunk("value_encoder", x, ("layer1", "layer2", "layer3"))[2]
        return self.fuse("value_encoder.fuser", torch.cat((f16, x), 1))

    def upsample(self, name, skip, x):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.residual(f"{name}.out_conv", self.conv(f"{name}.skip_conv", skip) + x)

    def decode(self, maps, read, hidden):
        """Logits (1, 1, H, W) of one object, and its sensory memory."""
        known = read if hidden is None else torch.cat((read, hidden), 1)
        x16 = self.fuse("decoder.fuser", torch.cat((maps[2], known), 1))
        x8 = self.upsample("decoder.up_16_8", maps[1], x16)
        x4 = self.upsample("decoder.up_8_4", maps[0], x8)
        logits = self.conv("decoder.pred", F.relu(x4))
        if hidden is not None:
            update = "decoder.hidden_update"
            x4 = torch.cat((x4, logits), 1)
            x = self.conv(f"{update}.g16_conv", x16)
            x = x + self.conv(f"{update}.g8_conv", F.interpolate(x8, scale_factor=0.5, mode="area"))
            x = x + self.conv(f"{update}.g4_conv", F.interpolate(x4, scale_factor=0.25, mode="area"))
            hidden = self.gate(update, x, hidden)
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False), hidden

    @staticmethod
    def read(key, selection, memory, values, top_k):
        """Eq. 2 of the paper, every term written out, then the softmax over the top_k of every query."""
        memory_key, shrinkage = (torch.cat([m[i].flatten(2) for m in memory], 2) for i in (0, 1))
        difference = memory_key[..., None] - key.flatten(2)[:, :, None]  # [1, Ck, M, Q]
        scores = -(selection.flatten(2)[:, :, None] * difference.square()).sum(1)
        scores = scores * shrinkage[0, 0][:, None] / key.shape[1] ** 0.5  # [1, M, Q]
        if top_k < scores.shape[1]:
            scores = scores.masked_fill(scores < scores.topk(top_k, 1).values[:, -1:], -torch.inf)
        value = torch.cat([v.flatten(2) for v in values], 2)  # [1, Cv, M]
        return (value @ scores.softmax(1)).unflatten(2, key.shape[2:])

    @staticmethod
    def aggregate(objects):
        odds = torch.cat(((1 - objects).prod(1, keepdim=True), objects), 1).clamp(1e-7, 1 - 1e-7)
        return (odds / (1 - odds)).log().softmax(1)

    def run(self, images, masks, hidden_dim, memory_every, top_k=30):
        """Probabilities of every frame, by the published loop; masks {frame: (1, O, H, W)} of all objects."""
        memory, values, hidden, last, results = [], [], [], 0, []
        for t, image in enumerate(images):
            given, end = t in masks, t == len(images) - 1
            remembers = (given or t - last >= memory_every) and not end
            key, shrinkage, selection, maps = self.encode(image)
            objects = None
            if t > 0:
                decoded = [
                    self.decode(maps, self.read(key, selection, memory[-len(v) :], v, top_k), h)
                    for v, h in zip(values, hidden, strict=True)
                ]
                probabilities = self.aggregate(torch.sigmoid(torch.cat([logits for logits, _ in decoded], 1)))
                objects = probabilities[:, 1:]
                if not remembers and not end:
                    hidden = [new for _, new in decoded]
            if given:
                new = masks[t]
                if objects is not None:
                    new = torch.cat((objects * (new.sum(1, keepdim=True) == 0), new), 1)
                probabilities = self.aggregate(new)
            if remembers:
                memory.append((key, shrinkage))
                objects = probabilities[:, 1:]
                for number in range(objects.shape[1]):
                    if number == len(values):
                        values.append([])
                        empty = key.new_zeros(1, hidden_dim, *key.shape[2:])
                        hidden.append(empty if hidden_dim else None)
                    value = self.encode_value(image, maps[2], objects, number)
                    values[number].append(value)
                    if hidden_dim:
                        hidden[number] = self.gate("value_encoder.hidden_reinforce", value, hidden[number])
                last = t
            results.append(probabilities)
        return results
