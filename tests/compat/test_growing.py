# SPDX-License-Identifier: Apache-2.0
"""A memory that torch.cat extends in place: the numbers of torch.cat, and fewer copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from vosops.compat.growing import Growing, growing, plain


def frames(count: int, shape: tuple[int, ...] = (2, 3, 5)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("dim", [-1, 2])
def test_it_holds_what_torch_cat_gives_and_copies_rarely(dim: int) -> None:
    parts = frames(20)
    memory, addresses = growing(parts[0]), []
    for part in parts[1:]:
        memory = torch.cat([memory, part], dim)
        addresses.append(memory.data_ptr())
    assert torch.equal(memory, torch.cat(parts, -1))
    assert len(set(addresses)) <= 9  # 1.5 ** 9 is more than 20
    assert memory.stride(-2) == 1  # position-major
    assert memory._storage is not None
    assert memory._storage.rows.shape[-2] <= 1.5 * memory.shape[-1]


def test_a_second_continuation_of_the_same_memory_copies() -> None:
    first, second, left, right = frames(4)
    memory = torch.cat([growing(first), second], -1)
    one = torch.cat([memory, left], -1)
    other = torch.cat([memory, right], -1)
    assert torch.equal(one, torch.cat([first, second, left], -1))
    assert torch.equal(other, torch.cat([first, second, right], -1))
    assert torch.equal(memory, torch.cat([first, second], -1))


def test_only_growth_at_the_end_is_special() -> None:
    memory, part = (growing(x) for x in frames(2))
    for result in (
        torch.cat([plain(part), memory], -1),
        torch.cat([memory, part], 0),
        memory[..., :2],
        memory * 2,
    ):
        assert type(result) is Tensor
    with pytest.raises(RuntimeError):
        torch.cat([memory, torch.zeros(2, 4, 5)], -1)
    wider = torch.cat([memory, part.double()], -1)
    assert wider.dtype == torch.float64


def test_gradients_take_the_ordinary_cat() -> None:
    memory, part = frames(2)
    part.requires_grad_()
    result = torch.cat([growing(memory), part], -1)
    assert not isinstance(result, Growing)
    result.sum().backward()
    assert part.grad is not None
    with torch.no_grad():
        assert isinstance(torch.cat([growing(memory), part], -1), Growing)


def test_inference_mode_and_after() -> None:
    parts = frames(4)
    with torch.inference_mode():
        memory = torch.cat([growing(parts[0].clone()), parts[1]], -1)
        memory = torch.cat([memory, parts[2].clone()], -1)
    memory = torch.cat([memory, parts[3]], -1)
    assert torch.equal(memory, torch.cat(parts, -1))


def test_copies_are_independent() -> None:
    parts = frames(4)
    memory = torch.cat([growing(parts[0]), parts[1]], -1)
    twin = growing(copy.deepcopy(memory))
    assert torch.equal(pickle.loads(pickle.dumps(memory)), memory)
    one, other = torch.cat([memory, parts[2]], -1), torch.cat([twin, parts[3]], -1)
    assert torch.equal(one, torch.cat(parts[:3], -1))
    assert torch.equal(other, torch.cat([*parts[:2], parts[3]], -1))
