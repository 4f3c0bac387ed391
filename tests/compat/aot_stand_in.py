# SPDX-License-Identifier: Apache-2.0
"""Modules with the constructors, parameter names and attributes of the published AOT code, but without its
computations: `forward` says that it was called, so that a test sees which of the two ran."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vosops.compat import aot
from vosops.compat.patching import CodeBase, source_digest


def published(self: nn.Module, *inputs: Any) -> Any:
    """Stands for the published computation."""
    return "published", inputs


class MultiheadAttention(nn.Module):
    forward = published

    def __init__(
        self,
        d_model: int,
        num_head: int = 8,
        dropout: float = 0.0,
        use_linear: bool = True,
        d_att: int | None = None,
        use_dis: bool = False,
        qk_chunks: int = 1,
        max_mem_len_ratio: float = -1,
        top_k: int = -1,
    ) -> None:
        super().__init__()
        self.num_head, self.use_linear, self.use_dis, self.top_k = num_head, use_linear, use_dis, top_k
        self.qk_chunks, self.max_mem_len_ratio = qk_chunks, float(max_mem_len_ratio)
        self.T = (d_att or d_model // num_head) ** 0.5
        if use_linear:
            self.linear_Q, self.linear_K, self.linear_V = (nn.Linear(d_model, d_model) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(d_model, d_model)


class MultiheadLocalAttention(nn.Module):
    """V1, V2 and V3: they have the same parameters."""

    def __init__(
        self,
        d_model: int,
        num_head: int,
        dropout: float = 0.0,
        max_dis: int = 7,
        dilation: int = 1,
        use_linear: bool = True,
        use_dis: bool = False,
    ) -> None:
        super().__init__()
        self.num_head, self.dilation, self.use_linear, self.use_dis = num_head, dilation, use_linear, use_dis
        self.window_size = 2 * max_dis + 1
        self.T = (d_model // num_head) ** 0.5
        offsets = self.window_size**2
        if use_linear:
            self.linear_Q, self.linear_K, self.linear_V = (nn.Conv2d(d_model, d_model, 1) for _ in range(3))
        self.relative_emb_k = nn.Conv2d(d_model, num_head * offsets, 1, groups=num_head)
        self.relative_emb_v = nn.Parameter(torch.zeros(num_head, d_model // num_head, offsets))
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(d_model, d_model)


class MultiheadLocalAttentionV1(MultiheadLocalAttention):
    forward = published


class MultiheadLocalAttentionV2(MultiheadLocalAttention):
    forward = published


class MultiheadLocalAttentionV3(MultiheadLocalAttention):
    forward = published


class DWConv2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)

    def forward(self, x: Tensor, size_2d: tuple[int, int]) -> Tensor:
        """A depthwise convolution of tokens [HW, B, C]."""
        return self.conv(x.unflatten(0, size_2d).permute(2, 3, 0, 1)).flatten(2).permute(2, 0, 1)


class GatedPropagation(nn.Module):
    forward = published

    def __init__(
        self,
        d_qk: int,
        d_vu: int,
        num_head: int = 8,
        dropout: float = 0.0,
        use_linear: bool = True,
        d_att: int | None = None,
        use_dis: bool = False,
        max_mem_len_ratio: float = -1,
        top_k: int = -1,
        expand_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        width, d_att = int(d_vu * expand_ratio), d_att or d_qk // num_head
        self.num_head, self.use_linear, self.use_dis, self.top_k = num_head, use_linear, use_dis, top_k
        self.d_vu, self.max_mem_len_ratio, self.T = d_vu, float(max_mem_len_ratio), d_att**0.5
        if use_linear:
            self.linear_QK = nn.Linear(d_qk, d_att * num_head)
            for name in ("V1", "V2", "U1", "U2"):
                setattr(self, f"linear_{name}", nn.Linear(d_vu // 2, width // 2))
        self.dropout = nn.Dropout(dropout)
        self.dw_conv = DWConv2d(width)
        self.projection = nn.Linear(width, d_vu)


class LocalGatedPropagation(nn.Module):
    forward = published

    def __init__(
        self,
        d_qk: int,
        d_vu: int,
        num_head: int,
        dropout: float = 0.0,
        max_dis: int = 7,
        dilation: int = 1,
        use_linear: bool = True,
        d_att: int | None = None,
        use_dis: bool = False,
        expand_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        width, d_att = int(d_vu * expand_ratio), d_att or d_qk // num_head
        self.num_head, self.dilation, self.use_linear, self.use_dis = num_head, dilation, use_linear, use_dis
        self.window_size, self.T = 2 * max_dis + 1, d_att**0.5
        if use_linear:
            self.linear_QK = nn.Conv2d(d_qk, d_att * num_head, 1)
            self.linear_V, self.linear_U = (nn.Conv2d(d_vu, width, 1, groups=2) for _ in range(2))
        offsets = num_head * self.window_size**2
        self.relative_emb_k = nn.Conv2d(d_att * num_head, offsets, 1, groups=num_head)
        self.dropout = nn.Dropout(dropout)
        self.dw_conv = DWConv2d(width)
        self.projection = nn.Linear(width, d_vu)


class GatedPropagationModule(nn.Module):
    forward = published

    def __init__(self, d_model: int, layer_idx: int = 0) -> None:
        super().__init__()
        width = 2 * d_model
        self.d_model, self.att_nhead, self.d_att, self.expand_d_model = d_model, 1, d_model // 2, width
        self.norm1, self.norm2, self.id_norm2 = (nn.LayerNorm(d_model) for _ in range(3))
        self.linear_QV = nn.Linear(d_model, self.d_att + width)
        self.linear_U = nn.Linear(d_model, width)
        self.linear_ID_V = nn.Linear(d_model * (2 if layer_idx else 1), width)
        if layer_idx:
            self.id_norm1 = nn.LayerNorm(d_model)
            self.linear_ID_U = nn.Linear(d_model, width)
        gated = {"d_qk": d_model, "d_vu": width, "num_head": 1, "use_linear": False, "d_att": self.d_att}
        self.long_term_attn = GatedPropagation(**gated)
        self.short_term_attn = LocalGatedPropagation(**gated)
        self.self_attn = GatedPropagation(width, width, 1, d_att=self.d_att)
        self.lst_dropout, self.droppath, self.droppath_lst = nn.Dropout(0.0), nn.Identity(), False

    def fuse_key_value_id(self, key: None, value: Tensor | None, id_emb: Tensor) -> tuple[None, Tensor]:
        """The identity value of a frame."""
        joined = id_emb if value is None else torch.cat((value, id_emb), 2)
        return None, functional.silu(self.linear_ID_V(joined))


class AOTEngine(SimpleNamespace):
    """What holds the long-term memory."""

    training = False
    long_term_memories: Any = None

    def update_long_term_memory(self, new_long_term_memories: Any) -> None:
        """The published growth of the memory: newest first."""
        kept = self.long_term_memories
        self.long_term_memories = [
            [None if x is None else torch.cat((x, y)) for x, y in zip(*layers, strict=True)]
            for layers in zip(new_long_term_memories, kept, strict=True)
        ]


@contextmanager
def code_base() -> Iterator[CodeBase]:
    """The stand-ins as imported modules, and a code base that knows their sources; not enabled."""
    package = "stand_in.networks"
    targets = []
    for target in aot.CODE_BASE.targets:
        name, _, method = target.name.partition(".")
        module = sys.modules.setdefault(f"{package}.{target.module}", ModuleType(target.module))
        setattr(module, name, globals()[name])
        targets.append(replace(target, digests=(source_digest(getattr(globals()[name], method)),)))
    code = CodeBase("stand-in", "nowhere", package, tuple(targets))
    try:
        yield code
    finally:
        code.disable()
        for target in targets:
            sys.modules.pop(f"{package}.{target.module}", None)
