# SPDX-License-Identifier: Apache-2.0
"""Tensors that published code hands around but need not exist: similarity, affinity, stacked values.

Published code computes a similarity (B, N, P) between N memory positions and P queries, turns it into an
affinity and multiplies values by that. Here the three steps pass on what they would have computed from, and
only the product is computed, fused. Whatever else is done with such a tensor makes it real first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# What can be told of a tensor without its numbers: attributes, and functions.
_ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cuda", "is_cpu", "is_mps"),
    *("is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
)
_FUNCTIONS = (
    *("size", "dim", "ndimension", "numel", "nelement", "__len__", "__hash__", "stride", "is_contiguous"),
    *("is_floating_point", "is_complex", "element_size", "get_device"),
)
_ABOUT = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(getattr(Tensor, name) for name in _FUNCTIONS),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__get__


class LazyTensor(Tensor):
    """A tensor that is computed when its numbers are first needed, and is an ordinary one from then on.

    It has a shape, dtype and device, and `isinstance(x, torch.Tensor)` holds. Subclasses list in `fused` the
    torch functions they can serve without the numbers; every other one, in place or not, gets the
    materialised tensor, with its gradients.

    Args:
        shape, dtype, device: of the tensor.
        sources: what it is computed from; it requires a gradient if one of these does.
    """

    _dense: Tensor | None
    _sources: tuple[Tensor, ...]
    fused: dict[Any, Callable[..., Any]]

    @staticmethod
    def __new__(
        cls, shape: Iterable[int], dtype: torch.dtype, device: torch.device, sources: Iterable[Tensor | None]
    ) -> Any:
        self = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self._dense = None
        self._sources = tuple(source for source in sources if source is not None)
        return self

    def __init__(self, *arguments: Any) -> None:
        super().__init__()

    def compute(self) -> Tensor:
        """The numbers: a contiguous tensor of this shape and dtype, differentiable in the sources."""
        raise NotImplementedError

    @property
    def lazy(self) -> bool:
        """Whether the numbers have not been needed so far."""
        return self._dense is None

    def materialize(self) -> Tensor:
        """The tensor itself, computed at the first call and the same object at every other."""
        if self._dense is None:
            self._dense = self.compute()
        return self._dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype}, lazy={self.lazy})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == _REQUIRES_GRAD:
            return args[0]._needs_gradient()
        serve = cls.fused.get(func)
        if serve is not None:
            result = serve(*args, **kwargs)
            if result is not NotImplemented:
                return result
        args, kwargs = tree_map(_materialized, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Only code that goes round __torch_function__ comes here, below autograd.
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, LazyTensor) and value._needs_gradient():
                raise RuntimeError(
                    f"{func} would lose the gradient of this {cls.__name__}: pass its materialize() instead"
                )
        args, kwargs = tree_map(_materialized, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _needs_gradient(self) -> bool:
        sources = self._sources if self._dense is None else (self._dense,)
        return torch.is_grad_enabled() and any(source.requires_grad for source in sources)


def _materialized(value: Any) -> Any:
    return value.materialize() if isinstance(value, LazyTensor) else value


def like_matmul(result: Tensor) -> Tensor:
    """`result` in the dtype that a matmul has here: autocast's, where that is on."""
    kind = result.device.type
    return result.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else result
