# SPDX-License-Identifier: Apache-2.0
"""Attention against its peers: inputs, correctness, memory estimates, arithmetic limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vosops

from . import measure
from .case import DTYPES, Job, Operator, Settings, relative_error
from .peers import multihead

_PEERS: dict[str, Callable[..., Any]] = {
    "eager": multihead.attention,
    "smart_eager": multihead.attention_smart,
    "sdpa": multihead.attention_sdpa,
}
# Relative to the largest element. Low precision rounds the weights and, in the peers, the scores.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
_SCORE_BAND = 1e-4  # two scores this close may be ranked either way in float32
_REFERENCE_QUERIES = 64  # of the float64 reference, drawn at random


@dataclass(frozen=True)
class AttentionShape:
    """One attention call of one sequence; every size counts elements.

    Args:
        name: what `--shape` takes.
        stands_for: the published layer whose call this is.
        queries: Q, tokens of a frame: 31 x 54 at 480p, where AOT's models take 481 x 849 pixels.
        memory: M.
        channels: C, of query and key.
        values: Cv of every value tensor read with one match.
        num_heads: h.
        top_k: positions kept per query and head; None reads densely.
        modulated: identity and a gate per head are given (LSTT block V2).
    """

    name: str
    stands_for: str
    queries: int
    memory: int
    channels: int = 256
    values: tuple[int, ...] = (256,)
    num_heads: int = 8
    top_k: int | None = None
    modulated: bool = False


_Q = 31 * 54
_STANDARD = (
    AttentionShape("lt-aotl-t1", "AOT, long-term attention, 1 memory frame", _Q, _Q),
    AttentionShape("lt-aotl-t10", "AOT, long-term attention, 10 memory frames", _Q, 10 * _Q),
    AttentionShape("lt-aotl-t10-k32", "the same, top-32", _Q, 10 * _Q, top_k=32),
    AttentionShape("lt-aotl-t10-v2", "LSTT block V2: identity and gate", _Q, 10 * _Q, modulated=True),
    AttentionShape("lt-deaot-t10", "DeAOT, 10 memory frames", _Q, 10 * _Q, 128, (512, 512), 1),
)
_SMALL = (
    AttentionShape("lt-aotl-240p-t5", "AOT, 240p, 5 memory frames", 16 * 27, 5 * 16 * 27),
    AttentionShape("lt-aotl-240p-t5-k32", "the same, top-32", 16 * 27, 5 * 16 * 27, top_k=32),
    AttentionShape("lt-deaot-240p-t5", "DeAOT, 240p", 16 * 27, 5 * 16 * 27, 128, (512, 512), 1),
)
ATTENTION_GROUPS = {
    "standard": tuple(shape.name for shape in _STANDARD),
    "small": tuple(shape.name for shape in _SMALL),
}
ATTENTION = {shape.name: shape for shape in (*_STANDARD, *_SMALL)}


@dataclass(frozen=True)
class Inputs:
    """Normally distributed query, key and values (1, N, C), perhaps identity and gate."""

    query: Tensor
    key: Tensor
    values: tuple[Tensor, ...]
    options: dict[str, Any]

    def leaves(self) -> Inputs:
        """The same tensors, to be differentiated by."""
        query, key, *values = (x.detach().requires_grad_() for x in (self.query, self.key, *self.values))
        return Inputs(query, key, tuple(values), self.options)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.query, self.key, *self.values


@dataclass(frozen=True)
class Expected:
    """The float64 result and gradients on the queries that count."""

    queries: Tensor  # [n]
    reads: tuple[Tensor, ...]  # [1, n, Cv] each
    weights: tuple[Tensor, ...]  # [1, n, Cv] 0 where rounding decides what a head keeps, else 1
    gradients: tuple[Tensor, ...]  # of query [1, n, C], key and values; none if forward only


class AttentionCase:
    """One attention call with its inputs drawn; see `case.Case`."""

    def __init__(self, shape: AttentionShape, settings: Settings, seed: int) -> None:
        self.shape, self.settings = shape, settings
        generator = torch.Generator().manual_seed(seed)

        def draw(tokens: int, channels: int) -> Tensor:
            x = torch.randn(1, tokens, channels, generator=generator)
            x = x.to(settings.device, DTYPES[settings.dtype])
            return (
                x.mT.contiguous().mT if settings.layout == "channel_major" and tokens > shape.queries else x
            )

        options: dict[str, Any] = {"num_heads": shape.num_heads}
        if shape.modulated:
            options["identity"] = draw(shape.memory, shape.values[0])
            options["identity_gate"] = 1 + draw(shape.memory, shape.num_heads).tanh()
        values = tuple(draw(shape.memory, width) for width in shape.values)
        self.inputs = Inputs(
            draw(shape.queries, shape.channels), draw(shape.memory, shape.channels), values, options
        )
        self._upstream = tuple(draw(shape.queries, width) for width in shape.values)
        chosen = torch.randperm(shape.queries, generator=generator)[:_REFERENCE_QUERIES]
        self._chosen = chosen.to(settings.device)
        self._known: Expected | None = None

    def facts(self) -> dict[str, object]:
        shape = self.shape
        return {
            "queries": shape.queries,
            "memory": shape.memory,
            "channels": shape.channels,
            "value_channels": " + ".join(str(width) for width in shape.values),
            "num_heads": shape.num_heads,
            "top_k": shape.top_k,
            "modulated": shape.modulated,
        }

    def refuses(self, implementation: str) -> str | None:
        if implementation == "smart_eager" and self.shape.top_k is None:
            return "dense attention has nothing to gather"
        if implementation == "smart_eager" and self.settings.backward:
            return "forward only"
        if implementation == "sdpa" and self.shape.top_k is not None:
            return "reads densely; timed on the dense shape"
        return None

    def needs_bytes(self, implementation: str) -> int:
        shape, size = self.shape, DTYPES[self.settings.dtype].itemsize
        matrix = shape.num_heads * shape.queries * shape.memory * size
        values = sum(shape.values) * shape.memory * size
        matrices = {"vosops": 0, "sdpa": 2, "smart_eager": 2, "eager": 3 if shape.top_k is None else 4}
        return (2 if self.settings.backward else 1) * matrices[implementation] * matrix + 2 * values

    def call(self, implementation: str) -> Callable[[], object]:
        if self.settings.backward:
            return lambda: self._forward_backward(implementation, self._upstream)
        return lambda: self._forward(implementation)

    def _forward(self, implementation: str) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self._attend(implementation, self.inputs)

    def _forward_backward(
        self, implementation: str, upstream: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        leaves = self.inputs.leaves()
        reads = self._attend(implementation, leaves)
        return tuple(read.detach() for read in reads), torch.autograd.grad(reads, leaves.tensors(), upstream)

    def _attend(self, implementation: str, inputs: Inputs) -> tuple[Tensor, ...]:
        options = dict(inputs.options)
        if implementation != "sdpa" and self.shape.top_k is not None:
            options["top_k"] = self.shape.top_k
        if implementation == "vosops":
            return _vosops(inputs, options)
        reads: tuple[Tensor, ...] = _PEERS[implementation](inputs.query, inputs.key, inputs.values, **options)
        return reads

    def error(self, implementation: str) -> float:
        expected = self._reference()
        at = expected.queries
        if not self.settings.backward:
            reads, gradients = self._forward(implementation), ()
        else:
            upstream = tuple(torch.zeros_like(x) for x in self._upstream)
            for zero, full, weight in zip(upstream, self._upstream, expected.weights, strict=True):
                zero[:, at] = full[:, at] * weight.to(full.dtype)
            reads, gradients = self._forward_backward(implementation, upstream)
        errors = [
            relative_error(read[:, at].double() * weight, want)
            for read, want, weight in zip(reads, expected.reads, expected.weights, strict=True)
        ]
        for index, (got, want) in enumerate(zip(gradients, expected.gradients, strict=True)):
            errors.append(relative_error(got[:, at] if index == 0 else got, want))
        return max(errors)

    def tolerance(self) -> float:
        return _TOLERANCE[self.settings.dtype]

    def _reference(self) -> Expected:
        if self._known is None:
            self._known = self._compute_reference()
        return self._known

    def _compute_reference(self) -> Expected:
        shape, at = self.shape, self._chosen
        query, key, *values = (x.double() for x in self.inputs.tensors())
        options = {
            name: x.double() if isinstance(x, Tensor) else x for name, x in self.inputs.options.items()
        }
        small = Inputs(query[:, at], key, tuple(values), options)
        weights = tuple(torch.ones(1, len(at), width, dtype=torch.float64) for width in shape.values)
        if shape.top_k is not None and shape.top_k < shape.memory:
            sure = self._sure(small)  # [1, n, h]
            weights = tuple(
                sure.repeat_interleave(width // shape.num_heads, -1).double() for width in shape.values
            )
        leaves = small.leaves() if self.settings.backward else small
        with vosops.use_backend("reference"):
            reads = _vosops(leaves, {**options, "top_k": shape.top_k})
        gradients: tuple[Tensor, ...] = ()
        if self.settings.backward:
            upstream = tuple(
                x[:, at].double() * weight for x, weight in zip(self._upstream, weights, strict=True)
            )
            gradients = torch.autograd.grad(reads, leaves.tensors(), upstream)
        kept = tuple(read.detach() * weight for read, weight in zip(reads, weights, strict=True))
        return Expected(at, kept, weights, gradients)

    def _sure(self, small: Inputs) -> Tensor:
        """Queries whose last kept and first dropped score are apart, per head."""
        shape, heads = self.shape, self.shape.num_heads
        assert shape.top_k is not None
        gate = small.options.get("identity_gate")
        key = small.key if gate is None else multihead.gated(small.key, gate, heads)
        q, k = (x.unflatten(-1, (heads, -1)) for x in (small.query, key))
        scores = torch.einsum("bqhc,bmhc->bqhm", q, k) * (shape.channels // heads) ** -0.5
        best = scores.topk(shape.top_k + 1, dim=-1).values
        return best[..., -2] - best[..., -1] > _SCORE_BAND

    def limit_ms(self) -> tuple[float, str]:
        """Scores, 2 Q M C operations, and the values, 2 Q M Cv, or the rows that top_k gathers.

        At measured rates; the exponentials, for which there is none, are left out. Backward adds the scores
        again, dQ, dK, dL/dw and dV; with top_k three more passes over the gathered rows.
        """
        shape = self.shape
        dtype = DTYPES[self.settings.dtype]
        head = shape.channels // shape.num_heads
        rates = measure.ceilings(head, dtype, self.settings.device, torch.get_num_threads())
        pairs, width = 2 * shape.queries * shape.memory, sum(shape.values)
        operations, moved = pairs * shape.channels, 0
        if shape.top_k is None:
            operations += pairs * width
            if self.settings.backward:
                operations += 3 * pairs * shape.channels + 2 * pairs * width
        else:
            moved = (
                shape.queries * shape.top_k * width * dtype.itemsize * (4 if self.settings.backward else 1)
            )
        words = f"{operations / 1e9:.1f} GFLOP at {rates.peak / 1e9:.0f} GFLOP/s"
        if moved:
            words += f" + {moved / 2**20:.0f} MiB at {rates.copy / 2**30:.0f} GiB/s"
        return 1e3 * (operations / rates.peak + moved / rates.copy), words


def _vosops(inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, ...]:
    value = inputs.values if len(inputs.values) > 1 else inputs.values[0]
    result = vosops.attention(inputs.query, inputs.key, value, **options)
    return (result,) if isinstance(result, Tensor) else result


def _make_case(shape: str, settings: Settings, seed: int) -> AttentionCase:
    return AttentionCase(ATTENTION[shape], settings, seed)


_TOKENS = "position_major"  # how AOT holds its memory
OPERATOR = Operator(
    name="attention",
    implementations=("vosops", *_PEERS),
    shapes=tuple(ATTENTION),
    groups=ATTENTION_GROUPS,
    case=_make_case,
    everything=(
        Job(ATTENTION_GROUPS["standard"], settings=Settings(layout=_TOKENS)),
        Job(("lt-aotl-t1",), settings=Settings(layout=_TOKENS, backward=True)),
        Job(("lt-aotl-t10", "lt-aotl-t10-k32"), settings=Settings("bfloat16", _TOKENS)),
    ),
)
