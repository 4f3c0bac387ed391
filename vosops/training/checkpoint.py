# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a run goes on exactly, and the weights it starts with and ends in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vosops.data.files import write_file
from vosops.models.aot_encoders import MobileNetV2Encoder
from vosops.models.checkpoint import CheckpointError
from vosops.models.encoders import IMAGENET_MEAN, IMAGENET_STD

_TENSORFLOW_INPUT = "RGB, (uint8-127)/127.5"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that this process draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Takes states of `random_state` back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes what `torch.save` takes. The file is the old one or the new one, whenever the process dies.

    Raises:
        OSError: it cannot be written; names it.
    """
    write_file(path, partial(_save, lambda file: torch.save(dict(content), file)))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU; no code of the file runs.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is no checkpoint of a training run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to go on from: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or "step" not in content:
        raise CheckpointError(f"{path} is no checkpoint of a training run")
    return content


def write_weights(path: Path, state: Mapping[str, Tensor], *, half: bool, about: Mapping[str, str]) -> None:
    """Writes a model's weights as safetensors, which `vosops.models.load` reads.

    Args:
        path: the file; it is replaced in one piece.
        state: of the model, or its average.
        half: floating-point tensors as float16, at half the size.
        about: text for the file's header.

    Raises:
        OverflowError: a weight is too large for float16; names it.
        OSError: the file cannot be written; names it.
    """
    tensors = {}
    for name, value in state.items():
        tensor = value.detach().cpu()
        if half and tensor.is_floating_point():
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise OverflowError(f"{name} does not fit into float16: set half to false")
        tensors[name] = tensor.contiguous().clone()
    content = save(tensors, metadata=dict(about))
    write_file(path, partial(_save, lambda file: file.write(content)))


def _save(write: Callable[[IO[bytes]], object], file: IO[bytes]) -> None:
    """Writes and waits for the disk: only then may the file take the place of the old one."""
    write(file)
    file.flush()
    os.fsync(file.fileno())


def load_mobilenet(model: nn.Module, path: Path) -> int:
    """Puts the ImageNet weights of a MobileNetV2 into the encoder of a model.

    The file has torchvision's names (features.N...). Models normalise images by ImageNet's mean and standard
    deviation; where the file's header says `input: RGB, (uint8-127)/127.5`, as TensorFlow's networks have it,
    the difference is folded into the first convolution: the network sees the same, but for the rim of the
    image, where a padding of zeros means another grey.

    Args:
        model: holds one or more `MobileNetV2Encoder`.
        path: a .safetensors file.

    Returns:
        How many tensors were loaded.

    Raises:
        ValueError: the model has no MobileNetV2 encoder.
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, lacks a tensor of the encoder or has it in another shape,
            or its header tells of an input that is not known.
    """
    encoders = [part for part in model.modules() if isinstance(part, MobileNetV2Encoder)]
    if not encoders:
        raise ValueError(f"encoder_weights: {type(model).__name__} has no MobileNetV2 encoder to put them in")
    if not path.is_file():
        raise FileNotFoundError(f"encoder_weights: no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            source = (file.metadata() or {}).get("input")
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"encoder_weights: {path.name} cannot be read: {error}") from error
    if source is not None and source != _TENSORFLOW_INPUT:
        raise CheckpointError(f"encoder_weights: {path.name} is for an input that is not known: {source}")
    loaded = 0
    for encoder in encoders:
        own = {name: value for name, value in encoder.state_dict().items() if name.startswith("features.")}
        own = {name: value for name, value in own.items() if not name.endswith("num_batches_tracked")}
        for name, value in own.items():
            if name not in state or state[name].shape != value.shape:
                found = list(state[name].shape) if name in state else "nothing"
                raise CheckpointError(
                    f"encoder_weights: {path.name} must hold {name} {list(value.shape)}, got {found}"
                )
        encoder.load_state_dict({name: state[name] for name in own}, strict=False)
        if source is not None:
            _fold_normalisation(encoder)
        loaded += len(own)
    return loaded


@torch.no_grad()
def _fold_normalisation(encoder: MobileNetV2Encoder) -> None:
    """From weights for x = 2 p - 127 / 127.5 to weights for z = (p - mean) / std: x = 2 std z + shift."""
    conv: Any = encoder.features[0][0]  # type: ignore[index]
    norm: Any = encoder.features[0][1]  # type: ignore[index]
    std, mean = torch.tensor(IMAGENET_STD), torch.tensor(IMAGENET_MEAN)
    shift = 2 * mean - 127 / 127.5
    # Before the normalisation's scale: taking a constant off its mean adds it to its input.
    norm.running_mean -= (conv.weight * shift[:, None, None]).sum((1, 2, 3))
    conv.weight *= 2 * std[:, None, None]
