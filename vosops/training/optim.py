# SPDX-License-Identifier: Apache-2.0
"""AdamW with AOT's parameter groups, its learning rate as a function of the step, and averaged weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import OptimConfig

_ENCODERS = ("encoder.", "key_encoder.", "Encoder_Q.")
# New beside the pretrained maps. The rest of stcn_tiny's pyramid keeps to the encoder's rate, as it did when
# the shipped weights were trained.
_PROJECTIONS = ("key_encoder.top.",)
_UNDECAYED = ("absolute_pos_embed", "relative_position_bias_table", "relative_emb_v", "conv_out")


def is_encoder(name: str) -> bool:
    """Whether a parameter belongs to the pretrained image encoder, which learns more slowly."""
    return name.startswith(_ENCODERS) and not name.startswith(_PROJECTIONS)


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases and norms (1-D), nor to position tables and `conv_out`."""
    return parameter.dim() > 1 and not any(part in name for part in _UNDECAYED)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that need a gradient, in up to four groups: encoder or not, decayed or not.

    Groups carry "encoder", read by `set_learning_rate`, and weight_decay. Tensors of one rule share a group:
    AOT's one group per tensor gives the same steps.

    Raises:
        ValueError: no parameter needs a gradient.

    Source: AOT's published training, section 4.4.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rule = (is_encoder(name), is_decayed(name, parameter))
            groups.setdefault(rule, []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model needs a gradient: everything is frozen")
    return torch.optim.AdamW(
        [
            {"params": tensors, "encoder": encoder, "weight_decay": config.weight_decay * decayed}
            for (encoder, decayed), tensors in groups.items()
        ],
        lr=config.lr,
    )


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The learning rate of step 0, 1, ..., steps - 1: a linear warm-up from min_lr, then polynomial decay.

    Source: AOT's published training: power 0.9, warm-up over 5 % of the steps.
    """
    rising = round(config.warmup * steps)
    over = max(0, step - rising) / max(1, steps - rising)
    share = step / rising if step < rising else (1 - over) ** config.power
    return config.min_lr + (config.lr - config.min_lr) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, config: OptimConfig) -> None:
    """Gives every group its rate: the encoder's is min_lr + encoder_lr (rate - min_lr)."""
    for group in optimizer.param_groups:
        factor = config.encoder_lr if group["encoder"] else 1.0
        group["lr"] = config.min_lr + factor * (rate - config.min_lr)


class WeightAverage:
    """Exponential moving average of a model's state, on its device.

    The decay is min(1 - 1 / (share * steps), (1 + n) / (10 + n)) after n updates, so that the first, random
    weights are soon forgotten. What is not floating point is taken over as it is.

    Args:
        model: whose parameters and buffers are averaged; the average begins with them.
        share, steps: of the training over which it reaches.

    Source: AOT's published training, section 4.4: a share of 0.1.
    """

    def __init__(self, model: nn.Module, share: float, steps: int) -> None:
        self.decay = max(0.0, 1 - 1 / (share * steps))
        self.updates = 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's present weights in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        old, new = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                old.append(self.state[name])
                new.append(value)
            else:
                self.state[name].copy_(value)
        torch._foreach_lerp_(old, new, 1 - decay)

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Takes an average back.

        Raises:
            KeyError: an entry is missing.
        """
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates
