# SPDX-License-Identifier: Apache-2.0
"""XMem, Cutie, STCN, STM and MiVOS: stand-ins with their signatures, before and after enable()."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import vosops
from vosops.compat import cutie, mivos, stcn, stm, xmem
from vosops.compat.affinity import Affinity
from vosops.compat.growing import Growing

from . import stand_ins

CK, CV, GRID = 8, 6, (4, 5)
HW = GRID[0] * GRID[1]
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}
FUNCTIONS = ("get_similarity", "do_softmax", "get_affinity", "readout")
_FUNCTIONS = {name: vars(stand_ins)[name] for name in FUNCTIONS}
PLACES: dict[ModuleType, dict[str, dict[str, Any]]] = {
    xmem: {
        "model.memory_util": _FUNCTIONS,
        "inference.memory_manager": {**_FUNCTIONS, "MemoryManager": stand_ins.XMemManager},
        "inference.kv_memory_store": {"KeyValueMemoryStore": stand_ins.KeyValueMemoryStore},
    },
    cutie: {
        "cutie.model.utils.memory_utils": _FUNCTIONS,
        "cutie.inference.memory_manager": {**_FUNCTIONS, "MemoryManager": stand_ins.CutieManager},
        "cutie.inference.kv_memory_store": {"KeyValueMemoryStore": stand_ins.CutieStore},
    },
    stcn: {
        "inference_memory_bank": {"MemoryBank": stand_ins.STCNBank},
        "model.network": {"MemoryReader": stand_ins.STCNReader},
    },
    stm: {"model": {"Memory": stand_ins.STMMemory}},
    mivos: {
        "model.eval_network": {"EvalMemoryReader": stand_ins.MiVOSEvalReader},
        "model.network": {"MemoryReader": stand_ins.MiVOSReader},
    },
}


@pytest.fixture
def modules(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """The stand-ins of one code base, given as the test's parameter, where they can be enabled."""
    with stand_ins.installed(request.param, PLACES[request.param]) as made:
        yield made


def of(compat: ModuleType) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("modules", [compat], indirect=True, ids=[compat.CODE_BASE.name])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("modules", PLACES, indirect=True, ids=[compat.CODE_BASE.name for compat in PLACES])
def test_every_piece_is_replaced_and_put_back(
    modules: dict[str, ModuleType], request: pytest.FixtureRequest
) -> None:
    compat = request.node.callspec.params["modules"]

    def pieces() -> list[Any]:
        found = []
        for target in compat.CODE_BASE.targets:
            top, _, method = target.name.partition(".")
            piece = vars(modules[target.module])[top]
            found.append(vars(piece)[method] if method else piece)
        return found

    before = pieces()
    with compat.enable() as report:
        assert list(report.replaced) == [target.name for target in compat.CODE_BASE.targets]
        assert all(new is not old for new, old in zip(pieces(), before, strict=True))
    assert all(new is old for new, old in zip(pieces(), before, strict=True))
    compat.enable()
    compat.disable()
    assert all(new is old for new, old in zip(pieces(), before, strict=True))


@of(xmem)
def test_xmem_functions_are_replaced_where_they_were_imported_by_name(modules: dict[str, ModuleType]) -> None:
    manager = modules["inference.memory_manager"]
    with xmem.enable():
        affinity = manager.get_affinity(draw(1, CK, 30), draw(1, 1, 30), draw(1, CK, HW), None)
        assert isinstance(affinity, Affinity)
    assert manager.get_affinity is stand_ins.get_affinity


def filled_manager(groups: int, long_term: bool, stages: int = 3) -> Any:
    """A manager to which a group is added with each frame, and prototypes of the first groups but one."""
    torch.manual_seed(1)
    manager = stand_ins.XMemManager(5, CV, long_term=long_term)
    for stage in range(groups + stages):
        values = [draw(2, CV, HW) for _ in range(min(groups, stage + 1))]
        manager.work_mem.add(draw(1, CK, HW), values, 1 + draw(1, 1, HW).square())
    if long_term:
        prototypes = [draw(2, CV, 9 - group) for group in range(max(1, groups - 1))]
        manager.long_mem.add(draw(1, CK, 9), prototypes, 1 + draw(1, 1, 9).square())
    return manager


@of(xmem)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("long_term", [False, True])
@pytest.mark.parametrize("selective", [False, True])
def test_xmem_match_reads_and_counts_as_published(
    modules: dict[str, ModuleType], groups: int, long_term: bool, selective: bool
) -> None:
    query, selection = draw(1, CK, *GRID), draw(1, CK, *GRID).sigmoid() if selective else None
    published, ours = filled_manager(groups, long_term), None
    expected = published.match_memory(query, selection)
    with xmem.enable():
        ours = filled_manager(groups, long_term)
        read = ours.match_memory(query, selection)
        assert all(isinstance(value, Growing) for value in ours.work_mem.v[:1])
    assert read.shape == (2 * groups, CV, *GRID)
    torch.testing.assert_close(read, expected, **TOLERANCE)
    for name in ("work_mem", "long_mem"):
        torch.testing.assert_close(getattr(ours, name).use, getattr(published, name).use, **TOLERANCE)
    if long_term:
        assert ours.work_mem.use.sum() > 0
    # The published code goes on with what the replaced one left, and the other way round.
    torch.testing.assert_close(ours.match_memory(query, selection), expected, **TOLERANCE)
    with xmem.enable():
        torch.testing.assert_close(published.match_memory(query, selection), expected, **TOLERANCE)


@of(cutie)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("long", [0, 7])
def test_cutie_reads_the_objects_of_a_bucket_where_their_values_lie(
    modules: dict[str, ModuleType], batch: int, long: int
) -> None:
    manager_module = modules["cutie.inference.memory_manager"]

    def reads() -> list[Tensor]:
        torch.manual_seed(2)
        manager = stand_ins.CutieManager()
        for _ in range(4):
            manager.work_mem.add({number: draw(batch, CV, HW) for number in (1, 4)})
        if long:
            manager.long_mem.add({number: draw(batch, CV, long) for number in (1, 4)})
        positions = 4 * HW + long
        keys = draw(batch, CK, positions), 1 + draw(batch, 1, positions).square()
        scores = manager_module.get_similarity(*keys, draw(batch, CK, HW), draw(batch, CK, HW).sigmoid())
        affinity, usage = manager_module.do_softmax(scores, top_k=6, inplace=True, return_usage=True)
        dense = manager_module.do_softmax(
            manager_module.get_similarity(*keys, draw(batch, CK, 3), draw(batch, CK, 3).sigmoid())
        )
        values = manager._get_visual_values_by_ids([4, 1])
        assert values.shape == (batch, 2, CV, positions)
        candidate = draw(batch, CV, positions)
        return [
            manager._readout(affinity, values),
            manager._readout(affinity, candidate),
            manager._readout(dense, candidate),
            manager._readout(dense, values),
            manager._readout(affinity + 0, values),
            usage,
            values + 0,
        ]

    expected = reads()
    with cutie.enable():
        ours = reads()
    for ours_one, expected_one in zip(ours, expected, strict=True):
        torch.testing.assert_close(ours_one, expected_one, **TOLERANCE)


def test_cutie_adds_a_batch_dimension_when_asked() -> None:
    operands = draw(CK, 30), draw(1, 30).square(), draw(CK, HW), draw(CK, HW).sigmoid()
    ours = cutie.get_similarity(*operands, add_batch_dim=True)
    torch.testing.assert_close(ours + 0, stand_ins.get_similarity(*operands, add_batch_dim=True), **TOLERANCE)


@of(stcn)
@pytest.mark.parametrize("temporary", [False, True])
def test_stcn_bank_reads_as_published_while_it_grows(modules: dict[str, ModuleType], temporary: bool) -> None:
    frames = [(draw(1, CK, 1, *GRID), draw(3, CV, 1, *GRID)) for _ in range(8)]
    query = draw(1, CK, *GRID)
    switches: list[Callable[[], Any]] = [stcn.disable, stcn.enable]
    banks = [stand_ins.STCNBank(3, 5), stand_ins.STCNBank(3, 5)]
    for index, frame in enumerate(frames):
        reads = []
        for switch, bank in zip(switches, banks, strict=True):
            switch()
            bank.add_memory(*frame, is_temp=temporary and index % 2 == 1)
            reads.append(bank.match_memory(query))
        torch.testing.assert_close(reads[1], reads[0], **TOLERANCE)
    assert isinstance(banks[1].mem_v, Growing)
    assert banks[1].mem_v.shape == banks[0].mem_v.shape
    stcn.disable()
    torch.testing.assert_close(banks[1].match_memory(query), reads[0], **TOLERANCE)


def gradients(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor | None]:
    """The result, and the gradients of its squares; None for an input it does not depend on."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = run(*leaves)
    result.square().sum().backward()
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def memory(batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        draw(batch, CK, 3, *GRID),
        draw(batch, CV, 3, *GRID),
        draw(batch, CK, *GRID),
        draw(batch, CV, *GRID),
    )


@pytest.mark.parametrize(
    ("modules", "run"),
    [
        (stcn, lambda mk, mv, qk, qv: (r := stand_ins.STCNReader()).readout(r.get_affinity(mk, qk), mv, qv)),
        (stm, lambda mk, mv, qk, qv: stand_ins.STMMemory()(mk, mv, qk, qv)[0]),
        (stm, lambda mk, mv, qk, qv: stand_ins.STMMemory()(mk, mv, qk, qv)[1] * qv.sum()),
        (mivos, stand_ins.MiVOSReader()),
    ],
    indirect=["modules"],
)
def test_training_reads_and_gradients_are_as_published(
    modules: dict[str, ModuleType], run: Callable[..., Tensor], request: pytest.FixtureRequest
) -> None:
    inputs = memory()
    expected = gradients(run, *inputs)
    with request.node.callspec.params["modules"].enable():
        ours = gradients(run, *inputs)
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


@of(mivos)
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("km", [None, 1.5])
def test_mivos_evaluation_reads_as_published(
    modules: dict[str, ModuleType], top_k: int | None, km: float | None
) -> None:
    keys, values, query = draw(3, CK, 4, *GRID), draw(3, CV, 4, *GRID), draw(1, CK, *GRID)
    reader = stand_ins.MiVOSEvalReader(top_k, km)
    expected = torch.cat([reader(keys[i : i + 1], values[i : i + 1], query) for i in range(3)])
    with mivos.enable():
        torch.testing.assert_close(reader(keys, values, query), expected, **TOLERANCE)
        torch.testing.assert_close(reader(keys[:1], values[:1], query), expected[:1], **TOLERANCE)


@of(stm)
def test_accelerate_recognises_models_classes_modules_and_engines(modules: dict[str, ModuleType]) -> None:
    class Engine:
        def __init__(self) -> None:
            self.network = torch.nn.Sequential(stand_ins.STMMemory())

    forward = stand_ins.STMMemory.forward
    for obj in (
        stand_ins.STMMemory,
        stand_ins.STMMemory(),
        torch.nn.DataParallel(stand_ins.STMMemory()),
        modules["model"],
        Engine(),
    ):
        with vosops.accelerate(obj) as report:
            assert list(report.replaced) == ["Memory.forward"]
            assert stand_ins.STMMemory.forward is not forward
        assert stand_ins.STMMemory.forward is forward


def test_accelerate_refuses_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    module = ModuleType("stood_in.model")
    module.Memory = stand_ins.STMMemory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stood_in.model", module)
    with pytest.raises(
        vosops.compat.UnknownVersionError, match=r"STM: .*Unknown: stood_in.model.Memory.forward"
    ):
        vosops.accelerate(module)
