# SPDX-License-Identifier: Apache-2.0
"""Gaussian spatial priors of the memory read.

Every prior gives each memory position j a centre c_j on the query grid and a width sigma_j, and adds
g_ij = -|x_i - c_j|^2 / (2 sigma_j^2) to the scaled score; x_i is the cell (row, column) of query i.
They differ in where the centre comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KernelPrior:
    """Centre at the query that matches the memory position best, c_j = argmax_i s_ij.

    Kernelized Memory Network (Seong, Hyun, Kim, ECCV 2020) uses sigma 7 over all queries; Hierarchical
    Memory Matching (Seong et al., ICCV 2021) sigma 3 with a 7x7 window around the position's own cell.
    The argmax is a constant for autograd.

    Args:
        sigma: standard deviation, in cells of the query grid.
        window: odd side of the window of queries, around the position's own cell, that the argmax runs
            over; None for all queries. Needs a memory (..., T, H, W) or (..., H, W) on the query's grid.
        sigma_growth: sigma of the frame t frames before the newest (the last along T) is
            sigma * (1 + sigma_growth * t).
    """

    sigma: float = 7.0
    window: int | None = None
    sigma_growth: float = 0.0


@dataclass(frozen=True)
class MaskPrior:
    """Centre at the best matching query, corrected by where the object was in the previous frame.

    The spatially constrained memory reader: moments of the previous mask give a mean mu and a covariance
    S, log G(x) = -0.5 (x - mu)' (spread^2 S + I/12)^-1 (x - mu), and
    c_j = argmax_i [s_ij + strength * m_j * log G(x_i)] with m_j the object's mask at memory position j.
    I/12 is the variance of one cell, so a mask of a single cell has a Gaussian too. An empty previous
    mask leaves KernelPrior. One object per batch entry, as STM lays objects out.

    Args:
        previous_mask: (B, *q) the object's mask in the previous frame, on the query grid; >= 0.
        memory_object_mask: (B, *m) the object's mask at every memory position; >= 0.
        sigma: standard deviation of the kernel around c_j, in cells.
        strength: weight of the correction.
        spread: factor on the previous mask's standard deviations.
    """

    previous_mask: Tensor
    memory_object_mask: Tensor
    sigma: float = 7.0
    strength: float = 1.0
    spread: float = 1.0


@dataclass(frozen=True)
class CenterPrior:
    """Centres given by the caller: a memory position's own cell, or one tracked through the video.

    Args:
        centers: (B, *m, 2) cell (row, column) on the query grid; leading 1 is broadcast over the batch.
        sigma: standard deviation in cells; a number, or a tensor (B, *m), broadcast likewise.
    """

    centers: Tensor
    sigma: float | Tensor = 7.0


Prior = KernelPrior | MaskPrior | CenterPrior
