# SPDX-License-Identifier: Apache-2.0
"""The published AOT and DeAOT engines on a clip, before and inside `vosops.compat.aot.enable()`.

    python -m benchmarks.dropin_aot PEERS MODEL OUT.npz [--size 481x849] [--frames 12] [--without-sampler]

PEERS holds a checkout `aot-benchmark` of github.com/yoxu515/aot-benchmark; MODEL is one of its configurations
(aotl, r50_aotl, deaotl, ...). Its modules have names like `utils`, so it wants a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vosops.compat import Report, aot, correlation

from . import measure
from .peers.checkouts import moving_clip

FOLDER = "aot-benchmark"
MODELS = ("aotl", "deaotl")
_NEVER = 1 << 30


@dataclass
class AOTCase:
    """One published model with random weights and its inference engine.

    name: "AOTL"; enable: lets it call vosops; engine: their AOTInferEngine or DeAOTInferEngine; size: of the
    frames that it is given, the next that its grid allows.
    """

    name: str
    enable: Callable[[], Report]
    engine: Any
    size: tuple[int, int]

    def clip(
        self, frames: int, objects: int = 3, *, gap: int = 2, fill: int = 1
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Their own loop over a clip: reference frame, then encoder to memory for every other frame.

        Args:
            frames, objects: of the clip.
            gap: frames from one long-term memory to the next.
            fill: frames in the long-term memory before the second one, copies of the reference frame.

        Returns:
            probabilities (T - 1, 11, H, W), labels (T - 1, H, W), seconds of every frame but the first.
        """
        clip = moving_clip(frames, self.size, objects)
        numbers = torch.arange(1, objects + 1.0)[:, None, None]
        images = (clip.frames - 0.45) / 0.225
        with torch.no_grad():
            self.engine.restart_engine()
            self.engine.add_reference_frame(
                images[:1], (clip.masks * numbers).sum(0)[None, None], obj_nums=objects, frame_step=0
            )
            for engine in self.engine.aot_engines:
                engine.long_term_mem_gap = gap
                for _ in range(fill - 1):
                    engine.update_long_term_memory(engine.curr_lstt_output[2])
            results = [self._frame(image[None]) for image in images[1:]]
        probabilities, labels, seconds = zip(*results, strict=True)
        return torch.cat(probabilities), torch.cat(labels), list(seconds)

    def _frame(self, image: Tensor) -> tuple[Tensor, Tensor, float]:
        start = time.perf_counter()
        self.engine.match_propogate_one_frame(image)
        probabilities = self.engine.decode_current_logits(self.size).softmax(1)
        labels = probabilities.argmax(1, keepdim=True).float()
        self.engine.update_memory(labels)
        return probabilities, labels[:, 0], time.perf_counter() - start


def aot_case(
    peers: Path, model: str = "aotl", size: tuple[int, int] = (481, 849), *, sampler: bool = True
) -> AOTCase:
    """A published model and its engine, from the checkout in `peers`.

    Args:
        peers: folder with the checkout `aot-benchmark`.
        model: name of a file in its configs/models.
        size: of the frames, (H, W), any; the published rounding follows (16 n + 1, Swin 16 n).
        sampler: install `vosops.compat.correlation`, without which AOT (not DeAOT) raises before enable().

    Raises:
        FileNotFoundError: there is no such checkout.
    """
    checkout = Path(peers) / FOLDER
    if not (checkout / "networks").is_dir():
        raise FileNotFoundError(f"peers must hold a checkout {FOLDER}, got {peers}")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    if sampler and importlib.util.find_spec(correlation.PACKAGE) is None:
        correlation.install()
    config = importlib.import_module("configs.default").DefaultEngineConfig("bench", model)
    build_model = importlib.import_module("networks.models").build_vos_model
    build_engine = importlib.import_module("networks.engines").build_engine
    torch.manual_seed(0)
    network = build_model(config.MODEL_VOS, config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("relative_emb_v"):
                parameter.normal_(std=0.3)  # zero as initialised
            if "patch_wise_id_bank" in name:
                parameter.mul_(20)  # random networks hardly listen to their mask
    engine = build_engine(config.MODEL_ENGINE, phase="eval", aot_model=network, gpu_id=0).eval()
    extra = int(config.MODEL_ALIGN_CORNERS)
    height, width = (round((side - extra) / 16) * 16 + extra for side in size)
    return AOTCase(config.MODEL_NAME, aot.enable, engine, (height, width))


def measure_aot(
    name: str, root: Path, *, frames: int, size: tuple[int, int], objects: int, fill: int = 0
) -> dict[str, Any]:
    """A row of `benchmarks.dropin` for one published model, in this process.

    Args:
        name: of a configuration, see MODELS.
        root: the folder of the checkouts.
        frames, size, objects: of the clip.
        fill: frames in the long-term memory throughout; 0 for the growing memory of the published loop
            with a gap of 5.
    """
    case = aot_case(root, name, size)
    case.clip(2, objects)  # the first call of a convolution is slower

    def run() -> dict[str, Any]:
        result: dict[str, Any] = {}

        def loop() -> None:
            result["clip"] = case.clip(frames, objects, gap=_NEVER if fill else 5, fill=max(fill, 1))

        result["peak"] = measure.peak_extra_bytes(loop, torch.device("cpu"))
        return result

    before = run()
    with case.enable() as report:
        after = run()
    (probabilities, labels, seconds), (ours, our_labels, our_seconds) = before["clip"], after["clip"]
    published, vosops = (statistics.median(times) for times in (seconds, our_seconds))
    agreement = (labels == our_labels).double().mean().item()
    difference = (probabilities - ours).abs().max().item()
    return {
        "model": name,
        "size": list(case.size),
        "objects": objects,
        "frames": frames,
        "filled_frames": fill,
        "replaced": sorted(report.replaced),
        "published_s_per_frame": published,
        "vosops_s_per_frame": vosops,
        "speedup": published / vosops,
        "published_peak_bytes": before["peak"],
        "vosops_peak_bytes": after["peak"],
        "mask_agreement": agreement,
        "largest_difference": difference,
        "own_largest_difference": None,
        "memory_positions": case.engine.aot_engines[0].long_term_memories[0][0].shape[0],
        "equal": agreement >= 0.9999 and difference <= 1e-4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Published AOT before, inside and after enable().")
    parser.add_argument("peers", type=Path)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", default="481x849")
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--without-sampler", action="store_true")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    case = aot_case(options.peers, options.model, (height, width), sampler=not options.without_sampler)
    results: dict[str, Any] = {}

    def run(when: str) -> None:
        try:
            probabilities, labels, seconds = case.clip(options.frames)
        except RuntimeError as error:
            if not options.without_sampler:
                raise
            results[f"error_{when}"] = str(error)
            return
        results[f"probabilities_{when}"], results[f"labels_{when}"] = probabilities.numpy(), labels.numpy()
        results[f"seconds_{when}"] = np.array(seconds)
        results[f"memory_{when}"] = case.engine.aot_engines[0].long_term_memories[-1][1].numpy()

    run("before")
    with case.enable() as report:
        print(report)
        run("enabled")
    run("after")
    np.savez(options.out, **results)


if __name__ == "__main__":
    main()
