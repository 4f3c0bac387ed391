# SPDX-License-Identifier: Apache-2.0
"""AOT and DeAOT: all objects of a frame in one pass, told apart by their identity embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vosops.nn import LSTT, GatedPropagationModule, IdentityBank, LSTTBlock, LSTTBlockV2, Memory, Read
from vosops.nn.attention import as_map, as_tokens
from vosops.nn.identity import sine_position

from .aot_encoders import build_encoder
from .blocks import freeze_batch_norm
from .encoders import normalize_imagenet
from .fpn import FPNDecoder
from .session import SessionSettings, VideoModel, check_clip

if TYPE_CHECKING:
    from .aot_session import AOTSession

HEAD_CHANNELS = 32
IDENTITIES = 10
"""Objects in one pass; more take several, which share the encoder."""


class Features(NamedTuple):
    """What AOT keeps of an image.

    tokens: (B, h * w, C) at stride 16; C = 256 in the published models.
    shortcuts: maps (B, C, ...) of the encoder at strides 4, 8 and 16.
    size: (h, w).
    frame: height and width of the image, at which masks are predicted.
    """

    tokens: Tensor
    shortcuts: tuple[Tensor, Tensor, Tensor]
    size: tuple[int, int]
    frame: tuple[int, int]


class Supervision(NamedTuple):
    """What the published training tells `AOT.forward` of a batch of clips beside their first masks.

    objects: (B,) int64, how many of the O masks each clip has; the logits of the others are -10,000.
    identities: (B, O) int64, the identity that each object takes: 1 to 10, no two alike in a clip.
    labels: (B, T, H, W) integers (0 background, 1..O, 255 ignored) that memories are written with; None for
        the predicted ones.
    reference: the logits of the first frame, which reads itself, come before the others.
    """

    objects: Tensor
    identities: Tensor
    labels: Tensor | None = None
    reference: bool = False


class AOT(VideoModel):
    """Associating Objects with Transformers. Reads checkpoints of the published code (`vosops.models.load`).

    Images are resized to 16 n + 1 pixels a side (16 n for encoders without aligned corners), as published,
    and logits are brought straight to the frame's own size.

    Args:
        encoder: of `build_encoder`, as mobilenetv2, resnet50, swin_base, or timm:NAME.
        layers: blocks of the transformer.
        block: 1, or 2 for `LSTTBlockV2`.
        channels: of tokens, in heads of 32, and of the decoder; 256 in the published models.
        memory_every: the session's default: distance of the frames that enter the long-term memory; None for
            reference frames alone.
        top_k: the session's default: tokens that a query reads of the long-term memory; None for all.
        long_edge: longer images are shrunk to it; the published evaluation uses 1040. None keeps their size.

    Raises:
        ValueError: a bad argument, named.
        ImportError: timm is not installed, for encoders that come from there.

    Note:
        Cost of a frame of AOTL at 481x849: encoder 5 GMAC (MobileNetV2; 28 ResNet-50), blocks 11 and 4.3 for
        every frame of long-term memory, decoder 9; blocks and decoder once for every 10 objects.

    Source: Yang, Wei, Yang: Associating Objects with Transformers for Video Object Segmentation, NeurIPS
    2021. Block 2: LSTT block V2 (see `LSTTBlockV2`).
    """

    def __init__(
        self,
        encoder: str = "mobilenetv2",
        layers: int = 1,
        *,
        block: int = 1,
        channels: int = 256,
        memory_every: int | None = None,
        top_k: int | None = None,
        long_edge: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("layers", layers, 1),
            ("memory_every", memory_every, 1),
            ("top_k", top_k, 1),
            ("long_edge", long_edge, 32),
        ):
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if block not in (1, 2):
            raise ValueError(f"block must be 1 or 2, got {block}")
        if channels < HEAD_CHANNELS or channels % HEAD_CHANNELS:
            raise ValueError(f"channels must be a multiple of {HEAD_CHANNELS}, got {channels}")
        self.channels = channels
        self.memory_every, self.top_k, self.long_edge = memory_every, top_k, long_edge
        self.encoder = build_encoder(encoder)
        self.aligned = self.encoder.align_corners
        self.encoder_projector = nn.Conv2d(self.encoder.channels[-1], channels, 1)
        nn.init.xavier_uniform_(self.encoder_projector.weight)
        self.LSTT, width = self._transformer(layers, block)
        self.decoder = FPNDecoder(
            width,
            1 + IDENTITIES,
            shortcut_channels=self.encoder.channels[:3],
            align_corners=self.aligned,
            channels=channels,
        )
        self.patch_wise_id_bank = IdentityBank(IDENTITIES, channels, aligned=self.aligned)
        self.id_norm = self._identity_norm(block)
        freeze_batch_norm(self)

    def _transformer(self, layers: int, block: int) -> tuple[LSTT | GatedPropagationModule, int]:
        """The transformer, and the channels of all that the decoder gets."""
        kind = LSTTBlockV2 if block == 2 else LSTTBlock
        heads = self.channels // HEAD_CHANNELS
        return LSTT(layers, self.channels, heads, block=kind), self.channels * (layers + 1)

    def _identity_norm(self, block: int) -> nn.LayerNorm | None:
        return nn.LayerNorm(self.channels) if block == 2 else None

    def _position(self, features: Features) -> Tensor | None:
        """What self-attention adds to queries and keys (1, h * w, C)."""
        tokens = features.tokens
        return sine_position(features.size, self.channels, tokens.device).to(tokens.dtype)

    def prepare(self, frame: Tensor) -> Tensor:
        """Normalised, at its own size: `encode` resizes."""
        return normalize_imagenet(frame)

    def prepare_mask(self, mask: Tensor) -> Tensor:
        """As it is."""
        return mask

    def restore(self, probabilities: Tensor, size: tuple[int, int]) -> Tensor:
        """As they are: `decode` gives them at the frame's size."""
        return probabilities

    def combine(self, background: Tensor, objects: Tensor) -> Tensor:
        """Each pixel stays with whom it had: given masks lie over the prediction, as published."""
        together = torch.cat((background, objects), 1)
        total = together.sum(1, keepdim=True)
        # Nothing is left where a corrected object was: background.
        together[:, :1] += total == 0
        return together / torch.where(total == 0, 1.0, total)

    def network_size(self, frame: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image that the encoder gets for a frame of (height, width)."""
        shrink = 1.0 if self.long_edge is None else min(1.0, self.long_edge / max(frame))
        sides = (
            max(round((int(side * shrink) - self.aligned) / self.stride), 1) * self.stride + self.aligned
            for side in frame
        )
        height, width = sides
        return height, width

    def encode(self, image: Tensor) -> Features:
        """Features of prepared images (B, 3, H, W)."""
        frame = (image.shape[2], image.shape[3])
        size = self.network_size(frame)
        if size != frame:
            image = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
        x4, x8, x16, last = self.encoder(image)
        projected = self.encoder_projector(last)
        return Features(as_tokens(projected), (x4, x8, x16), projected.shape[2:], frame)

    def embed(self, mask: Tensor, features: Features) -> Tensor:
        """Identity embedding (B, h * w, C) of a mask at the frame's size.

        Args:
            mask: (B, H, W) integer labels, 0 to 10 (255 ignored), or (B, 11, H, W) soft masks.
        """
        size = self.network_size(features.frame)
        if size != features.frame:
            # Labels are brought to the network's size as published: nearest, never a mixture of two.
            maps = mask if mask.is_floating_point() else mask[:, None].float()
            maps = F.interpolate(maps, size=size, mode="nearest")
            mask = maps if mask.is_floating_point() else maps[:, 0].to(mask.dtype)
        identity = self.patch_wise_id_bank(mask)
        return identity if self.id_norm is None else self.id_norm(identity)

    def propagate(
        self,
        features: Features,
        reads: list[Read] | None,
        identity: Tensor | None,
        top_k: int | None = None,
    ) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
        """Features through the transformer (`LSTT.forward`)."""
        position = self._position(features)
        return self.LSTT(features.tokens, reads, identity, size=features.size, position=position, top_k=top_k)

    def decode(self, outputs: list[Tensor], features: Features, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (B, 1 + O, H, W) at the frame's size, background first, of `propagate`'s outputs.

        Args:
            select: from the logits (B, 11, h, w) of all identities to those of the objects (B, 1 + O, h, w).
        """
        logits = select(self.decode_identities(outputs, features)).float()
        return F.interpolate(logits, size=features.frame, mode="bilinear", align_corners=self.aligned)

    def decode_identities(self, outputs: list[Tensor], features: Features) -> Tensor:
        """Logits (B, 11, ...) of the background and every identity at stride 4."""
        maps = [as_map(x, features.size) for x in self._decoder_inputs(outputs, features)]
        return self.decoder(maps, features.shortcuts)

    def _decoder_inputs(self, outputs: list[Tensor], features: Features) -> list[Tensor]:
        return [features.tokens, *outputs]

    def forward(self, frames: Tensor, first_mask: Tensor, supervision: Supervision | None = None) -> Tensor:
        """Training: see `VideoModel.forward`; memories are written with the predicted labels.

        The first frame and, for models with `memory_every`, every second frame after it are the long-term
        memory, as in the published training.

        Args:
            frames, first_mask: as of `VideoModel.forward`.
            supervision: other identities than 1..O, clips of fewer objects, memories written with given
                labels, and the first frame's own logits: then (B, T, 1+O, H, W).

        Raises:
            ValueError: more than 10 objects.
        """
        check_clip(frames, first_mask)
        batch, time = frames.shape[:2]
        objects = first_mask.shape[1]
        if objects > IDENTITIES:
            raise ValueError(f"first_mask must have at most {IDENTITIES} objects, got {objects}")
        roles = _Roles(first_mask, supervision)
        encoded = self.encode(normalize_imagenet(frames).flatten(0, 1))
        features = [_frame(encoded, batch, t) for t in range(time)]
        identity = self.embed(roles.soft(first_mask), features[0])
        outputs, currents = self.propagate(features[0], None, identity)
        short = long = self.LSTT.memorise(currents, identity)
        results, last = [], 0
        if supervision is not None and supervision.reference:
            results.append(self.decode(outputs, features[0], roles.logits))
        for t in range(1, time):
            reads = [Read(*pair) for pair in zip(long, short, strict=True)]
            outputs, currents = self.propagate(features[t], reads, None)
            results.append(self.decode(outputs, features[t], roles.logits))
            if t == time - 1:
                break
            given = None if supervision is None else supervision.labels
            labels = results[-1].argmax(1) if given is None else given[:, t].long()
            identity = self.embed(roles.labels(labels), features[t])
            short = self.LSTT.memorise(currents, identity)
            if self.memory_every is not None and t - last >= _TRAINING_GAP:
                long = [_joined(new, old) for new, old in zip(short, long, strict=True)]
                last = t
        return torch.stack(results, 1)

    def open_session(self, settings: SessionSettings) -> AOTSession:
        """As published: the reference frames and, for the models with `memory_every`, every such frame."""
        from .aot_session import AOTSession

        return AOTSession(self, settings)


class DeAOT(AOT):
    """Decoupling Features in Hierarchical Propagation: a visual and an identity branch share one match.

    Args:
        encoder, layers, memory_every, top_k, long_edge: as of `AOT`.

    Note:
        Cost of a frame of R50-DeAOTL at 481x849: encoder 28 GMAC, blocks 26 and 10 for every frame of
        long-term memory, decoder 9.

    Source: Yang, Yang: Decoupling Features in Hierarchical Propagation for Video Object Segmentation, NeurIPS
    2022.
    """

    def __init__(
        self,
        encoder: str = "mobilenetv2",
        layers: int = 1,
        *,
        memory_every: int | None = None,
        top_k: int | None = None,
        long_edge: int | None = None,
    ) -> None:
        super().__init__(encoder, layers, memory_every=memory_every, top_k=top_k, long_edge=long_edge)

    def _transformer(self, layers: int, block: int) -> tuple[LSTT | GatedPropagationModule, int]:
        return GatedPropagationModule(layers, self.channels), 2 * self.channels

    def _identity_norm(self, block: int) -> nn.LayerNorm | None:
        return nn.LayerNorm(self.channels)

    def _position(self, features: Features) -> Tensor | None:
        return None

    def _decoder_inputs(self, outputs: list[Tensor], features: Features) -> list[Tensor]:
        return outputs


_TRAINING_GAP = 2
_ABSENT = -1e4  # a logit; the softmax of it is 0 in every dtype


class _Roles:
    """Which identity every object of a clip takes, and which objects there are."""

    def __init__(self, first_mask: Tensor, supervision: Supervision | None) -> None:
        batch, objects = first_mask.shape[:2]
        device = first_mask.device
        background = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        if supervision is None:
            identities = torch.arange(1, 1 + objects, device=device).expand(batch, -1)
            self._absent = None
        else:
            identities = supervision.identities
            self._absent = torch.arange(1 + objects, device=device) > supervision.objects[:, None]
        self._channels = torch.cat((background, identities), 1)  # [B, 1 + O]

    def soft(self, masks: Tensor) -> Tensor:
        """Masks (B, O, H, W) as soft masks (B, 11, H, W) of the identities."""
        background = (1 - masks.sum(1, keepdim=True)).clamp(min=0)
        together = torch.cat((background, masks), 1)
        spread = together.new_zeros(len(masks), 1 + IDENTITIES, *masks.shape[2:])
        return spread.scatter(1, self._index(together), together)

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (B, H, W) int64 of objects as labels of identities."""
        table = F.pad(self._channels, (0, 256 - self._channels.shape[1]), value=255)
        return table.gather(1, labels.flatten(1)).view_as(labels)

    def logits(self, logits: Tensor) -> Tensor:
        """Logits (B, 11, h, w) of identities as those of the objects (B, 1 + O, h, w)."""
        chosen = logits.gather(1, self._index(logits))
        return chosen if self._absent is None else chosen.masked_fill(self._absent[..., None, None], _ABSENT)

    def _index(self, like: Tensor) -> Tensor:
        return self._channels[..., None, None].expand(-1, -1, *like.shape[2:])


def _frame(encoded: Features, batch: int, t: int) -> Features:
    """Frame t of features whose batch is (B, T)."""

    def pick(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, -1))[:, t]

    x4, x8, x16 = (pick(x) for x in encoded.shortcuts)
    return encoded._replace(tokens=pick(encoded.tokens), shortcuts=(x4, x8, x16))


def _joined(new: Memory, old: Memory) -> Memory:
    return Memory(*(torch.cat(pair, 1) for pair in zip(old, new, strict=True)))
