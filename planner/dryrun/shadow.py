"""A stand-in pipeline: a subclass that calls itself the same, with meta twins for modules and copied schedulers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from planner.dryrun.twin import meta_twin

_COPIED = ("scheduler", "scheduling", "guiders", "tokenization")
_PROCESSORS = ("image_processor", "video_processor")


def shadow(pipe: Any, twins: dict[int, Any] | None = None) -> Any:
    """A stand-in for ``pipe``. ``twins`` (by the original's id) lets nested pipelines share components."""
    cls = type(pipe)
    made = type(cls.__name__, (_ShadowMixin, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    stand_in: Any = object.__new__(made)
    twins = {} if twins is None else twins
    twins[id(pipe)] = stand_in
    for name, value in vars(pipe).items():
        object.__setattr__(stand_in, name, _stand_in_for(value, twins))
    object.__setattr__(stand_in, "_dry_run_loops", twins.setdefault(0, []))
    return stand_in


def steps_of(stand_in: Any) -> int | None:
    """Denoising iterations that the pipeline's progress bars counted in their longest loop; None without a bar."""
    return max(stand_in.__dict__["_dry_run_loops"], default=None)


def _stand_in_for(value: Any, twins: dict[int, Any]) -> Any:
    from diffusers import DiffusionPipeline

    if id(value) in twins:
        return twins[id(value)]
    module_name = type(value).__module__
    if isinstance(value, nn.Module):
        made: Any = meta_twin(value)
    elif isinstance(value, DiffusionPipeline):
        return shadow(value, twins)
    elif any(word in module_name for word in _PROCESSORS):
        made = _light_processor(value)
    elif any(word in module_name for word in _COPIED):
        made = _copied(value)
    elif type(value) in (list, tuple):
        made = type(value)(_stand_in_for(item, twins) for item in value)
    elif type(value) is dict:
        made = {key: _stand_in_for(item, twins) for key, item in value.items()}
    else:
        made = value
    twins[id(value)] = made
    return made


def _copied(value: Any) -> Any:
    """Schedulers and guiders are changed by a run, tokenizers by some: a copy, deep where their state is."""
    if "tokenization" in type(value).__module__:
        return copy.copy(value)
    return copy.deepcopy(value)


def _light_processor(processor: Any) -> Any:
    """An image processor that does not build real pictures from zeros: only their number matters."""
    light = copy.copy(processor)
    if hasattr(light, "numpy_to_pil"):
        light.numpy_to_pil = _few_pixels
    if hasattr(light, "postprocess_video"):
        light.postprocess_video = _light_video(light.postprocess_video)
    return light


def _light_video(original: Callable[..., Any]) -> Callable[..., Any]:
    """Frames as one array, without filling hundreds of megabytes of host memory with zeros."""

    def postprocess_video(video: torch.Tensor, output_type: str = "np", **options: Any) -> Any:
        if output_type != "np":
            return original(video, output_type=output_type, **options)
        frames = original(video, output_type="pt", **options).cpu()
        shape = [*frames.shape[:-3], *frames.shape[-2:], frames.shape[-3]]
        return np.broadcast_to(np.float32(0), shape)

    return postprocess_video


def _few_pixels(images: Any) -> list[Any]:
    from PIL import Image

    count = images.shape[0] if getattr(images, "ndim", 0) == 4 else 1
    return [Image.new("RGB", (8, 8))] * count


class _ShadowMixin:
    """What a stand-in answers instead of asking modules that are on ``meta``."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def _execution_device(self) -> torch.device:
        return torch.device("cpu")

    def progress_bar(self, iterable: Any = None, total: int | None = None, **options: Any) -> Any:
        return _StepCounter(self.__dict__["_dry_run_loops"], iterable, total)

    def to(self, *args: Any, **kwargs: Any) -> _ShadowMixin:
        return self

    def maybe_free_model_hooks(self) -> None:
        return None

    def remove_all_hooks(self) -> None:
        return None

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        return None

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Any]:
        return _few_pixels(images)


class _StepCounter:
    """A silent progress bar that counts the iterations of its loop."""

    def __init__(self, loops: list[int], iterable: Any, total: int | None) -> None:
        self.loops, self.iterable, self.n = loops, iterable, 0
        self.total = total if total is not None else (len(iterable) if hasattr(iterable, "__len__") else None)

    def _done(self) -> None:
        self.loops[:] = [max([self.n, *self.loops])]

    def __iter__(self) -> Any:
        for item in self.iterable:
            yield item
            self.update()

    def update(self, amount: int = 1) -> None:
        self.n += amount
        self._done()

    def __len__(self) -> int:
        return self.total or 0

    def __enter__(self) -> _StepCounter:
        return self

    def __exit__(self, *args: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None
