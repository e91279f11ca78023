"""A pipeline that is already in memory: recognised by its class's ancestry, digested without being touched."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

from planner.errors import UnsupportedPipeline
from planner.models.layout import digest_of

_SWITCHES: tuple[str, ...] = ("use_slicing", "use_tiling", "use_framewise_decoding", "tile_sample_min_size", "tile_latent_min_size")
_SWITCHES += ("tile_sample_min_height", "tile_sample_min_width", "gradient_checkpointing", "training")


def check_live(model: object) -> None:
    """Refuse what is no :class:`diffusers.DiffusionPipeline`; diffusers is not imported for the question.

    Raises:
        UnsupportedPipeline: naming what the object is and what to pass instead.
    """
    names = _ancestry(model)
    if "diffusers.DiffusionPipeline" in names:
        return
    what = f"{type(model).__module__}.{type(model).__qualname__}"
    if "diffusers.ModularPipeline" in names:
        raise UnsupportedPipeline(
            f"{what} is a modular pipeline, whose blocks can change from call to call; only DiffusionPipeline can be "
            "planned. Load the same model with DiffusionPipeline.from_pretrained."
        )
    if isinstance(model, type):
        raise UnsupportedPipeline(f"{model.__qualname__} is a class; pass a pipeline object, a folder or a name.")
    if "torch.Module" in names:
        raise UnsupportedPipeline(f"{what} is a single component; pass the whole pipeline that uses it.")
    raise UnsupportedPipeline(
        f"{what} is no diffusers pipeline; pass a DiffusionPipeline, a folder in diffusers layout, a hub id or a bundled profile's name."
    )


def _ancestry(model: object) -> set[str]:
    """``package.Class`` of all ancestors."""
    mro = type(model).__mro__ if not isinstance(model, type) else ()
    return {f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in mro}


def live_digest(pipeline: Any) -> str:
    """sha256 over what decides the trace: classes, configs, module structure, shapes, dtypes, attention processors."""
    content = {
        "class": _class(pipeline),
        "source": _foreign_source(type(pipeline)),
        "config": dict(getattr(pipeline, "config", {}) or {}),
        "components": {name: _component(value) for name, value in sorted(pipeline.components.items())},
    }
    return digest_of(content)


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _foreign_source(cls: type) -> str | None:
    """Hash of a class's source when it is not the library's: the user may edit it between two runs."""
    if cls.__module__.split(".")[0] in ("diffusers", "transformers"):
        return None
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def _component(value: Any) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_component(item) for item in value]
    if not hasattr(value, "named_modules"):
        return [_class(value), _config(value), getattr(value, "model_max_length", None)]
    structure = hashlib.sha256("\n".join(_structure(value)).encode()).hexdigest()
    return [_class(value), _config(value), _foreign_source(type(value)), structure]


def _config(value: Any) -> object:
    config: Any = getattr(value, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    try:
        return dict(config) if config is not None else None
    except (TypeError, ValueError):
        return None


def _structure(module: Any) -> Iterator[str]:
    """One line per submodule and tensor: LoRA, quantized storage, tiling and processors all show."""
    for name, child in module.named_modules():
        line = [name, _class(child)]
        line += [f"{key}={child.__dict__[key]}" for key in _SWITCHES if key in child.__dict__]
        processor = child.__dict__.get("processor")
        if processor is not None:
            line.append(f"{_class(processor)} {getattr(processor, '_attention_backend', None)}")
        for kind in (child._parameters, child._buffers):
            line += [f"{key}:{tuple(t.shape)}:{t.dtype}:{type(t).__name__}" for key, t in kind.items() if t is not None]
        yield " ".join(line)
