# SPDX-License-Identifier: Apache-2.0
"""The published AOT and DeAOT code made to call vosops: attentions, gated propagation, long-term memory.

The modules stay, so state dicts and checkpoints do too. Attentions return None in place of their attention
matrix, which their callers drop. AOT runs without `spatial_correlation_sampler`: the attention that the
published code falls back to without it (V3) raises an error there, and computes here what the other does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.attention import attention
from ..ops.local_attention import local_attention
from .patching import CodeBase, Target
from .report import Report

_Forward = Callable[..., Any]
_Memory = list[Tensor | None]  # of one layer: AOT [K, V], DeAOT [K, V, None, ID_V], each [T * HW, B, C]


def multihead_attention(published: _Forward) -> _Forward:
    """MultiheadAttention.forward(Q, K, V), AOT's self- and long-term attention, on `vosops.attention`.

    Q [Tq, B, C], K and V [Tk, B, C] -> (out [Tq, B, C], None). top_k, use_dis and max_mem_len_ratio are
    honoured; qk_chunks, which saved memory, has nothing left to do.
    """

    def forward(self: Any, Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor | None]:  # noqa: N803
        if _drops(self):
            return published(self, Q, K, V)
        if self.use_linear:
            Q, K, V = self.linear_Q(Q), self.linear_K(K), self.linear_V(V)  # noqa: N806
        return self.projection(_attend(self, Q, K, (V,))[0]), None

    return forward


def multihead_local_attention(published: _Forward) -> _Forward:
    """MultiheadLocalAttentionV1/V2/V3.forward(q, k, v), AOT's short-term attention, on `local_attention`.

    q, k, v [B, C, H, W] -> (out [H * W, B, C], None). One formula serves all three: V2 is what published
    models use, V3 what they use without the correlation extension, V1 an older form.
    """

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        if _drops(self) or self.dilation != 1:
            return published(self, q, k, v)
        if self.use_linear:
            q, k, v = self.linear_Q(q), self.linear_K(k), self.linear_V(v)
        return self.projection(_attend_window(self, q, k, v)), None

    return forward


def gated_propagation(published: _Forward) -> _Forward:
    """GatedPropagation.forward(Q, K, V, U, size_2d), DeAOT's self- and long-term propagation.

    Q [HW, B, Cq], K [Tk, B, Cq], V [Tk, B, Cv] or, from the module around it, a tuple of values that are
    read with one match; U [HW, B, Cv] -> (out [HW, B, d_vu], None).
    """

    def forward(
        self: Any,
        Q: Tensor,  # noqa: N803
        K: Tensor,  # noqa: N803
        V: Tensor | tuple[Tensor, ...],  # noqa: N803
        U: Tensor,  # noqa: N803
        size_2d: tuple[int, int],
    ) -> tuple[Tensor, Tensor | None]:
        if _drops(self):
            return published(self, Q, K, _joined(V), U, size_2d)
        if self.use_linear:
            Q = K = self.linear_QK(Q)  # noqa: N806
            V = _two_branches(self, _joined(V), self.linear_V1, self.linear_V2)  # noqa: N806
            U = _two_branches(self, U, self.linear_U1, self.linear_U2)  # noqa: N806
        # Heads cut through the joined channels, so that only a single one can read the values apart.
        values = V if isinstance(V, tuple) and self.num_head == 1 else (_joined(V),)
        read = _joined(_attend(self, Q, K, values))
        return self.projection(self.dw_conv(read * U, size_2d)), None

    return forward


def local_gated_propagation(published: _Forward) -> _Forward:
    """LocalGatedPropagation.forward(q, k, v, u, size_2d), DeAOT's short-term propagation.

    q, k [B, Cq, H, W], v [B, Cv, H, W], u [H * W, B, Cv] ([B, Cu, H, W] with use_linear) ->
    (out [H * W, B, d_vu], None).
    """

    def forward(
        self: Any, q: Tensor, k: Tensor, v: Tensor, u: Tensor, size_2d: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]:
        if _drops(self) or self.dilation != 1:
            return published(self, q, k, v, u, size_2d)
        if self.use_linear:
            q = k = self.linear_QK(q)
            v, u = F.silu(self.linear_V(v)), F.silu(self.linear_U(u))
            if self.num_head > 1:
                v, u = _heads_first(v, self.num_head), _heads_first(u, self.num_head)
            u = u.flatten(2).permute(2, 0, 1)
        return self.projection(self.dw_conv(_attend_window(self, q, k, v) * u, size_2d)), None

    return forward


def gated_propagation_module(published: _Forward) -> _Forward:
    """GatedPropagationModule.forward, a layer of DeAOT, reading visual and identity memory with one match.

    The published layer joins the two memories first: a copy of all long-term values in every frame.

    tgt [HW, B, C] and tgt_id (None in the first layer); memories [K, V, None, ID_V], or curr_id_emb
    [HW, B, C] for a frame that is its own memory -> (tgt, tgt_id, [current, long, short] memories).
    """

    def forward(
        self: Any,
        tgt: Tensor,
        tgt_id: Tensor | None = None,
        long_term_memory: _Memory | None = None,
        short_term_memory: _Memory | None = None,
        curr_id_emb: Tensor | None = None,
        self_pos: Tensor | None = None,
        size_2d: tuple[int, int] = (30, 30),
    ) -> Any:
        drops = _drops(self.long_term_attn) or _drops(self.short_term_attn)
        if drops or self.att_nhead != 1:
            inputs = (tgt, tgt_id, long_term_memory, short_term_memory, curr_id_emb, self_pos, size_2d)
            return published(self, *inputs)

        def as_map(tokens: Tensor) -> Tensor:
            return tokens.unflatten(0, size_2d).permute(2, 3, 0, 1).contiguous()

        visual = self.norm1(tgt)
        query, value = self.linear_QV(visual).split([self.d_att, self.expand_d_model], dim=2)
        value, gate = F.silu(value), self.linear_U(visual)
        identity = None if tgt_id is None else self.id_norm1(tgt_id)
        if identity is None:
            gates = torch.cat((F.silu(gate), torch.ones_like(gate)), -1)
        else:
            gates = F.silu(torch.cat((gate, self.linear_ID_U(identity)), -1))
        current: _Memory = [query, value, None, identity]
        if curr_id_emb is not None:
            identity_value = self.fuse_key_value_id(None, identity, curr_id_emb)[1]
            long_term_memory = [query, value, None, identity_value]
            short_term_memory = [as_map(query), as_map(value), None, as_map(identity_value)]
        assert long_term_memory is not None
        assert short_term_memory is not None
        key, *values = (x for x in long_term_memory if x is not None)
        near_key, *near_values = (x for x in short_term_memory if x is not None)

        far = self.long_term_attn(query, key, tuple(values), gates, size_2d)[0]
        near = self.short_term_attn(as_map(query), near_key, torch.cat(near_values, 1), gates, size_2d)[0]
        drop = self.droppath if self.droppath_lst else self.lst_dropout
        width = self.d_model
        found, found_id = (drop(part) for part in (far + near).split(width, -1))
        tgt, tgt_id = tgt + found, (0 if tgt_id is None else tgt_id) + found_id

        both = torch.cat((self.norm2(tgt), self.id_norm2(tgt_id)), -1)
        found, found_id = self.self_attn(both, both, both, both, size_2d)[0].split(width, -1)
        tgt, tgt_id = tgt + self.droppath(found), tgt_id + self.droppath(found_id)
        return tgt, tgt_id, [current, long_term_memory, short_term_memory]

    return forward


def update_long_term_memory(published: _Forward) -> _Forward:
    """AOTEngine.update_long_term_memory(new) in buffers that have room, instead of copying all that is kept.

    engine.long_term_memories stays what it was, lists per layer of [T * HW, B, C] tensors, newest first;
    they are views of the buffers. Where autograd runs through them, the published concatenation stays.
    """

    def update(self: Any, new_long_term_memories: Any) -> None:
        kept = self.long_term_memories
        tensors = [
            x for memories in (new_long_term_memories, kept or ()) for layer in memories for x in layer
        ]
        recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        if kept is None or recorded:
            published(self, new_long_term_memories)
            return
        self.long_term_memories = [
            [
                None if new is None or old is None else _prepend(new, old)
                for new, old in zip(new_layer, old_layer, strict=True)
            ]
            for new_layer, old_layer in zip(new_long_term_memories, kept, strict=True)
        ]

    return update


# The newest view of a buffer -> the buffer. A list that is kept from earlier is no key any more, and what is
# added to it starts a buffer of its own: no list ever changes under its holder.
_buffers = WeakTensorKeyDictionary()


def _prepend(new: Tensor, old: Tensor) -> Tensor:
    """torch.cat((new, old)) as a view of a buffer that holds `old` at its end.

    Cost: len(new) rows copied, and all rows whenever the buffer, half as large again, is full.
    """
    if (new.shape[1:], new.device) != (old.shape[1:], old.device):
        return torch.cat((new, old))  # raises its own error
    dtype = torch.promote_types(new.dtype, old.dtype)
    buffer: Tensor | None = _buffers.pop(old, None)
    start = 0 if buffer is None else len(buffer) - len(old) - len(new)
    # A buffer made in inference mode could never be written outside of it.
    with torch.inference_mode(False), torch.no_grad():
        if buffer is None or buffer.dtype != dtype or start < 0:
            rows = (len(new) + len(old)) * 3 // 2
            buffer = torch.empty((rows, *old.shape[1:]), dtype=dtype, device=old.device)
            buffer[rows - len(old) :].copy_(old)
            start = rows - len(old) - len(new)
        buffer[start : start + len(new)].copy_(new)
        view = buffer[start:]
    _buffers[view] = buffer
    return view


def _drops(module: Any) -> bool:
    """Whether dropout changes the attention: then the published code, which has the matrix, computes it."""
    dropout = module.dropout
    rate = dropout.p if isinstance(dropout, nn.Dropout) else dropout.drop_prob
    return bool(module.training and rate)


def _attend(module: Any, query: Tensor, key: Tensor, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Multi-head attention with the options of a published module.  # [T, B, C], values too"""
    scale, top_k = 1 / module.T, None
    if not module.training:
        ratio, limit = len(key) / len(query), getattr(module, "max_mem_len_ratio", -1)
        if limit > 0 and ratio > limit:
            scale *= math.log(ratio) / math.log(limit)
        top_k = module.top_k if getattr(module, "top_k", -1) > 0 else None
    reads = attention(
        query.transpose(0, 1),
        key.transpose(0, 1),
        tuple(value.transpose(0, 1) for value in values),
        num_heads=module.num_head,
        scale=scale,
        top_k=top_k,
        distance=getattr(module, "use_dis", False),  # the earliest version has none of the three
    )
    return tuple(read.transpose(0, 1) for read in reads)


def _attend_window(module: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Window attention with the relative terms of a published module.  # [B, C, H, W] -> [H * W, B, Cv]"""
    weight = module.relative_emb_k.weight.flatten(1)  # [h * window^2, C / h]
    scale = 1 / module.T
    if getattr(module, "use_dis", False):
        # 2 s - |k|^2 as an inner product of one channel more, which the relative term does not see.
        key = key.unflatten(1, (module.num_head, -1))
        norms = key.float().square().sum(2, keepdim=True) * (-1 / (2 * scale))
        query = query.unflatten(1, (module.num_head, -1))
        query = torch.cat((query, torch.ones_like(query[:, :, :1])), 2).flatten(1, 2)
        key, weight, scale = (
            torch.cat((key.float(), norms), 2).flatten(1, 2),
            F.pad(weight, (0, 1)),
            2 * scale,
        )
    read = local_attention(
        query,
        key,
        value,
        num_heads=module.num_head,
        window=module.window_size,
        relative_weight=weight,
        relative_offset=module.relative_emb_k.bias,
        relative_value=getattr(module, "relative_emb_v", None),
        scale=scale,
    )
    return read.flatten(2).permute(2, 0, 1)


def _joined(parts: Tensor | tuple[Tensor, ...]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _two_branches(module: Any, x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    """Both halves of the channels projected; a head gets a share of both.  # [T, B, 2 c] -> [T, B, 2 e]"""
    halves = x.split(module.d_vu // 2, -1)
    parts = [
        linear(half).unflatten(-1, (module.num_head, -1))
        for linear, half in zip((first, second), halves, strict=True)
    ]
    return F.silu(torch.cat(parts, -1).flatten(2))


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    """Channels (branch, head, c) as (head, branch, c).  # [B, C, H, W]"""
    return x.unflatten(1, (2, num_heads, -1)).transpose(1, 2).flatten(1, 3)


_ATTENTION, _TRANSFORMER, _ENGINE = "layers.attention", "layers.transformer", "engines.aot_engine"


def _target(module: str, name: str, replacement: _Forward, *digests: str) -> Target:
    return Target(module, name, replacement, digests, wraps=True)


class _Report(Report):
    """Says as well where what was replaced differs from the published pieces."""

    notes = (
        "attentions return None in place of the attention matrix, which no published caller reads",
        "MultiheadLocalAttentionV1 and V3, which raise an error as published, compute what V2 does",
    )

    def __str__(self) -> str:
        return "\n".join((super().__str__(), *(f"  note      {note}" for note in self.notes)))


class _CodeBase(CodeBase):
    def enable(self) -> Report:
        report = super().enable()
        return _Report(report.code_base, report.entries, report._undo)


# The digests are those of the main branch: from the release of DeAOT (December 2022) on, and before it.
CODE_BASE = _CodeBase(
    "AOT",
    "github.com/yoxu515/aot-benchmark",
    "networks.engines",
    (
        _target(
            _ATTENTION, "MultiheadAttention.forward", multihead_attention, "9d45e3437a7c", "0e9ea63c7543"
        ),
        *(
            _target(
                _ATTENTION, f"MultiheadLocalAttention{version}.forward", multihead_local_attention, *digests
            )
            for version, digests in (
                ("V1", ("6a76f6fe6ef0", "d2eadb6406cb")),
                ("V2", ("51f6cc699acd", "197c37d5d724")),
                ("V3", ("f306eb5de786", "8b882e2c2121")),
            )
        ),
        _target(_ATTENTION, "GatedPropagation.forward", gated_propagation, "e9f1fad831ae"),
        _target(
            _ATTENTION,
            "LocalGatedPropagation.forward",
            local_gated_propagation,
            "4b53d5cc60e3",
            "6bce8f1e5fd0",
        ),
        _target(_TRANSFORMER, "GatedPropagationModule.forward", gated_propagation_module, "2704b823ce1c"),
        _target(
            _ENGINE,
            "AOTEngine.update_long_term_memory",
            update_long_term_memory,
            "3e902a9d9969",
            "af489b42e0d8",
        ),
    ),
    kept=(
        (
            "attention dropout in training",
            "it needs the attention matrix; published configurations have none",
        ),
        ("dilated windows", "the published code takes scores and values from different positions there"),
    ),
)


def enable() -> Report:
    """Let the imported AOT and DeAOT code call vosops; see `vosops.compat.patching.CodeBase.enable`.

    A call in which attention dropout is active (0 in every published configuration), or with a dilated
    window, is left to the published code.
    """
    return CODE_BASE.enable()


def disable() -> None:
    """Put the published code back."""
    CODE_BASE.disable()
