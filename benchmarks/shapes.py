# SPDX-License-Identifier: Apache-2.0
"""The standard shapes: what published VOS models ask of an operator, at the sizes they run at."""

from __future__ import annotations

from dataclasses import dataclass

_GRID_240P, _GRID_480P, _GRID_1080P = (15, 27), (30, 54), (68, 120)  # cells of the stride-16 grid


@dataclass(frozen=True)
class MemoryReadShape:
    """One memory read. Q = height * width of `grid`; every size counts elements.

    Args:
        name: what `--shape` takes.
        stands_for: the published model whose read this is.
        memory: M, memory positions.
        key_channels: Ck.
        value_channels: Cv.
        objects: O, objects that share the keys.
        top_k: positions kept per query; None reads densely.
        similarity: "dot" or "l2".
        modulated: shrinkage and selection are given (XMem's anisotropic l2).
        sigma: of the KernelPrior, in cells; None for no prior.
        batch: B; STM puts its objects here, each with keys of its own.
        grid: (height, width) of the query, in stride-16 cells.
    """

    name: str
    stands_for: str
    memory: int
    key_channels: int
    value_channels: int
    objects: int = 1
    top_k: int | None = None
    similarity: str = "dot"
    modulated: bool = False
    sigma: float | None = None
    batch: int = 1
    grid: tuple[int, int] = _GRID_480P

    @property
    def queries(self) -> int:
        """Q, query positions of one batch entry."""
        return self.grid[0] * self.grid[1]


def _stcn(
    frames: int, objects: int, grid: tuple[int, int] = _GRID_480P, size: str = "", top_k: int | None = 20
) -> MemoryReadShape:
    kept = "top-20" if top_k else "dense"
    return MemoryReadShape(
        name=f"stcn-{size}t{frames}-o{objects}" + ("" if top_k else "-dense"),
        stands_for=f"STCN, {frames} memory frames, {objects} object(s), {kept}",
        memory=frames * grid[0] * grid[1],
        key_channels=64,
        value_channels=512,
        objects=objects,
        top_k=top_k,
        similarity="l2",
        grid=grid,
    )


def _xmem(name: str, stands_for: str, memory: int, objects: int, grid: tuple[int, int]) -> MemoryReadShape:
    return MemoryReadShape(
        name, stands_for, memory, 64, 512, objects, top_k=30, similarity="l2", modulated=True, grid=grid
    )


def _kmn(frames: int, grid: tuple[int, int], size: str = "", top_k: int | None = None) -> MemoryReadShape:
    return MemoryReadShape(
        name=f"kmn-{size}t{frames}-o1" + (f"-k{top_k}" if top_k else ""),
        stands_for=f"Kernelized Memory Network, sigma 7, {f'top-{top_k}' if top_k else 'dense'}",
        memory=frames * grid[0] * grid[1],
        key_channels=128,
        value_channels=512,
        top_k=top_k,
        sigma=7.0,
        grid=grid,
    )


_STANDARD = (
    _stcn(10, 1),
    _stcn(20, 3),
    _stcn(10, 1, top_k=None),
    _xmem("xmem-cap-o1", "XMem at its memory cap", 26200, 1, _GRID_480P),
    _xmem("xmem-cap-o3", "XMem at its memory cap, 3 objects", 26200, 3, _GRID_480P),
    MemoryReadShape(
        "cutie-fifo-o3", "Cutie, 5 memory frames", 8100, 64, 256, 3, 30, similarity="l2", modulated=True
    ),
    MemoryReadShape("stm-t10-o2", "STM, dense, 2 objects with their own keys", 16200, 128, 512, batch=2),
    _kmn(10, _GRID_480P),
    _kmn(10, _GRID_480P, top_k=50),
    _xmem("xmem-1080p", "XMem at its memory cap, 1080p video", 83440, 1, _GRID_1080P),
)
# 240p video: seconds instead of minutes, for a first look and for the regression set.
_SMALL = (
    _stcn(5, 1, _GRID_240P, "240p-"),
    _stcn(5, 1, _GRID_240P, "240p-", top_k=None),
    _xmem("xmem-240p-o2", "XMem, 240p video, 2 objects", 2025, 2, _GRID_240P),
    _kmn(5, _GRID_240P, "240p-"),
    _kmn(5, _GRID_240P, "240p-", top_k=50),
)
_FRAMES = tuple(_stcn(frames, 1) for frames in (1, 2, 5, 10, 20, 30))

MEMORY_READ_GROUPS: dict[str, tuple[str, ...]] = {
    "standard": tuple(shape.name for shape in _STANDARD),
    "small": tuple(shape.name for shape in _SMALL),
    "frames": tuple(shape.name for shape in _FRAMES),
}
MEMORY_READ: dict[str, MemoryReadShape] = {shape.name: shape for shape in (*_STANDARD, *_SMALL, *_FRAMES)}
