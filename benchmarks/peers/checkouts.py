# SPDX-License-Identifier: Apache-2.0
"""Checkouts of the published code, run by their own inference loops on a CPU, unedited.

A folder holds XMem, Cutie, STCN, STM and Mask-Propagation as their authors publish them. What they need and
this environment may lack (a GPU, downloads, configuration packages) is put in their place at import. One
process imports one of them: several name their packages alike.
"""

from __future__ import annotations

import importlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = {"xmem": (64, 512), "cutie": (64, 256), "stcn": (64, 512), "stm": (128, 512), "mivos": (128, 512)}
FOLDERS = {
    "xmem": "XMem",
    "xmem-long": "XMem",
    "cutie": "Cutie",
    "cutie-long": "Cutie",
    "stcn": "STCN",
    "stm": "STM",
    "mivos": "Mask-Propagation",
    "mivos-kernel": "Mask-Propagation",
}
_PEAKED_KEYS = 3.0
_HEEDED_MASKS = 8.0
_DECIDED_MASKS = {"xmem": -2.0, "cutie": -1.0, "stcn": 2.0, "stm": 2.0, "mivos": 2.0}
_XMEM = {
    "top_k": 30,
    "mem_every": 5,
    "deep_update_every": -1,
    "enable_long_term_count_usage": True,
    "max_mid_term_frames": 10,
    "min_mid_term_frames": 5,
    "num_prototypes": 128,
    "max_long_term_elements": 10_000,
}


@dataclass(frozen=True)
class Clip:
    """Frames (T, 3, H, W) in 0..1, and the objects' masks (O, H, W) on the first, 0 or 1."""

    frames: Tensor
    masks: Tensor


def moving_clip(frames: int, size: tuple[int, int], objects: int) -> Clip:
    """Textured discs that drift over a textured background, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    height, width = size

    def texture() -> Tensor:
        coarse = torch.rand(1, 3, max(2, height // 24), max(2, width // 24), generator=generator)
        return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0]

    background, textures = texture(), [texture() for _ in range(objects)]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images, first = [], []
    for index in range(frames):
        image = background.clone()
        for number, fill in enumerate(textures):
            center_y = height * (0.3 + 0.4 * ((number % 2 + index / 40) % 1))
            center_x = width * ((number + 0.5) / objects + 0.004 * index)
            inside = (rows - center_y) ** 2 + (columns - center_x) ** 2 < (0.16 * height) ** 2
            image[:, inside] = fill[:, inside]
            if index == 0:
                first = [mask & ~inside for mask in first] + [inside]
        images.append(image)
    return Clip(torch.stack(images), torch.stack(first).float())


class Checkout:
    """One published code base, imported, with random weights.

    Args:
        name: one of FOLDERS; "-long" switches the long-term memory on, "-kernel" MiVOS's Gaussian.
        root: the folder that holds the checkouts.
        settings: entries of XMem's or Cutie's configuration, in place of the published ones.
        fill: frames that STCN's memory holds before the clip: the first one, with noise.

    Raises:
        ValueError: name is unknown, or the checkout is not in root.
    """

    def __init__(
        self, name: str, root: Path, settings: dict[str, Any] | None = None, *, fill: int = 0
    ) -> None:
        if name not in FOLDERS:
            raise ValueError(f"name must be one of {', '.join(FOLDERS)}, got '{name}'")
        folder = root / FOLDERS[name]
        if not folder.is_dir():
            raise ValueError(f"--peers must be a folder with a checkout {FOLDERS[name]}; {root} has none")
        self.name, self.base = name, name.partition("-")[0]
        self.long = name.endswith("-long")
        sys.path.insert(0, str(folder))
        _stand_in_modules()
        self._root, self._settings, self._fill = folder, settings or {}, fill
        with torch.random.fork_rng(), _no_downloads(), on_cpu():
            torch.manual_seed(0)
            self.network: nn.Module = getattr(self, f"_{self.base}")()
            with torch.no_grad():
                for parameter in self.network.parameters():
                    if parameter.dim() > 1:  # features keep their size from layer to layer
                        parameter.normal_(0, parameter[0].numel() ** -0.5)
                for path, module in self.network.named_modules():
                    # A softmax as peaked as a trained one's, so that the last of the top k reads little, and
                    # masks that the memory heeds and that decide. STCN's published softmax overflows with
                    # larger keys.
                    if path.endswith("key_proj.key_proj") and self.base != "stcn":
                        module.weight.mul_(_PEAKED_KEYS)
                    if path.endswith("value_encoder.conv1"):
                        module.weight[:, 3:].mul_(_HEEDED_MASKS)
                    if path.endswith((".pred", ".pred2")):
                        module.weight.mul_(_DECIDED_MASKS[self.base])
        self.network.eval()

    def run(self, clip: Clip, after_frame: Callable[[int], None] | None = None) -> Tensor:
        """Segment the clip by the published loop: probabilities (T - 1, O + 1, H, W) of the later frames."""
        with torch.no_grad(), on_cpu():
            frames = []
            for index, probabilities in enumerate(getattr(self, f"_run_{self.base}")(clip)):
                frames.append(probabilities)
                if after_frame is not None:
                    after_frame(index)
        return torch.cat(frames) if frames[0].dim() == 4 else torch.stack(frames)

    def manager(self) -> Any:
        """A new memory manager of XMem or Cutie."""
        module = importlib.import_module(self.core.MemoryManager.__module__)
        if self.base == "xmem":
            return module.MemoryManager(self.config)
        return module.MemoryManager(self.config, self.core.ObjectManager())

    def positions(self) -> int | None:
        """Memory positions held after the last run of XMem, Cutie or STCN."""
        if self.base == "stcn":
            return int(self.memory.mem_k.shape[2])
        if self.base not in ("xmem", "cutie"):
            return None
        stores = [self.memory.work_mem, *([self.memory.long_mem] if self.long else [])]
        return sum(int(store.size if self.base == "xmem" else store.size(0)) for store in stores)

    def _xmem(self) -> nn.Module:
        self.core = importlib.import_module("inference.inference_core")
        self.config: Any = {**_XMEM, "enable_long_term": self.long, **self._settings}
        return importlib.import_module("model.network").XMem(self.config)

    def _run_xmem(self, clip: Clip) -> Iterator[Tensor]:
        core = self.core.InferenceCore(self.network, config=self.config)
        labels = list(range(1, len(clip.masks) + 1))
        core.set_all_labels(labels)
        for index, frame in enumerate(_normalised(clip.frames)):
            given = (clip.masks, labels) if index == 0 else (None, None)
            probabilities = core.step(frame, *given, end=index == len(clip.frames) - 1)
            if index:
                yield probabilities
        self.memory = core.memory

    def _cutie(self) -> nn.Module:
        self.core = importlib.import_module("cutie.inference.inference_core")
        config = _yaml(self._root / "cutie/config/eval_config.yaml")
        config["model"] = _yaml(self._root / "cutie/config/model/base.yaml")
        config |= {"use_long_term": self.long, "mem_every": 5, **self._settings}
        self.config = _Config(_resolved(config, config))
        return importlib.import_module("cutie.model.cutie").CUTIE(self.config)

    def _run_cutie(self, clip: Clip) -> Iterator[Tensor]:
        core = self.core.InferenceCore(self.network, cfg=self.config)
        objects = list(range(1, len(clip.masks) + 1))
        for index, frame in enumerate(clip.frames):
            given = {"mask": clip.masks, "objects": objects, "idx_mask": False} if index == 0 else {}
            probabilities = core.step(frame, end=index == len(clip.frames) - 1, **given)
            if index:
                yield probabilities
        self.memory = core.memory

    def _stcn(self) -> nn.Module:
        self.core = importlib.import_module("inference_core")
        self.core.torch = _CpuTorch()
        return importlib.import_module("model.eval_network").STCN()

    def _run_stcn(self, clip: Clip) -> Iterator[Tensor]:
        core = self.core.InferenceCore(self.network, _normalised(clip.frames)[None], len(clip.masks))
        if self._fill:
            self._prefill(core, clip)
        core.interact(clip.masks[:, None], 0, len(clip.frames))
        yield _unpadded(core.prob[:, 1:, 0], core.pad).transpose(0, 1)
        self.memory = getattr(core, "mem_bank", None)

    def _prefill(self, core: Any, clip: Clip) -> None:
        generator = torch.Generator().manual_seed(0)
        masks = F.pad(clip.masks[:, None], core.pad)
        key, _, features, _, _ = core.encode_key(0)
        value = self.network.encode_value(core.images[:, 0], features, masks)
        for _ in range(self._fill):
            noise = 0.1 * torch.randn(key.shape, generator=generator)
            core.mem_bank.add_memory((key + noise)[:, :, None], value)

    def _mivos(self) -> nn.Module:
        sys.modules.setdefault("cv2", types.ModuleType("cv2"))
        self.core = importlib.import_module("inference_core")
        self.core.torch = _CpuTorch()
        kernel = 5.6 if self.name.endswith("-kernel") else None
        return importlib.import_module("model.eval_network").PropagationNetwork(top_k=50, km=kernel)

    _run_mivos = _run_stcn

    def _stm(self) -> nn.Module:
        return importlib.import_module("model").STM()

    def _run_stm(self, clip: Clip) -> Iterator[Tensor]:
        count = torch.tensor([len(clip.masks)])
        probabilities = torch.zeros(1, 11, *clip.masks.shape[1:])  # background, and room for ten objects
        probabilities[0, 1 : len(clip.masks) + 1] = clip.masks
        probabilities[0, 0] = 1 - clip.masks.sum(0)
        kept: tuple[Tensor, ...] = ()
        for index in range(1, len(clip.frames)):
            # Every fifth frame stays; the previous one is read as well.
            new = self.network(clip.frames[index - 1 : index], probabilities, count)
            read = tuple(torch.cat(pair, 3) for pair in zip(kept, new, strict=True)) if kept else new
            probabilities = self.network(clip.frames[index : index + 1], *read, count).softmax(1)
            if (index - 1) % 5 == 0:
                kept = read
            yield probabilities[0, : len(clip.masks) + 1]


class _Config(dict[str, Any]):
    """A dictionary whose entries are attributes too, as omegaconf's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _CpuTorch:
    """torch for a module that names the device "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *arguments: Any, device: Any = None, **keywords: Any) -> Tensor:
        return torch.zeros(*arguments, **keywords)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    result: dict[str, Any] = yaml.safe_load(path.read_text())
    return result


def _resolved(value: Any, root: dict[str, Any]) -> Any:
    """Nested dictionaries as _Config, with "${a.b}" replaced by what it names."""
    if isinstance(value, dict):
        return _Config({name: _resolved(entry, root) for name, entry in value.items()})
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if reference is None:
        return value
    found: Any = root
    for part in reference[1].split("."):
        found = found[part]
    return _resolved(found, root)


def _stand_in_modules() -> None:
    """Packages that only configure, or draw progress."""
    try:
        importlib.import_module("omegaconf")
    except ImportError:
        omegaconf = types.ModuleType("omegaconf")
        omegaconf.DictConfig = _Config  # type: ignore[attr-defined]
        sys.modules["omegaconf"] = omegaconf


@contextmanager
def _no_downloads() -> Iterator[None]:
    """Networks that ask for pretrained backbones get random ones."""
    import torchvision
    from torch.utils import model_zoo

    before = model_zoo.load_url, torchvision.models.resnet50

    def resnet50(pretrained: bool = False, **options: Any) -> nn.Module:
        return before[1](**options)

    model_zoo.load_url = lambda *_, **__: {}
    torchvision.models.resnet50 = resnet50
    load = nn.Module.load_state_dict
    nn.Module.load_state_dict = lambda self, *_, **__: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        model_zoo.load_url, torchvision.models.resnet50 = before
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


@contextmanager
def on_cpu() -> Iterator[None]:
    """Tensors that are sent to a GPU stay."""
    before = Tensor.cuda
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.cuda = before  # type: ignore[method-assign]


def _normalised(frames: Tensor) -> Tensor:
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (frames - mean) / deviation


def _unpadded(tensor: Tensor, pad: tuple[int, ...]) -> Tensor:
    left, right, top, bottom = pad
    return tensor[..., top : tensor.shape[-2] - bottom, left : tensor.shape[-1] - right]
