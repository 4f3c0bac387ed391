# SPDX-License-Identifier: Apache-2.0
"""The training loop: one process or many, stopped and gone on with exactly."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor, nn

from vosops.data.files import remove_leftovers, write_file
from vosops.models import VideoModel
from vosops.models.aot import AOT, IDENTITIES, Supervision
from vosops.models.checkpoint import load_weights, read_state_dict
from vosops.models.registry import find
from vosops.propagate.tracker import prefers_channels_last
from vosops.refine.network import NAME as REFINER
from vosops.refine.network import build_network

from .batches import Batches
from .checkpoint import (
    load_mobilenet,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
    write_weights,
)
from .clips import Batch, DataError
from .config import ConfigError, TrainConfig, dump
from .dataset import build_dataset
from .judge import HeldOut, contact_sheet, first_masks
from .losses import ClipLoss, clip_loss
from .optim import WeightAverage, learning_rate, make_optimizer, set_learning_rate
from .recompute import recompute_blocks
from .record import Record
from .settings import differences, plain

# Settings that do not change what is learnt: a run may go on with others.
_FREE = ("run", "workers", "overlay_every", "checkpoint_every", "half", "recompute")
CHECKPOINT, WEIGHTS, CONFIG = "checkpoint.pth", "model.safetensors", "config.yaml"


class TrainingError(RuntimeError):
    """A run that cannot go on; what was saved stays."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    step: how many steps are done.
    weights: the final file; None if the run was stopped before its end.
    """

    step: int
    weights: Path | None


def build_model(config: TrainConfig) -> nn.Module:
    """The model of a run with the weights that it starts from, in training mode.

    Raises:
        ConfigError: no such model, option or module to freeze; a refiner without patches, or the reverse.
        FileNotFoundError, CheckpointError: of the weights.
    """
    settings = config.model
    if (settings.name == REFINER) != config.data.patches:
        raise ConfigError(f"data.patches must be true for {REFINER} and for no other model")
    model: nn.Module
    try:
        if settings.name == REFINER:
            model = build_network(**settings.options)
        else:
            model = find(settings.name).build(**settings.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    if settings.weights is not None:
        state = read_state_dict(settings.weights)
        load_weights(model, state, name=settings.name, file=settings.weights.name)
    if settings.encoder_weights is not None:
        load_mobilenet(model, settings.encoder_weights)
    for name in settings.freeze:
        try:
            model.get_submodule(name).requires_grad_(False)
        except AttributeError as error:
            inside = ", ".join(child for child, _ in model.named_children())
            raise ConfigError(f"model.freeze: there is no module {name!r}; there are {inside}") from error
    if isinstance(model, AOT) and config.max_objects > IDENTITIES:
        raise ConfigError(f"max_objects must be at most {IDENTITIES} for {settings.name}")
    stride = model.stride if isinstance(model, VideoModel) and not isinstance(model, AOT) else 1
    if config.crop % stride:
        raise ConfigError(f"crop must be a multiple of {stride} for {settings.name}, got {config.crop}")
    return model.train()


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    minutes: float | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains as configured, into the folder config.run: config.yaml, log.csv, tensorboard/, overlays/,
    checkpoint.pth, and model.safetensors at the end.

    In a process that torchrun or `accelerate launch` started, the run is spread over all of them (DDP; gloo
    on CPUs). SIGTERM and SIGINT let the step end and save a checkpoint.

    Args:
        config: of the run.
        resume: go on with the run in the folder, from its checkpoint: the steps that follow give the losses
            that an uninterrupted run gives, with as many processes; bit for bit on the same machine.
        minutes: stop with a checkpoint after so long, to go on later.
        console: where progress is shown; standard error by default.

    Raises:
        ConfigError: the configuration does not fit: the model, the batch and the processes, or the run to go
            on with.
        FileExistsError: the folder holds a run, and `resume` is not asked for.
        FileNotFoundError: there is no run to go on with, or no weights to start from.
        CheckpointError, DataError: files that cannot be used, named.
        TrainingError: the loss is not finite, or a file that was there cannot be read.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"minutes must be above 0, got {minutes}")
    return _Run(config, resume, console or Console(stderr=True)).go(minutes)


class _Run:
    def __init__(self, config: TrainConfig, resume: bool, console: Console) -> None:
        self.config, self.console = config, console
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        saved = self._open_folder(resume)
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        if config.precision == "fp16" and self.device.type == "cpu":
            raise ConfigError("precision must be no or bf16 on a CPU, got fp16")
        torch.manual_seed(config.seed)
        model = build_model(config).to(self.device)
        if prefers_channels_last(self.device, torch.float32):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.recompute and not recompute_blocks(model):
            raise ConfigError(f"recompute must be false for {config.model.name}: it has no residual blocks")
        data = build_dataset(
            config.data,
            frames=config.frames,
            crop=config.crop,
            max_objects=config.max_objects,
            seed=config.seed,
        )
        self.batches = Batches(
            data,
            config,
            rank=self.rank,
            processes=self.accelerator.num_processes,
            pin=self.device.type == "cuda",
        )
        held, self.held_out = config.held_out, None
        if held is not None and self.accelerator.is_main_process:
            self.held_out = HeldOut(held, crop=config.crop, max_objects=config.max_objects)
        self.model: nn.Module = model
        self.average = None
        if config.optim.ema is not None and self.accelerator.is_main_process:
            self.average = WeightAverage(model, config.optim.ema, config.steps)
        self.optimizer: Any
        self.wrapped, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, config.optim))
        self.step, self.seconds = 0, 0.0
        self.pending: list[tuple[float, ...]] = []  # of the steps since the last row of the log
        # Processes draw apart: each has clips of its own.
        torch.manual_seed(config.seed + 1 + self.rank)
        if saved is not None:
            self._restore(saved)

    def _open_folder(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, if any; before anything else is made."""
        folder = self.config.run
        there = (folder / CHECKPOINT).is_file()
        if there and not resume:
            raise FileExistsError(f"{folder} holds a run: go on with --resume, or choose another run=")
        if resume and not there:
            raise FileNotFoundError(f"there is no run to go on with: {folder / CHECKPOINT} is missing")
        if not there:
            return None
        saved = read_checkpoint(folder / CHECKPOINT)
        then, now = ({**values, **dict.fromkeys(_FREE)} for values in (saved["config"], plain(self.config)))
        changed = differences(then, now)
        if changed:
            raise ConfigError(
                "\n  ".join((f"{folder} was begun with another configuration (then, now):", *changed))
            )
        return saved

    def _restore(self, saved: dict[str, Any]) -> None:
        processes = len(saved["random"])
        if processes != self.accelerator.num_processes:
            raise ConfigError(
                f"{self.config.run} was begun with {processes} processes, "
                f"there are {self.accelerator.num_processes}"
            )
        self.model.load_state_dict(saved["state_dict"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average is not None:
            self.average.load(saved["state_dict_ema"], saved["ema_updates"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.pending = [tuple(row) for row in saved["pending"][self.rank]]
        set_random_state(saved["random"][self.rank], self.device)

    def go(self, minutes: float | None) -> Outcome:
        """All steps that are left, or as many as the time allows."""
        config, folder = self.config, self.config.run
        record = None
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            write_file(folder / CONFIG, lambda file: file.write(dump(config).encode()))
            record = Record(folder, self.step, config.steps, self.console)
        begin = last = time.monotonic()
        stopped = False
        try:
            with _signals() as caught, _data_errors(config.run):
                for batch in self.batches.since(self.step):
                    row, logits = self._train_step(batch)
                    self.step += 1
                    now = time.monotonic()
                    self.seconds, last = self.seconds + now - last, now
                    self.pending.append(row)
                    self._report(record, batch, logits)
                    late = minutes is not None and now - begin > 60 * minutes
                    stopped = self._agree(late or bool(caught)) and self.step < config.steps
                    if stopped or self.step % config.checkpoint_every == 0 or self.step == config.steps:
                        self._save()
                    if stopped:
                        break
        finally:
            if record is not None:
                record.close()
        if stopped:
            return Outcome(self.step, None)
        return Outcome(self.step, self._finish())

    def _train_step(self, batch: Batch) -> tuple[tuple[float, ...], Tensor]:
        """One step: its loss, cross-entropy, Jaccard loss and gradient norm; the logits of frames 1...."""
        config = self.config
        done = self.step / config.steps
        rate = learning_rate(self.step, config.steps, config.optim)
        set_learning_rate(self.optimizer, rate, config.optim)
        self.optimizer.zero_grad()
        loss, logits = self._forward(batch, done)
        self.accelerator.backward(loss.total)
        if isinstance(self.model, AOT) and done >= config.aot.sequential_from:
            # As published: identities are fixed once memories are written with predictions.
            for parameter in self.model.patch_wise_id_bank.parameters():
                parameter.grad = None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self.accelerator.clip_grad_norm_(parameters, config.optim.clip or math.inf)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        values = torch.stack([loss.total.detach(), loss.cross_entropy, loss.jaccard])
        if self.accelerator.num_processes > 1:
            values = self.accelerator.reduce(values, "mean")
        row = (*values.tolist(), float(norm))
        if not math.isfinite(row[0]):
            raise TrainingError(
                f"the loss of step {self.step} is {row[0]}; the last checkpoint in {config.run} stays. "
                "A lower optim.lr, or precision=no, may help."
            )
        return row, logits

    def _forward(self, batch: Batch, done: float) -> tuple[ClipLoss, Tensor]:
        frames = batch.frames.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        masks = first_masks(labels, int(batch.objects.max()))
        if not isinstance(self.model, AOT):
            logits = self.wrapped(frames, masks)
            return clip_loss(logits, labels[:, 1:], batch.objects, self.config.loss, done), logits
        settings = self.config.aot
        supervision = Supervision(
            batch.objects.to(self.device),
            self._identities(len(masks), masks.shape[1]).to(self.device),
            labels if done < settings.sequential_from else None,
            reference=done < settings.reference,
        )
        logits = self.wrapped(frames, masks, supervision)
        if not supervision.reference:
            return clip_loss(logits, labels[:, 1:], batch.objects, self.config.loss, done), logits
        weight = 1 - done / settings.reference
        loss = clip_loss(logits, labels, batch.objects, self.config.loss, done, reference=weight)
        return loss, logits[:, 1:]

    def _identities(self, clips: int, objects: int) -> Tensor:
        """The identities (B, O) of a batch's objects, a function of seed, step and clip alone."""
        if not self.config.aot.shuffle:
            return torch.arange(1, objects + 1).expand(clips, -1)
        rows = []
        for clip in range(self.rank * clips, (self.rank + 1) * clips):
            rng = np.random.default_rng([self.config.seed, self.step, clip])
            rows.append(1 + rng.permutation(IDENTITIES)[:objects])
        return torch.from_numpy(np.stack(rows))

    def _report(self, record: Record | None, batch: Batch, logits: Tensor) -> None:
        config = self.config
        held = config.held_out
        judged = held is not None and (self.step % held.every == 0 or self.step == config.steps)
        logged = judged or self.step % config.log_every == 0 or self.step == config.steps
        if record is not None:
            record.advance(self.step)
            if logged:
                means = np.mean(self.pending, 0)
                values = dict(zip(("loss", "cross_entropy", "jaccard", "gradient_norm"), means, strict=True))
                values["lr"] = learning_rate(self.step - 1, config.steps, config.optim)
                values["seconds"] = self.seconds
                if judged and self.held_out is not None:
                    state = None if self.average is None else self.average.state
                    values["held_out_j"] = self.held_out.score(self.model, state, self.device)
                record.log(self.step, values)
            if self.step % config.overlay_every == 0:
                predicted = logits[:2].detach().argmax(2)
                record.picture(self.step, contact_sheet(batch.frames[:2], batch.labels[:2], predicted))
        if logged:
            self.pending = []

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop: all of them must leave the loop after the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _save(self) -> None:
        shared = gather_object([(random_state(self.device), self.pending)])
        if self.accelerator.is_main_process:
            content = {
                "step": self.step,
                "seconds": self.seconds,
                "config": plain(self.config),
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": [state for state, _ in shared],
                "pending": [rows for _, rows in shared],
            }
            if self.average is not None:
                content |= {"state_dict_ema": self.average.state, "ema_updates": self.average.updates}
            if self.accelerator.scaler is not None:
                content["scaler"] = self.accelerator.scaler.state_dict()
            write_checkpoint(self.config.run / CHECKPOINT, content)
        self.accelerator.wait_for_everyone()

    def _finish(self) -> Path:
        path = self.config.run / WEIGHTS
        if self.accelerator.is_main_process:
            state = self.model.state_dict() if self.average is None else self.average.state
            about = {"model": self.config.model.name, "steps": str(self.config.steps)}
            write_weights(path, state, half=self.config.half, about=about)
        self.accelerator.wait_for_everyone()
        return path


@contextmanager
def _data_errors(run: Path) -> Iterator[None]:
    """A broken file in the middle of a run is an error of the run."""
    try:
        yield
    except DataError as error:
        raise TrainingError(f"{error}\nThe last checkpoint in {run} stays.") from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one kills as usual."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(number, before[number])

    try:
        for handled in (signal.SIGTERM, signal.SIGINT):
            before[handled] = signal.signal(handled, note)
    except ValueError:  # not in the main thread: nobody signals this one
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
