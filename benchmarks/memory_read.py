# SPDX-License-Identifier: Apache-2.0
"""The memory read against its peers: inputs, correctness, memory estimates, arithmetic limit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vosops
from vosops.ops import backends
from vosops.ops.memory_read import limits

from . import measure
from .case import DTYPES, Job, Operator, Settings, relative_error
from .peers import attention, compiled, eager, smart_eager
from .shapes import MEMORY_READ, MEMORY_READ_GROUPS, MemoryReadShape


def _forced(backend: str) -> Callable[..., Any]:
    def read(*tensors: Tensor, **options: Any) -> Any:
        with vosops.use_backend(backend):
            return vosops.memory_read(*tensors, **options)

    return read


_FORCED = {"vosops_triton": "triton", "vosops_cuda": "cuda"}
_READS: dict[str, Callable[..., Any]] = {
    "vosops": vosops.memory_read,
    "eager": eager.memory_read,
    "smart_eager": smart_eager.memory_read,
    "compiled": compiled.memory_read,
    "sdpa": attention.memory_read_sdpa,
    "flex": attention.memory_read_flex,
    "compiled_smart": compiled.memory_read_smart,
    **{name: _forced(backend) for name, backend in _FORCED.items()},
}
_DENSE_ONLY = ("sdpa", "flex")
_SMART = ("smart_eager", "compiled_smart")
# Relative to the largest element. Low precision rounds the weights and, in the peers, the scores.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
# Two scores this close may be ranked either way in float32.
_SCORE_BAND, _CENTER_BAND = 1e-4, 1e-6
_REFERENCE_ELEMENTS = 1 << 24  # Q x M of the float64 reference: 128 MiB a matrix
_REFERENCE_ELEMENTS_CUDA = 1 << 27  # the same on a GPU: 1 GiB a matrix, several at a time


@dataclass(frozen=True)
class Inputs:
    """One memory read's tensors, all in one dtype; shrinkage and selection or neither."""

    query_key: Tensor  # [B, Ck, H, W]
    memory_key: Tensor  # [B, Ck, M]
    memory_value: Tensor  # [B, O, Cv, M]
    shrinkage: Tensor | None  # [B, 1, M]
    selection: Tensor | None  # [B, Ck, H, W]

    def options(self, shape: MemoryReadShape) -> dict[str, Any]:
        """The keyword arguments of vosops.memory_read, and of every peer, without top_k."""
        options: dict[str, Any] = {"similarity": shape.similarity}
        if shape.modulated:
            options |= {"shrinkage": self.shrinkage, "selection": self.selection}
        if shape.sigma is not None:
            options["prior"] = vosops.KernelPrior(shape.sigma)
        return options

    def subset(self, queries: Tensor | None) -> Inputs:
        """The inputs in float64 for some of the queries (None: all), the rest unchanged."""
        q = self.query_key.double()
        e = None if self.selection is None else self.selection.double()
        if queries is not None:
            q = q.flatten(2)[..., queries]
            e = None if e is None else e.flatten(2)[..., queries]
        r = None if self.shrinkage is None else self.shrinkage.double()
        return Inputs(q, self.memory_key.double(), self.memory_value.double(), r, e)


def draw_inputs(shape: MemoryReadShape, settings: Settings, seed: int) -> Inputs:
    """Normally distributed keys and values, shrinkage in [1, 2), selection in (0, 1).

    With a prior they are drawn again while a memory position has two best queries within float32
    rounding: which of the two becomes its centre would be chance, and the reads would differ.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, memory, channels = shape.batch, shape.memory, shape.key_channels
    while True:
        inputs = Inputs(
            _place(torch.randn(batch, channels, *shape.grid, generator=generator), settings, False),
            _place(torch.randn(batch, channels, memory, generator=generator), settings, True),
            _place(
                torch.randn(batch, shape.objects, shape.value_channels, memory, generator=generator),
                settings,
                True,
            ),
            _place(1 + torch.rand(batch, 1, memory, generator=generator), settings, True)
            if shape.modulated
            else None,
            _place(torch.rand(batch, channels, *shape.grid, generator=generator), settings, False)
            if shape.modulated
            else None,
        )
        if shape.sigma is None or not _ambiguous_center(inputs):
            return inputs


def _place(tensor: Tensor, settings: Settings, memory: bool) -> Tensor:
    tensor = tensor.to(settings.device, DTYPES[settings.dtype])
    if memory and settings.layout == "position_major":
        return tensor.movedim(-1, 1).contiguous().movedim(1, -1)
    return tensor


def _ambiguous_center(inputs: Inputs) -> bool:
    q, k = inputs.query_key.flatten(2).double(), inputs.memory_key.double()
    for part in torch.split(k, 4096, dim=2):
        best = (part.mT @ q).topk(min(2, q.shape[2]), dim=2).values * q.shape[1] ** -0.5
        if bool((best[..., 0] - best[..., -1] < _CENTER_BAND).any()) and q.shape[2] > 1:
            return True
    return False


@dataclass(frozen=True)
class Expected:
    """The float64 result and gradients on the queries that count."""

    queries: Tensor  # [n] positions on the flattened grid
    read: Tensor  # [B, O, Cv, n]
    weight: Tensor  # [B, 1, 1, n] 0 where rounding decides which positions are kept, else 1
    upstream: Tensor  # [B, O, Cv, n] gradient of the read, 0 likewise
    gradients: tuple[Tensor, ...]  # of query_key [B, Ck, n], memory_key, memory_value; none if forward only


class MemoryReadCase:
    """One memory read with its inputs drawn; see `case.Case`."""

    def __init__(self, shape: MemoryReadShape, settings: Settings, seed: int) -> None:
        self.shape, self.settings = shape, settings
        self.inputs = draw_inputs(shape, settings, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        grid = (shape.batch, shape.objects, shape.value_channels, *shape.grid)
        self._upstream = torch.randn(grid, generator=generator).to(settings.device, DTYPES[settings.dtype])
        self._permutation = torch.randperm(shape.queries, generator=generator).to(settings.device)
        self._expected: dict[bool, Expected] = {}  # by "dense"

    def facts(self) -> dict[str, object]:
        shape = self.shape
        return {
            "batch": shape.batch,
            "queries": shape.queries,
            "memory": shape.memory,
            "key_channels": shape.key_channels,
            "value_channels": shape.value_channels,
            "objects": shape.objects,
            "top_k": shape.top_k,
            "similarity": shape.similarity + (" modulated" if shape.modulated else ""),
            "prior_sigma": shape.sigma,
        }

    def refuses(self, implementation: str) -> str | None:
        if implementation in _SMART and self.shape.top_k is None:
            return "a dense read has nothing to gather"
        if implementation in _FORCED:
            return self._refused_by(_FORCED[implementation])
        if implementation in _DENSE_ONLY and self.shape.top_k is not None and self.shape.sigma is not None:
            return "reads densely; timed on the dense shape of this prior"
        low_precision = self.settings.dtype != "float32"
        if implementation in ("sdpa", *_SMART) and self.shape.sigma is not None and low_precision:
            return f"its prior in extra key channels does not survive {self.settings.dtype}"
        if implementation == "flex" and self.settings.device.type == "cpu" and self.settings.backward:
            return "FlexAttention has no backward on the CPU"
        on_cpu = self.settings.device.type == "cpu"
        if (
            implementation in ("compiled", "compiled_smart", "flex")
            and on_cpu
            and shutil.which("g++") is None
        ):
            return "torch.compile needs g++"
        return None

    def _refused_by(self, backend: str) -> str | None:
        tensors = {
            name: tensor
            for name in ("query_key", "memory_key", "memory_value", "shrinkage", "selection")
            if (tensor := getattr(self.inputs, name)) is not None
        }
        reasons = backends.reasons_against(backend, tensors)
        prior = self.inputs.options(self.shape).get("prior")
        reasons += limits.reasons_against(backend, tensors, self.shape.top_k, prior)
        return "; ".join(reasons) or None

    def needs_bytes(self, implementation: str) -> int:
        shape, size = self.shape, DTYPES[self.settings.dtype].itemsize
        matrix = shape.batch * shape.queries * shape.memory * size
        value = shape.batch * shape.objects * shape.value_channels * shape.memory * size
        if implementation in _FORCED or (
            implementation == "vosops" and _vosops_is_fused(self.settings.device)
        ):
            matrices = 0
        elif implementation == "flex":
            matrices = 1 if shape.sigma is not None else 0  # the argmax
        elif implementation in _SMART:
            matrices = 2
        elif implementation == "sdpa":
            matrices = 3
        else:
            matrices = 5 if shape.sigma is None else 7
        return (2 * matrices if self.settings.backward else matrices) * matrix + 2 * value

    def call(self, implementation: str) -> Callable[[], object]:
        if self.settings.backward:
            return lambda: self._forward_backward(implementation, self._upstream)
        return lambda: self._forward(implementation)

    def _forward(self, implementation: str) -> Tensor:
        with torch.no_grad():
            return self._read(implementation, self.inputs)

    def _forward_backward(self, implementation: str, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        given = self.inputs
        keys = [
            tensor.detach().requires_grad_()
            for tensor in (given.query_key, given.memory_key, given.memory_value)
        ]
        with torch.enable_grad():
            query_key, memory_key, memory_value = keys
            leaves = Inputs(query_key, memory_key, memory_value, given.shrinkage, given.selection)
            read = self._read(implementation, leaves)
            return read.detach(), torch.autograd.grad(read, keys, upstream)

    def _read(self, implementation: str, inputs: Inputs) -> Tensor:
        options = inputs.options(self.shape)
        if implementation not in _DENSE_ONLY:
            options["top_k"] = self.shape.top_k
        read = _READS[implementation](inputs.query_key, inputs.memory_key, inputs.memory_value, **options)
        assert isinstance(read, Tensor)
        return read

    def error(self, implementation: str) -> float:
        expected = self._reference(dense=implementation in _DENSE_ONLY)
        queries = expected.queries
        gradients: tuple[Tensor, ...] = ()
        if not self.settings.backward:
            read = self._forward(implementation)
        else:
            upstream = torch.zeros_like(self._upstream)
            upstream.flatten(3)[..., queries] = expected.upstream.to(upstream.dtype)
            read, gradients = self._forward_backward(implementation, upstream)
        errors = [
            relative_error(
                read.flatten(3)[..., queries].double() * expected.weight, expected.read * expected.weight
            )
        ]
        for index, (got, want) in enumerate(zip(gradients, expected.gradients, strict=True)):
            errors.append(relative_error(got.flatten(2)[..., queries] if index == 0 else got, want))
        return max(errors)

    def tolerance(self) -> float:
        return _TOLERANCE[self.settings.dtype]

    def _reference(self, dense: bool) -> Expected:
        dense = dense or self.shape.top_k is None
        if dense not in self._expected:
            self._expected[dense] = self._compute_reference(None if dense else self.shape.top_k)
        return self._expected[dense]

    def _compute_reference(self, top_k: int | None) -> Expected:
        shape = self.shape
        # A prior's centres depend on every query; without one a random subset of queries stands for all.
        count = shape.queries
        if shape.sigma is None:
            on_gpu = self.settings.device.type == "cuda"
            most = _REFERENCE_ELEMENTS_CUDA if on_gpu else _REFERENCE_ELEMENTS
            count = min(count, max(1, most // (shape.batch * shape.memory)))
        queries = self._permutation[:count] if count < shape.queries else torch.arange(shape.queries)
        queries = queries.to(self._permutation.device)
        inputs = self.inputs.subset(queries if count < shape.queries else None)
        keys = [inputs.query_key, inputs.memory_key, inputs.memory_value]
        with torch.set_grad_enabled(self.settings.backward), vosops.use_backend("reference"):
            if self.settings.backward:
                keys = [tensor.requires_grad_() for tensor in keys]
            options = inputs.options(shape)
            weight = torch.ones(shape.batch, 1, 1, count, dtype=torch.float64, device=queries.device)
            if top_k is None or top_k >= shape.memory:
                read = vosops.memory_read(keys[0], keys[1], keys[2], **options)
            else:
                # The match of one position more tells how far the last kept score is from the next.
                match = vosops.memory_match(keys[0], keys[1], top_k=top_k + 1, **options)
                kept, following = match.weights[..., :-1], match.weights[..., -1]
                gap = (kept[..., -1].detach() / following.detach()).log()  # [B, n]
                weight = (gap > _SCORE_BAND).double()[:, None, None]
                kept = kept / kept.sum(-1, keepdim=True)
                read = vosops.memory_gather(
                    vosops.Match(match.indices[..., :-1].contiguous(), kept, match.query_shape), keys[2]
                )
            assert isinstance(read, Tensor)
            read = read.flatten(3)
            upstream = self._upstream.flatten(3)[..., queries].double() * weight
            gradients: tuple[Tensor, ...] = ()
            if self.settings.backward:
                gradients = torch.autograd.grad(read, keys, upstream)
                gradients = (gradients[0].flatten(2), *gradients[1:])
        return Expected(queries, read.detach(), weight, upstream, gradients)

    def limit_ms(self) -> tuple[float, str]:
        """The least a machine can spend: scores, and reading what is kept.

        Scores are 2 B Q M Ck operations at the measured peak rate, twice that with selection, and twice
        again with a prior, whose centres need every score before the read can begin. The read moves
        B Q k rows of O Cv values at the measured copy rate, or is 2 B Q M O Cv operations without top_k.
        Backward adds, with top_k, three more passes over the gathered rows (dL/dw, and reading and
        writing dL/dv); without, the scores again, dQ, dK, dL/dw and dV.

        On a GPU, which moves and multiplies at once, it is the larger of the two: the operations, and the
        bytes of every input that is needed and of the result, each once (`_moved_bytes`).

        A prior that rules out most of the grid lets a kernel skip tiles and go below.
        """
        shape = self.shape
        dtype = DTYPES[self.settings.dtype]
        rates = measure.ceilings(shape.key_channels, dtype, self.settings.device, torch.get_num_threads())
        pairs = 2 * shape.batch * shape.queries * shape.memory
        scores = pairs * shape.key_channels * (2 if shape.modulated else 1)
        width = shape.objects * shape.value_channels
        operations = scores * (1 if shape.sigma is None else 2)
        moved = 0
        if shape.top_k is None:
            operations += pairs * width
            if self.settings.backward:
                operations += 3 * scores + 2 * pairs * width
        else:
            kept = min(shape.top_k, shape.memory)
            moved = shape.batch * shape.queries * kept * width * dtype.itemsize
            if self.settings.backward:
                moved *= 4
        if self.settings.device.type == "cuda":
            moved = self._moved_bytes()
            milliseconds = 1e3 * max(operations / rates.peak, moved / rates.copy)
            return milliseconds, (
                f"max of {operations / 1e9:.1f} GFLOP at {rates.peak / 1e12:.0f} TFLOP/s "
                f"and {moved / 2**20:.0f} MiB at {rates.copy / 1e12:.2f} TB/s"
            )
        milliseconds = 1e3 * (operations / rates.peak + moved / rates.copy)
        words = f"{operations / 1e9:.1f} GFLOP at {rates.peak / 1e9:.0f} GFLOP/s"
        words += f" (torch.mm: {rates.product / 1e9:.0f})"
        if moved:
            words += f" + {moved / 2**20:.0f} MiB at {rates.copy / 2**30:.0f} GiB/s"
        return milliseconds, words

    def _moved_bytes(self) -> int:
        """Keys, the value rows that can be kept, and the read; backward: read them again, write gradients."""
        shape, size = self.shape, DTYPES[self.settings.dtype].itemsize
        queries, width = shape.queries, shape.objects * shape.value_channels
        rows = shape.memory if shape.top_k is None else min(shape.memory, queries * shape.top_k)
        keys = (queries + shape.memory) * shape.key_channels
        if shape.modulated:
            keys += queries * shape.key_channels + shape.memory
        elements = keys + rows * width + queries * width
        if self.settings.backward:
            elements += 2 * keys + queries * width + (rows + shape.memory) * width
        return shape.batch * elements * size


def _vosops_is_fused(device: torch.device) -> bool:
    return vosops.backend_report()["triton" if device.type == "cuda" else "cpu"].startswith("available")


def _make_case(shape: str, settings: Settings, seed: int) -> MemoryReadCase:
    return MemoryReadCase(MEMORY_READ[shape], settings, seed)


_ACTIVE = ("vosops", "eager", "smart_eager", "sdpa")
_COMPILED_TOO = ("stcn-t10-o1", "xmem-cap-o1", "stm-t10-o2", "kmn-t10-o1")  # one of each kind of score
_1080P = "xmem-1080p"
_CUDA_ONLY = ("compiled_smart", *_FORCED)
_OURS = ("vosops", *_FORCED)
_ON_GPU = (*_OURS, "eager", "smart_eager", "sdpa")
_TOP_K = ("xmem-cap-o1", "stcn-t20-o3")  # where a top-k read on a GPU is held against its targets
_DENSE = ("stcn-t10-o1-dense", "stm-t10-o2", "kmn-t10-o1")


def _cuda_everything() -> tuple[Job, ...]:
    """Ordered by weight: a session that is cut short has measured the targets first."""
    standard = MEMORY_READ_GROUPS["standard"]
    rest = tuple(name for name in standard if name not in (*_TOP_K, *_DENSE, _1080P))
    backward = ("stcn-t10-o1", "xmem-cap-o1", "stm-t10-o2", "kmn-t10-o1")
    compilers = ("compiled", "compiled_smart")
    return (
        Job(_TOP_K, (*_ON_GPU, *compilers), Settings("bfloat16")),
        Job(_DENSE, (*_OURS, "eager", "sdpa", "flex"), Settings("bfloat16")),
        *(Job(_TOP_K, (*_ON_GPU, "compiled"), Settings(dtype)) for dtype in ("float16", "float32")),
        Job((_1080P,), (*_OURS, "eager", "smart_eager"), Settings("bfloat16")),
        *(
            Job(backward, (*_OURS, "eager"), Settings(dtype, backward=True))
            for dtype in ("bfloat16", "float32")
        ),
        Job(_TOP_K, _OURS, Settings("bfloat16", "position_major")),
        Job(rest, _ON_GPU, Settings("bfloat16")),
        *(Job((*rest, *_DENSE), _ON_GPU, Settings(dtype)) for dtype in ("float32", "float16")),
    )


OPERATOR = Operator(
    name="memory_read",
    implementations=tuple(name for name in _READS if name not in _CUDA_ONLY),
    shapes=tuple(MEMORY_READ),
    groups=MEMORY_READ_GROUPS,
    case=_make_case,
    everything=(
        Job(_COMPILED_TOO),
        Job(MEMORY_READ_GROUPS["frames"], _ACTIVE),
        Job(
            [name for name in MEMORY_READ_GROUPS["standard"] if name not in (*_COMPILED_TOO, _1080P)], _ACTIVE
        ),
        Job([_1080P], ["vosops", "eager", "smart_eager"]),
        Job(["stcn-t10-o1", "stm-t10-o2", "kmn-t10-o1"], _ACTIVE, Settings(backward=True)),
        Job(["stcn-t10-o1", "xmem-cap-o3", "stm-t10-o2"], _ACTIVE, Settings(dtype="bfloat16")),
        Job(["stcn-t10-o1", "xmem-cap-o3"], _ACTIVE, Settings(layout="position_major")),
    ),
    cuda_implementations=_CUDA_ONLY,
    cuda_everything=_cuda_everything(),
)
