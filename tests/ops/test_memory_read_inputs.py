# SPDX-License-Identifier: Apache-2.0
"""Bad input raises before any work, naming the argument, what was expected and what came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vosops

from .helpers import problem

Q, M = (2, 24, 5, 9), (2, 24, 3, 5, 9)
CASES = {
    "query no tensor": (
        {"query_key": [1.0]},
        TypeError,
        r"query_key must be a tensor \(B, Ck, \*q\), got list",
    ),
    "query dtype": (
        {"query_key": torch.ones(Q, dtype=torch.int64)},
        TypeError,
        "query_key must have dtype float32",
    ),
    "memory dtype": ({"memory_key": torch.ones(M, dtype=torch.complex64)}, TypeError, "got torch.complex64"),
    "query rank": (
        {"query_key": torch.ones(2, 24)},
        ValueError,
        r"query_key must have at least 3 dimensions .*\[2, 24\]",
    ),
    "memory rank": (
        {"memory_key": torch.ones(2, 24)},
        ValueError,
        "memory_key must have at least 3 dimensions",
    ),
    "value rank": (
        {"memory_value": torch.ones(2, 3, 5)},
        ValueError,
        "memory_value must have at least 4 dimensions",
    ),
    "value dtype": (
        {"memory_value": torch.ones(2, 1, 1, 3, 5, 9).bool()},
        TypeError,
        "memory_value must have dtype",
    ),
    "batch": (
        {"memory_key": torch.ones(3, *M[1:])},
        ValueError,
        "memory_key must have the batch of query_key, 2, got 3",
    ),
    "channels": (
        {"memory_key": torch.ones(2, 8, 3, 5, 9)},
        ValueError,
        "channels of query_key, Ck = 24, got 8",
    ),
    "no channels": (
        {"query_key": torch.ones(2, 0, 5, 9), "memory_key": torch.ones(2, 0, 3, 5, 9)},
        ValueError,
        "query_key must have at least one channel",
    ),
    "empty memory": (
        {"memory_key": torch.ones(2, 24, 0, 5, 9), "memory_value": torch.ones(2, 1, 1, 0, 5, 9)},
        ValueError,
        r"memory_key is empty: it must hold at least one position, got shape \[2, 24, 0, 5, 9\]",
    ),
    "value shape": (
        {"memory_value": torch.ones(2, 1, 4, 3, 5, 8)},
        ValueError,
        r"memory_value must have shape \(B, O, Cv, \*m\) = \[2, 1, 4, 3, 5, 9\], got \[2, 1, 4, 3, 5, 8\]",
    ),
    "device": (
        {"memory_key": torch.ones(M, device="meta")},
        ValueError,
        "memory_key is on meta, but query_key is on cpu",
    ),
    "value device": (
        {"memory_value": torch.ones(2, 1, 4, 3, 5, 9, device="meta")},
        ValueError,
        "memory_value is on meta",
    ),
    "similarity": ({"similarity": "cosine"}, ValueError, "similarity must be 'dot' or 'l2', got 'cosine'"),
    "dot shrinkage": (
        {"shrinkage": torch.ones(2, 1, 3, 5, 9)},
        ValueError,
        "shrinkage belongs to similarity='l2'",
    ),
    "dot selection": ({"selection": torch.ones(Q)}, ValueError, "selection belongs to similarity='l2'"),
    "shrinkage shape": (
        {"similarity": "l2", "shrinkage": torch.ones(2, 3, 5, 9)},
        ValueError,
        r"shrinkage must have shape \(B, 1, \*m\) = \[2, 1, 3, 5, 9\], got \[2, 3, 5, 9\]",
    ),
    "selection shape": (
        {"similarity": "l2", "selection": torch.ones(2, 1, 5, 9)},
        ValueError,
        "selection must have shape",
    ),
    "mask dtype": (
        {"memory_mask": torch.ones(2, 3, 5, 9)},
        TypeError,
        "memory_mask must have dtype bool; got torch.float32",
    ),
    "mask shape": (
        {"memory_mask": torch.ones(2, 5, 9).bool()},
        ValueError,
        r"memory_mask must have shape \(B, \*m\)",
    ),
    "scale": ({"scale": float("nan")}, ValueError, "scale must be a finite number or None"),
    "scale type": ({"scale": "1"}, ValueError, "scale must be a finite number or None"),
    "top_k zero": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "top_k type": ({"top_k": 2.0}, TypeError, "top_k must be an integer, got float"),
    "top_k bool": ({"top_k": True}, TypeError, "top_k must be an integer, got bool"),
    "prior type": (
        {"prior": 7.0},
        TypeError,
        "prior must be a KernelPrior, MaskPrior, CenterPrior or None, got float",
    ),
    "sigma": (
        {"prior": vosops.KernelPrior(0.0)},
        ValueError,
        "prior.sigma must be positive, in cells, got 0.0",
    ),
    "window": (
        {"prior": vosops.KernelPrior(window=4)},
        ValueError,
        "prior.window must be odd and positive, got 4",
    ),
    "prior grid": (
        {"query_key": torch.ones(2, 24, 45), "prior": vosops.KernelPrior()},
        ValueError,
        r"prior needs a query grid: query_key \(B, Ck, H, W\), got shape \[2, 24, 45\]",
    ),
    "window grid": (
        {"query_key": torch.ones(2, 24, 4, 9), "prior": vosops.KernelPrior(window=3)},
        ValueError,
        r"need a memory \(..., T, H, W\) on the query grid \[4, 9\], got \[3, 5, 9\]",
    ),
    "centers shape": (
        {"prior": vosops.CenterPrior(torch.ones(2, 3, 5, 9))},
        ValueError,
        r"prior.centers must have shape \(B, \*m, 2\) = \[2, 3, 5, 9, 2\]",
    ),
    "centers batch": (
        {"prior": vosops.CenterPrior(torch.ones(3, 3, 5, 9, 2))},
        ValueError,
        "batch 1 or 2, got 3",
    ),
    "sigma shape": (
        {"prior": vosops.CenterPrior(torch.ones(1, 3, 5, 9, 2), torch.ones(1, 5, 9))},
        ValueError,
        r"prior.sigma must have shape \(B, \*m\) = \[1, 3, 5, 9\]",
    ),
    "previous mask": (
        {"prior": vosops.MaskPrior(torch.ones(2, 4, 9), torch.ones(2, 3, 5, 9))},
        ValueError,
        "prior.previous_mask must have shape",
    ),
    "object mask": (
        {"prior": vosops.MaskPrior(torch.ones(2, 5, 9), torch.ones(2, 5, 9))},
        ValueError,
        "prior.memory_object_mask must have shape",
    ),
    "spread": (
        {"prior": vosops.MaskPrior(torch.ones(2, 5, 9), torch.ones(2, 3, 5, 9), spread=0)},
        ValueError,
        "prior.spread must be positive, got 0",
    ),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_memory_read(name: str, backend: str) -> None:
    changes, error, message = CASES[name]
    with (
        vosops.use_backend("reference" if backend == "reference" else "cpu"),
        pytest.raises(error, match=message),
    ):
        vosops.memory_read(**{**problem("dot"), **changes})


def test_memory_match_checks_the_same_arguments() -> None:
    arguments = problem("dot")
    del arguments["memory_value"]
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        vosops.memory_match(**arguments, top_k=-3)
    with pytest.raises(ValueError, match="channels of query_key"):
        vosops.memory_match(**{**arguments, "memory_key": torch.ones(2, 8, 3, 5, 9)}, top_k=3)


def test_memory_gather() -> None:
    arguments = problem("dot")
    value = arguments.pop("memory_value")
    match = vosops.memory_match(**arguments, top_k=3)
    with pytest.raises(TypeError, match="match must be the Match that memory_match returned, got tuple"):
        vosops.memory_gather((match.indices, match.weights), value)
    with pytest.raises(
        ValueError, match=r"memory_value must have shape .* = \[2, 2, 20, 3, 5, 9\], got \[1, 2"
    ):
        vosops.memory_gather(match, value[:1])
    with pytest.raises(TypeError, match="match.indices must have dtype int64"):
        vosops.memory_gather(match._replace(indices=match.indices.int()), value)
    with pytest.raises(ValueError, match="match.weights must have shape"):
        vosops.memory_gather(match._replace(weights=match.weights[..., :2]), value)
    with pytest.raises(ValueError, match="Q = 44 queries"):
        vosops.memory_gather(match._replace(query_shape=(4, 11)), value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gather_from_a_memory_that_is_too_short(backend: str) -> None:
    arguments = problem("dot")
    value = arguments.pop("memory_value")
    with vosops.use_backend(backend):
        match = vosops.memory_match(**arguments, top_k=40)
        message = (
            r"match.indices must lie in the memory of 45 positions, got 13\d" if backend == "cpu" else "bound"
        )
        with pytest.raises(RuntimeError, match=message):
            vosops.memory_gather(match, value[:, :, :, :1])


def test_priors_are_values() -> None:
    assert replace(vosops.KernelPrior(), sigma=3.0) == vosops.KernelPrior(3.0)
