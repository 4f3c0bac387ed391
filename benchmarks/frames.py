# SPDX-License-Identifier: Apache-2.0
"""What a whole frame of a model costs: `python -m benchmarks.run frames`.

Stages: encode the image, read the memory, decode, memorise (every fifth frame). Three implementations run in
one process with the same weights and the same filled memory, interleaved; each frame's probabilities are
compared first:

- vosops: the model's own session, as `Tracker` runs it;
- eager_read: our network around the published read and a bank that torch.cat grows;
- published: the published formulas throughout (`peers/stcn_frame.py`), channels first.

Beside them: memory formats and types of the convolutions, and the peak memory of a frame, each in a process
of its own. Weights are random: the cost does not depend on them.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vosops import memory_read, models
from vosops.memory import Bounded, bank, long_term
from vosops.memory.long_term import LongTerm
from vosops.models import SessionSettings

from . import environment, measure
from .peers import stcn_frame

RESULTS = Path(__file__).parent / "results" / "frames.json"
STAGES = ("encode", "read", "decode", "memorise")
MEMORY_EVERY = 5
_TOLERANCE = 1e-3  # of probabilities: scores within rounding may be ranked either way by a top-k
_FILE_WIDTH = 140
_CPU = torch.device("cpu")

Times = dict[str, float]  # stage -> milliseconds


@dataclass(frozen=True)
class FrameCase:
    """One model at one size.

    Args:
        model: name in `vosops.models.MODELS`.
        size: (height, width) of the frame, pixels.
        objects: how many are followed.
        frames: whole frames in the memory.
        prototypes: long-term positions beside them (XMem); 10,000 and 10 frames are its cap.
    """

    model: str
    size: tuple[int, int]
    objects: int
    frames: int
    prototypes: int = 0


CASES = {
    "stcn-480p-t20-o3": FrameCase("stcn", (480, 854), 3, 20),
    "stcn-480p-t20-o1": FrameCase("stcn", (480, 854), 1, 20),
    "xmem-480p-cap-o3": FrameCase("xmem", (480, 854), 3, 10, 10_000),
    "xmem-480p-cap-o1": FrameCase("xmem", (480, 854), 1, 10, 10_000),
    "stm-480p-t5-o1": FrameCase("stm", (480, 854), 1, 5),
    "xmem-1080p-cap-o3": FrameCase("xmem", (1080, 1920), 3, 10, 10_000),
}
STANDARD = ("stcn-480p-t20-o3", "stcn-480p-t20-o1", "xmem-480p-cap-o3", "xmem-480p-cap-o1")
PEAK = "xmem-1080p-cap-o3"


def random_model(name: str) -> Any:
    """A registered model whose features keep their size from layer to layer and listen to the masks.

    The default initialisation grows through the residual blocks until affinities overflow in the published
    softmax, which subtracts no maximum.
    """
    torch.manual_seed(0)
    model = models.create(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


class Ours:
    """A registered model's session with a filled memory."""

    def __init__(self, case: FrameCase) -> None:
        self.model = random_model(case.model).to(memory_format=torch.channels_last)
        policy = LongTerm(case.frames + 2) if case.prototypes else Bounded(case.frames + 1)
        self.session = self.model.open_session(SessionSettings(memory_every=MEMORY_EVERY, policy=policy))
        self.ids = list(range(1, case.objects + 1))
        frame = torch.rand(1, 3, *case.size)
        self.image = self.model.prepare(frame).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, case.objects + 1, (1, 1, *(-(-side // 64) for side in case.size)))
        labels = torch.nn.functional.interpolate(labels.float(), case.size).round()
        masks = self.model.prepare_mask(torch.cat([(labels == i).float() for i in self.ids], 1))
        self.probabilities = torch.cat((1 - masks.sum(1, keepdim=True), masks), 1)
        with torch.no_grad():
            self._fill(case)
        self.state = self.session.state_dict()

    def _fill(self, case: FrameCase) -> None:
        # Small changes of the first frame: every frame is near it, none equals it.
        for number in range(1 if case.prototypes else case.frames):
            image = self.image + 0.1 * torch.randn_like(self.image)
            features = self.session.encode(image)
            index = number * MEMORY_EVERY
            self.session.remember(index, image, features, self.probabilities, self.ids, given=True)
        self.index = (case.frames + 1) * MEMORY_EVERY
        if case.prototypes:
            state = self.session.state_dict()
            _extend(state["memory"], case)
            self.session.load_state_dict(state | {"last": self.index - MEMORY_EVERY})

    def frame(self) -> tuple[Times, Tensor]:
        """Milliseconds of each stage, and the probabilities."""
        self.session.load_state_dict(self.state)  # every frame meets the same memory
        watch, read_ms = _Watch(), [0.0]
        features = self.session.encode(self.image)
        watch.lap("encode")
        with _read_time(read_ms):
            probabilities = self.session.segment(features)
        watch.lap("decode")
        self.session.remember(self.index, self.image, features, self.probabilities, self.ids, given=True)
        watch.lap("memorise")
        watch.times["read"] = read_ms[0]
        watch.times["decode"] -= read_ms[0]
        return watch.times, probabilities


class Published:
    """A frame with the published read and bank; `network` too: the published formulas around it."""

    def __init__(self, ours: Ours, case: FrameCase, *, network: bool) -> None:
        self._ours, self._network = ours, network
        self._xmem = case.model == "xmem"
        self._image = ours.image
        self._model: Any = ours.model
        if network:
            self._model = copy.deepcopy(ours.model).to(memory_format=torch.contiguous_format)
            self._image = ours.image.contiguous()
        self._memory = _published_memory(ours, self._xmem)
        self._hidden = ours.state["hidden"] if self._xmem else None
        self._masks = ours.probabilities[:, 1:]

    def frame(self) -> tuple[Times, Tensor]:
        """As `Ours.frame`."""
        watch, model = _Watch(), self._model
        features = model.encode(self._image)
        watch.lap("encode")
        read = self._memory.read(features)
        watch.lap("read")
        probabilities = self._decode(read, features)
        watch.lap("decode")
        self._memory.grown(self._value(features), features)
        watch.lap("memorise")
        return watch.times, probabilities

    def _decode(self, read: Tensor, features: Any) -> Tensor:
        if self._xmem:
            if self._network:
                return stcn_frame.xmem_decode(self._model, read, features, self._hidden)
            return self._model.decode(read, features, self._hidden)[0].softmax(1)
        if self._network:
            return stcn_frame.stcn_decode(self._model, read, features)
        return self._model.decode(read, features).softmax(1)

    def _value(self, features: Any) -> Tensor:
        arguments = (self._image, self._masks, features)
        if self._xmem:
            if self._network:
                return stcn_frame.xmem_value(self._model, *arguments, self._hidden)[0]
            return self._model.encode_value(*arguments, self._hidden, deep_update=True)[0]
        if self._network:
            return stcn_frame.stcn_value(self._model, *arguments)
        return self._model.encode_value(*arguments)


class _Watch:
    def __init__(self) -> None:
        self.times: Times = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.times[stage], self._last = (now - self._last) * 1e3, now


@contextmanager
def _read_time(total: list[float]) -> Iterator[None]:
    """Adds the milliseconds spent in memory reads to total[0]; every session reads through a memory."""

    def timed(*args: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        result = memory_read(*args, **options)
        total[0] += (time.perf_counter() - begin) * 1e3
        return result

    modules: tuple[Any, ...] = (bank, long_term)
    for module in modules:
        module.memory_read = timed
    try:
        yield
    finally:
        for module in modules:
            module.memory_read = memory_read


def _extend(state: dict[str, Any], case: FrameCase) -> None:
    """Makes a long-term memory's state of one frame one of `frames` frames and `prototypes` prototypes.

    Playing 400 remembered frames would give the same sizes; only these matter for the cost.
    """
    area = len(state["key"])
    rows = torch.arange(case.prototypes + case.frames * area) % area
    state["newest_long"] = 0  # the prototypes are from the first frame
    state["frames"] = [number * MEMORY_EVERY for number in range(case.frames)]
    for name in ("key", "shrinkage", "use", "life"):
        state[name] = state[name][rows]
    state["key"] = state["key"] + 0.05 * torch.randn_like(state["key"]) * state["key"].std()
    frames = torch.tensor(state["frames"]).repeat_interleave(area)
    state["frame"] = torch.cat((frames.new_zeros(case.prototypes), frames))[:, None]
    state["selection"] = state["selection"].repeat(case.frames, 1)
    for group in state["groups"]:
        group["value"] = group["value"][rows]


def _published_memory(ours: Ours, xmem: bool) -> stcn_frame.GrownMemory:
    """Our memory's content, channel-major."""
    memory, objects = ours.state["memory"], len(ours.ids)
    value = memory["groups"][0]["value"]
    if xmem:
        value = value.unflatten(1, (objects, -1)).permute(1, 2, 0)[None]  # [1, O, Cv, M]
        return stcn_frame.GrownMemory(memory["key"].mT[None], value, memory["shrinkage"].mT[None], 30)
    return stcn_frame.GrownMemory(
        memory["key"].flatten(2), value.unflatten(1, (objects, -1)).flatten(3), None, 20
    )


@torch.no_grad()
def measure_case(name: str, *, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case: every implementation's stages, after their probabilities were compared.

    Models other than STCN and XMem have no published peer here and are timed alone.

    Raises:
        RuntimeError: an implementation gives other probabilities.
    """
    case = CASES[name]
    ours = Ours(case)
    implementations: dict[str, Ours | Published] = {"vosops": ours}
    if case.model in ("stcn", "xmem"):
        implementations["eager_read"] = Published(ours, case, network=False)
        implementations["published"] = Published(ours, case, network=True)
    expected = ours.frame()[1]
    samples: dict[str, list[Times]] = {key: [] for key in implementations}
    errors = {}
    for key, implementation in implementations.items():
        errors[key] = (implementation.frame()[1] - expected).abs().amax().item()  # also the warm-up
        if not errors[key] <= _TOLERANCE:  # NaN too
            raise RuntimeError(f"{name}: {key} differs from vosops by {errors[key]:.1e}")
    names = list(implementations)
    for turn in range(repeats):
        at = turn % len(names)
        for key in names[at:] + names[:at]:
            samples[key].append(implementations[key].frame()[0])
    grid = [-(-side // 16) for side in case.size]
    positions = case.prototypes + case.frames * grid[0] * grid[1]
    rows = []
    for key in names:
        stages = {stage: statistics.median(times[stage] for times in samples[key]) for stage in STAGES}
        frame = stages["encode"] + stages["read"] + stages["decode"] + stages["memorise"] / MEMORY_EVERY
        rows.append(
            {
                "case": name,
                **asdict(case),
                "size": list(case.size),
                "positions": positions,
                "implementation": key,
                **{f"{stage}_ms": value for stage, value in stages.items()},
                "frame_ms": frame,
                "read_share": stages["read"] / frame,
                "repeats": repeats,
                "error": errors[key],
            }
        )
    for row in rows:
        row["ratio"] = row["frame_ms"] / rows[0]["frame_ms"]
    return rows


@torch.no_grad()
def measure_formats(model_name: str, *, repeats: int) -> list[dict[str, Any]]:
    """Encoder, decoder and value encoder by memory format and type: what `prefers_channels_last` rests on."""
    original = random_model(model_name)
    image, masks = torch.rand(1, 3, 480, 864), torch.rand(1, 3, 480, 864)
    calls: dict[tuple[str, str, str], Callable[[], object]] = {}
    for layout in ("channels_first", "channels_last"):
        memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        model = copy.deepcopy(original).to(memory_format=memory_format)
        x = image.contiguous(memory_format=memory_format)
        for dtype in ("float32", "bfloat16"):
            for stage, call in _convolution_stages(model, x, masks, dtype).items():
                calls[stage, layout, dtype] = call
    for call in calls.values():
        call()
    timings = measure.interleaved(
        {"|".join(key): call for key, call in calls.items()}, _CPU, repeats=repeats, budget_s=120
    )
    rows = []
    for key, timing in timings.items():
        stage, layout, dtype = key.split("|")
        base = timings[f"{stage}|channels_first|float32"].median_ms
        rows.append(
            {
                "model": model_name,
                "stage": stage,
                "layout": layout,
                "dtype": dtype,
                "ms": timing.median_ms,
                "repeats": timing.repeats,
                "speedup": base / timing.median_ms,
            }
        )
    return rows


def _convolution_stages(
    model: Any, image: Tensor, masks: Tensor, dtype: str
) -> dict[str, Callable[[], object]]:
    def cast() -> Any:
        return nullcontext() if dtype == "float32" else torch.autocast("cpu", getattr(torch, dtype))

    with cast():
        features = model.encode(image)
        value = model.encode_value(image, masks, features)

    def run(call: Callable[[], object]) -> Callable[[], object]:
        def timed() -> object:
            with cast():
                return call()

        return timed

    return {
        "encode": run(lambda: model.encode(image)),
        "memorise": run(lambda: model.encode_value(image, masks, features)),
        "decode": run(lambda: model.decode(value, features)),
    }


@torch.no_grad()
def measure_peak(name: str) -> dict[str, Any]:
    """Peak resident memory of this process during a whole frame, all of it: torch, weights and memory."""
    case = CASES[name]
    ours = Ours(case)
    held = ours.session.memory_nbytes
    ours.state = {}  # a copy of the memory that only the timing needs

    def frame() -> None:
        features = ours.session.encode(ours.image)
        ours.session.segment(features)
        ours.session.remember(ours.index, ours.image, features, ours.probabilities, ours.ids, given=True)
        ours.index += MEMORY_EVERY

    extra = measure.peak_extra_bytes(frame, _CPU)
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "case": name,
        **asdict(case),
        "size": list(case.size),
        "memory_bytes": held,
        "frame_extra_bytes": extra,
        "frame_peak_bytes": whole if extra is None else measure._status_bytes("VmHWM"),
    }


def _in_process(*arguments: str, threads: int) -> Any:
    """JSON from this module run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.frames", *arguments, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]]) -> Table:
    """One case's stages."""
    first = rows[0]
    result = Table(
        title=f"{first['case']}: {first['positions']} memory positions, {first['objects']} objects; ms",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("")
    for name in (*STAGES, "frame", "x vosops", "read share", "error"):
        result.add_column(name, justify="right")
    for row in rows:
        stages = [f"{row[f'{stage}_ms']:.0f}" for stage in STAGES]
        result.add_row(
            row["implementation"],
            *stages,
            f"{row['frame_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['read_share']:.1%}",
            f"{row['error']:.0e}",
        )
    return result


def main(
    case: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(CASES)}; repeatable. Default: the first four."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds; medians are reported.")] = 7,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: torch's choice.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Formats, types and peak memory too, into benchmarks/results.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write this JSON file.")] = None,
    peak: Annotated[
        str | None, typer.Option(help="Print the peak memory of one case, in this process.")
    ] = None,
) -> None:
    """Time whole frames of the models against the published formulas."""
    names = case or list(STANDARD)
    unknown = [name for name in [*names, *([peak] if peak else [])] if name not in CASES]
    if unknown:
        raise typer.BadParameter(f"--case must be one of {', '.join(CASES)}; got {', '.join(unknown)}")
    if repeats < 1:
        raise typer.BadParameter(f"--repeats must be at least 1, got {repeats}")
    if threads is not None:
        torch.set_num_threads(threads)
    if peak is not None:
        print(json.dumps(measure_peak(peak)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    record: dict[str, Any] = {"environment": environment.collect(_CPU), "rows": []}
    for name in names:
        rows = measure_case(name, repeats=repeats)
        record["rows"] += rows
        console.print(table(rows))
    if everything:
        output = output or RESULTS
        record["formats"] = measure_formats("stcn", repeats=repeats)
        for row in record["formats"]:
            console.print("{stage:9} {layout:14} {dtype:9} {ms:6.0f} ms  x{speedup:.2f}".format(**row))
        record["peak"] = [_in_process("--peak", PEAK, threads=torch.get_num_threads())]
        for row in record["peak"]:
            console.print(f"{row['case']}: peak {row['frame_peak_bytes'] / 1e9:.2f} GB")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"wrote {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
