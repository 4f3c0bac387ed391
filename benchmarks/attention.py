# SPDX-License-Identifier: Apache-2.0
"""Attention against its peers: inputs, correctness, memory estimates, arithmetic limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import vosops
from vosops.ops.attention import limits
from vosops.ops.attention.problem import check_heads

from . import cuda, measure
from .case import DTYPES, Job, Operator, Settings, relative_error
from .peers import multihead

# How SDPA is called on CUDA devices besides PyTorch's own choice: by backend, or with heads cut.
_SDPA: dict[str, dict[str, Any]] = {
    "sdpa_flash": {"backend": SDPBackend.FLASH_ATTENTION},
    "sdpa_efficient": {"backend": SDPBackend.EFFICIENT_ATTENTION},
    "sdpa_cudnn": {"backend": SDPBackend.CUDNN_ATTENTION},
    "sdpa_split": {"equal_widths": True},
    "sdpa_split_cudnn": {"equal_widths": True, "backend": SDPBackend.CUDNN_ATTENTION},
}
_PEERS: dict[str, Callable[..., Any]] = {
    "eager": multihead.attention,
    "smart_eager": multihead.attention_smart,
    "sdpa": multihead.attention_sdpa,
    "compiled": multihead.attention_compiled,
    "flex": multihead.attention_flex,
    **{name: partial(multihead.attention_sdpa, **how) for name, how in _SDPA.items()},
}
_ON_CPU = ("eager", "smart_eager", "sdpa")
_DENSE_ONLY = ("sdpa", "flex", *_SDPA)
_FORCED = cuda.forced(vosops.attention)
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
_Q_1080P = 68 * 121
_LARGE = (  # what fills a GPU
    AttentionShape("lt-aotl-1080p-t10", "AOT, 1080p, 10 memory frames", _Q_1080P, 10 * _Q_1080P),
    AttentionShape("lt-aotl-1080p-t10-k32", "the same, top-32", _Q_1080P, 10 * _Q_1080P, top_k=32),
)
ATTENTION_GROUPS = {
    "standard": tuple(shape.name for shape in _STANDARD),
    "small": tuple(shape.name for shape in _SMALL),
    "large": tuple(shape.name for shape in _LARGE),
}
ATTENTION = {shape.name: shape for shape in (*_STANDARD, *_SMALL, *_LARGE)}


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
        if implementation in _DENSE_ONLY and self.shape.top_k is not None:
            return "reads densely; timed on the dense shape"
        if implementation in cuda.FORCED:
            return self._refused_by(implementation)
        return self._refused_by_sdpa(_SDPA[implementation]) if implementation in _SDPA else None

    def _refused_by(self, implementation: str) -> str | None:
        given, options = self.inputs, self.inputs.options
        names = ("query", "key", *(f"value[{index}]" for index in range(len(given.values))))
        tensors = dict(zip(names, given.tensors(), strict=True))
        tensors |= {name: x for name, x in options.items() if isinstance(x, Tensor)}
        gate = options.get("identity_gate")
        p = check_heads(given.query, given.key, self.shape.num_heads, None, gate, False)
        kept = self.shape.top_k if (self.shape.top_k or 0) < self.shape.memory else None
        return cuda.refused_by(
            implementation, tensors, lambda backend: limits.reasons_against(backend, p, kept)
        )

    def _refused_by_sdpa(self, how: dict[str, Any]) -> str | None:
        width = sum(self.shape.values)
        if how.get("equal_widths") and (width == self.shape.channels or width % self.shape.channels):
            return "there is nothing to cut: timed where value heads are some times as wide as the key's"
        if "backend" not in how:
            return None
        if self.settings.device.type != "cuda":
            return "PyTorch has this backend on CUDA devices"
        inputs = self.inputs.leaves() if self.settings.backward else self.inputs
        options: dict[str, Any] = {**inputs.options, **how}
        backend = options.pop("backend")
        serves = multihead.sdpa_serves(backend, inputs.query, inputs.key, inputs.values, **options)
        return None if serves else "PyTorch says that this backend of SDPA does not serve the call"

    def needs_bytes(self, implementation: str) -> int:
        shape, size = self.shape, DTYPES[self.settings.dtype].itemsize
        matrix = shape.num_heads * shape.queries * shape.memory * size
        values = sum(shape.values) * shape.memory * size
        published = 3 if shape.top_k is None else 4
        matrices = {"sdpa": 2, "smart_eager": 2, "eager": published, "compiled": published}
        return (2 if self.settings.backward else 1) * matrices.get(implementation, 0) * matrix + 2 * values

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
        if self.shape.top_k is not None:
            options["top_k"] = self.shape.top_k
        if implementation == "vosops" or implementation in _FORCED:
            return _vosops(inputs, options, _FORCED.get(implementation, vosops.attention))
        reads: tuple[Tensor, ...] = _PEERS[implementation](inputs.query, inputs.key, inputs.values, **options)
        return reads

    def error(self, implementation: str) -> float:
        expected = self._reference()
        at = expected.queries
        gradients: tuple[Tensor, ...] = ()
        if not self.settings.backward:
            reads = self._forward(implementation)
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
        weights = tuple(
            torch.ones(1, len(at), width, dtype=torch.float64, device=at.device) for width in shape.values
        )
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

        On a GPU the larger of the operations and of the bytes of `_moved_bytes`. Heads of 32 channels spend
        longer on exponentials than on products there, and cannot come near.
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
        if self.settings.device.type == "cuda":
            return cuda.floor_ms(operations, self._moved_bytes(), rates)
        words = f"{operations / 1e9:.1f} GFLOP at {rates.peak / 1e9:.0f} GFLOP/s"
        if moved:
            words += f" + {moved / 2**20:.0f} MiB at {rates.copy / 2**30:.0f} GiB/s"
        return 1e3 * (operations / rates.peak + moved / rates.copy), words

    def _moved_bytes(self) -> int:
        """Query, key, the value rows that can be kept, the read; backward: again, and the gradients."""
        shape, width = self.shape, sum(self.shape.values)
        rows = shape.memory if shape.top_k is None else min(shape.memory, shape.queries * shape.top_k)
        keys = (shape.queries + shape.memory) * shape.channels
        if shape.modulated:
            keys += shape.memory * (shape.values[0] + shape.num_heads)
        elements = keys + (rows + shape.queries) * width
        if self.settings.backward:
            elements += 2 * keys + (shape.queries + rows + shape.memory) * width
        return elements * DTYPES[self.settings.dtype].itemsize


def _vosops(
    inputs: Inputs, options: dict[str, Any], attention: Callable[..., Any] = vosops.attention
) -> tuple[Tensor, ...]:
    value = inputs.values if len(inputs.values) > 1 else inputs.values[0]
    result = attention(inputs.query, inputs.key, value, **options)
    return (result,) if isinstance(result, Tensor) else result


def _make_case(shape: str, settings: Settings, seed: int) -> AttentionCase:
    return AttentionCase(ATTENTION[shape], settings, seed)


_TOKENS = "position_major"  # how AOT holds its memory
_OURS = ("vosops", *cuda.FORCED)
_BACKENDS = ("sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn")
_ANY_SDPA = (*_BACKENDS, "sdpa_split", "sdpa_split_cudnn")
_DENSE = ("lt-aotl-t10", "lt-deaot-t10", "lt-aotl-t1")


def _cuda_everything() -> tuple[Job, ...]:
    """Ordered by weight: a session that is cut short has measured the targets first."""
    low = Settings("bfloat16", _TOKENS)
    backward = Settings("bfloat16", _TOKENS, backward=True)
    top_k = ("lt-aotl-t10-k32",)
    return (
        Job(_DENSE, (*_OURS, *_ANY_SDPA, "flex", "eager"), low),
        Job(top_k, (*_OURS, "eager", "smart_eager", "compiled"), low),
        *(Job(_DENSE, (*_OURS, *_ANY_SDPA), Settings(dtype, _TOKENS)) for dtype in ("float32", "float16")),
        Job(_DENSE, (*_OURS, *_ANY_SDPA, "eager"), backward),
        Job(("lt-aotl-t10-v2",), (*_OURS, *_BACKENDS, "eager"), low),
        Job(top_k, (*_OURS, "eager"), backward),
        Job(("lt-aotl-1080p-t10",), (*_OURS, *_BACKENDS), low),
        Job(("lt-aotl-1080p-t10-k32",), (*_OURS, "smart_eager"), low),
        Job(_DENSE, (*_OURS, *_ANY_SDPA), Settings("float32", _TOKENS, backward=True)),
        *(
            Job(top_k, (*_OURS, "eager", "smart_eager"), Settings(dtype, _TOKENS))
            for dtype in ("float32", "float16")
        ),
        Job(("lt-aotl-t10", *top_k), _OURS, Settings("bfloat16")),
    )


OPERATOR = Operator(
    name="attention",
    implementations=("vosops", *_ON_CPU),
    shapes=tuple(ATTENTION),
    groups=ATTENTION_GROUPS,
    case=_make_case,
    everything=(
        Job(ATTENTION_GROUPS["standard"], settings=Settings(layout=_TOKENS)),
        Job(("lt-aotl-t1",), settings=Settings(layout=_TOKENS, backward=True)),
        Job(("lt-aotl-t10", "lt-aotl-t10-k32"), settings=Settings("bfloat16", _TOKENS)),
    ),
    cuda_implementations=(*cuda.FORCED, *(name for name in _PEERS if name not in _ON_CPU)),
    cuda_everything=_cuda_everything(),
)
