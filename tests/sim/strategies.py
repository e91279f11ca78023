"""Offload strategies by diffusers' own calls, and the zoo families for which diffusers or accelerate cannot run them.

The refusals are theirs, not the simulator's: the same code fails on CUDA. A test asserts each one, so that an upgrade
that lifts one is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def _group(**options: Any) -> Callable[[Any], Any]:
    def apply(pipe: Any) -> Any:
        pipe.enable_group_offload(onload_device=torch.device("sim", 0), offload_device=torch.device("cpu"), **options)

    return apply


BLOCK = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAF = {"offload_type": "leaf_level"}

STRATEGIES: dict[str, Callable[[Any], Any]] = {
    "none": lambda pipe: pipe.to("sim"),
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="sim"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="sim"),
    "group_leaf": _group(**LEAF),
    "group_block": _group(**BLOCK),
    "group_leaf_stream": _group(**LEAF, use_stream=True),
    "group_block_stream": _group(**BLOCK, use_stream=True),
}
"""By the planner's word for the `offload` knob, with `_stream` for `offload_stream`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a family raises under a strategy, and why."""

    error: type[BaseException]
    message: str
    reason: str


UNSUPPORTED = Refusal(ValueError, "does not support group offloading",
                      "a component's class sets _supports_group_offloading = False")  # fmt: skip
DECODE = Refusal(RuntimeError, "Expected all tensors to be on the same device",
                 "parts outside the blocks are brought in by the component's forward(), which encode(), decode() or "
                 "generate() go around, or which a block calls by attribute")  # fmt: skip
NO_HOOK = Refusal(RuntimeError, "Expected all tensors to be on the same device",
                  "the text decoder's encode() and generate_captions() are not wrapped by accelerate's hook around forward()")  # fmt: skip
EMPTY_BLOCK = Refusal(AttributeError, "'NoneType' object has no attribute", "a block list of this model holds None")
OUTSIDE_FORWARD = Refusal(RuntimeError, "at least two devices, sim:0 and meta",
                          "a weight is read before or without the forward() of the module that owns it")  # fmt: skip
OLD_SIGNATURE = Refusal(TypeError, "unexpected keyword argument 'device'",
                        "this deprecated pipeline's enable_model_cpu_offload takes a gpu_id only")  # fmt: skip

NO_SEQUENCE = Refusal(ValueError, "no `model_cpu_offload_seq` class attribute is set",
                      "the pipeline's class names no order of its components")  # fmt: skip
OWN_DEVICE = Refusal(NotImplementedError, "Cannot copy out of meta tensor",
                     "this pipeline moves its input to self.device, which is meta then, instead of _execution_device")  # fmt: skip

WITHOUT_GROUPS = ("dit", "hunyuan_dit", "kandinsky22", "kandinsky22_combined", "kandinsky3", "ldm_superres", "stable_audio")
DECODES_AROUND_BLOCKS = (
    "allegro", "audioldm2", "cascade_combined", "cascade_decoder", "cascade_prior", "cogvideox", "flux2",
    "flux2_klein", "hunyuan_video", "kandinsky5", "ltx_video", "mochi", "qwen_image", "sana", "svd", "unidiffuser",
)  # fmt: skip
GROUPS = ("group_leaf", "group_block", "group_leaf_stream", "group_block_stream")
BLOCKS = ("group_block", "group_block_stream")

REFUSED: dict[tuple[str, str], Refusal] = {
    **{(family, strategy): UNSUPPORTED for family in WITHOUT_GROUPS for strategy in GROUPS},
    **{(family, strategy): DECODE for family in DECODES_AROUND_BLOCKS for strategy in BLOCKS},
    **{("wuerstchen_decoder", strategy): EMPTY_BLOCK for strategy in BLOCKS},
    ("stable_audio", "sequential"): OUTSIDE_FORWARD,
    ("hunyuan_dit", "sequential"): OUTSIDE_FORWARD,
    ("musicldm", "model"): OLD_SIGNATURE,
    ("unidiffuser", "model"): NO_HOOK,
    ("ldm_superres", "model"): NO_SEQUENCE,
    ("diffusion_gemma", "model"): NO_SEQUENCE,
    ("diffusion_gemma", "sequential"): OUTSIDE_FORWARD,
    **{("diffusion_gemma", strategy): DECODE for strategy in GROUPS},
    ("ldm_superres", "sequential"): OWN_DEVICE,
}
