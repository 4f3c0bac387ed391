# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints: read safely, checked entry by entry, recognised when they are another model's."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

# Averaged weights come first: they are the ones that papers report.
_NESTED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model", "network", "net", "model_state_dict"),
)
_PREFIX = "module."  # of nn.DataParallel
_FIRST_CONV = "value_encoder.conv1.weight"
# Counters of batch normalisation, and a token that newer AOT files hold.
_UNREAD = ("num_batches_tracked", "LSTT.mask_token")


class CheckpointError(ValueError):
    """A file that is no checkpoint, or not one of the model.

    Attributes:
        missing: entries of the model that the file lacks.
        unexpected: entries of the file that the model lacks.
        shapes: name to (shape in the file, shape in the model).
        looks_like: names of the registered models that the file fits; empty if none.
    """

    def __init__(self, message: str, misfit: Misfit | None = None, looks_like: list[str] | None = None):
        super().__init__(message)
        misfit = Misfit() if misfit is None else misfit
        self.missing, self.unexpected, self.shapes = misfit.missing, misfit.unexpected, misfit.shapes
        self.looks_like = looks_like or []


@dataclass
class Misfit:
    """How a state dict differs from a model's; false if it does not."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.shapes)

    def lines(self) -> Iterator[str]:
        """Every misfit, in words."""
        if self.missing:
            yield f"missing ({len(self.missing)}): {', '.join(self.missing)}"
        if self.unexpected:
            yield f"unexpected ({len(self.unexpected)}): {', '.join(self.unexpected)}"
        for name, (found, expected) in self.shapes.items():
            yield f"shape of {name}: {found} in the file, {expected} in the model"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file, by the names of the published modules.

    Takes .safetensors, and what torch.save wrote (.pth, .pt; weights only: no code of the file runs): the
    state dict itself, or one inside a training checkpoint, whose optimizer state is left out; averaged
    weights (EMA) go before others. The "module." of nn.DataParallel is stripped.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be read, or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    state: object
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ImportError("a .safetensors file needs safetensors: pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"weights: {path.name} cannot be read as weights only: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # each format raises errors of its own for a damaged file
        raise CheckpointError(f"weights: {path.name} cannot be read: {error}") from error
    found = state
    while isinstance(found, Mapping) and not _is_state_dict(found):
        inner = next((found[name] for name in _NESTED if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not _is_state_dict(found):
        raise CheckpointError(f"weights: {path.name} must hold a state dict, got {_described(state)}")
    if all(name.startswith(_PREFIX) for name in found):
        return {name.removeprefix(_PREFIX): value for name, value in found.items()}
    return dict(found)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, name: str, file: str) -> None:
    """Loads a state dict into a model, if all of it fits; otherwise the model is unchanged.

    A value encoder for one object (4 input channels, stage 0 of STCN's and XMem's training) is widened by
    zeros for the other objects' masks. Counters of batch normalisation may be missing, or there without need;
    so may be AOT's token that no published network reads.

    Args:
        model: whose names and shapes count.
        state: of `read_state_dict`.
        name, file: of the model and the file, for the error.

    Raises:
        CheckpointError: it does not fit; names every misfit, and the model that the file looks like.
    """
    own = model.state_dict()
    state = adapted(state, own)
    misfit = compare(state, own)
    if not misfit:
        counters = {key: value for key, value in own.items() if key not in state}
        model.load_state_dict({**state, **counters})
        return
    from .registry import recognise  # the registry builds models through this module

    alike = [other for other in recognise(state) if other != name]
    text = f"{file} does not fit {name}"
    if alike:
        article = "an" if alike[0][0] in "aeiourx" else "a"
        text += f": this looks like {article} {' or '.join(alike)} checkpoint"
    raise CheckpointError("\n  ".join((f"{text} ({len(misfit)} misfits)", *misfit.lines())), misfit, alike)


def compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Misfit:
    """How `state` differs from a model's own state dict, by names and shapes."""
    return Misfit(
        [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        [key for key in state if key not in own],
        {
            key: (list(state[key].shape), list(value.shape))
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        },
    )


def adapted(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state` as a model with the state dict `own` takes it: without entries that no network reads, and a
    value encoder of 4 input channels brought to 5."""
    state = {key: value for key, value in state.items() if key in own or not key.endswith(_UNREAD)}
    weight, expected = state.get(_FIRST_CONV), own.get(_FIRST_CONV)
    if (
        weight is None
        or expected is None
        or weight.dim() != 4
        or (weight.shape[1], expected.shape[1]) != (4, 5)
    ):
        return state
    return {**state, _FIRST_CONV: torch.cat((weight, torch.zeros_like(weight[:, :1])), 1)}


def _is_state_dict(found: Mapping[object, object]) -> bool:
    return bool(found) and all(isinstance(v, Tensor) for v in found.values())


def _described(state: object) -> str:
    if isinstance(state, Mapping):
        names = ", ".join(str(name) for name in list(state)[:6])
        return f"a dictionary of {names}" if names else "an empty dictionary"
    return type(state).__name__
