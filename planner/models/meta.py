"""Layout to pipeline: diffusers' own classes, real schedulers, stand-in tokenizers, every weight on ``meta``.

The only module here that imports torch, diffusers and transformers, and only inside functions.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from planner.errors import PlannerError, ProfileError, UnsupportedPipeline
from planner.models.factories import hybrid_factories
from planner.models.headers import Stored
from planner.models.layout import Component, Layout, pipeline_modules
from planner.models.standins import make_standin
from planner.types import DTYPES

MAX_REPEATS = 2048
"""Deepest published model has some 100 layers; configs beyond this would hang the build."""
MAX_PARAMETERS = 10**12
MAX_SIZE = 2**40
_REPEATS = re.compile(r"(layers|depth|depths|blocks|repeats?|experts|stacks)$|(layers|blocks)_per_\w+$|^num_\w*(layers|blocks)")
_DROPPED_KEYS = ("quantization_config", "attn_implementation", "_attn_implementation", "auto_map", "dtype", "torch_dtype")


def build_pipeline(layout: Layout, dtype: str, stored: dict[str, Stored]) -> Any:
    """The pipeline of ``layout`` with weights on ``meta`` in ``dtype``, as ``from_pretrained(dtype=…)`` would type them.

    Raises:
        UnsupportedPipeline: a class that is not diffusers' or transformers' own.
        ProfileError: a config that does not build, a component missing, or stored weights that do not fit it.
    """
    if dtype not in DTYPES:
        raise ProfileError(f"dtype {dtype!r}: one of {', '.join(DTYPES)} is wanted.")
    cls = _pipeline_class(layout)
    accepted = set(inspect.signature(cls).parameters)
    parts: dict[str, Any] = {name: None for name in layout.absent if name in accepted}
    for component in layout.components:
        if component.name in accepted:
            parts[component.name] = build_component(component, dtype, layout.where)
            if component.name in stored and hasattr(parts[component.name], "state_dict"):
                check_stored(component, parts[component.name], stored[component.name], layout.where)
    arguments = {key: copy.deepcopy(value) for key, value in layout.arguments.items() if key in accepted}
    return _assemble(cls, parts, arguments, layout)


def _assemble(cls: Any, parts: dict[str, Any], arguments: dict[str, Any], layout: Layout) -> Any:
    """Call the pipeline's constructor; some build further modules there (AnimateDiff), which go to ``meta`` as well."""
    try:
        with hybrid_factories(MAX_PARAMETERS):
            pipeline = cls(**parts, **arguments)
    except PlannerError:
        raise
    except Exception as error:
        raise ProfileError(f"{layout.where}: {layout.class_name} cannot be put together from its model_index.json ({error}).") from error
    for part in pipeline.components.values():
        if hasattr(part, "named_parameters"):
            to_meta(part)
    return pipeline


def _pipeline_class(layout: Layout) -> type:
    import diffusers

    cls = getattr(diffusers, layout.class_name, None)
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.DiffusionPipeline):
        raise UnsupportedPipeline(f"{layout.where}: {layout.class_name} is no DiffusionPipeline of diffusers.")
    return cls


def build_component(component: Component, dtype: str, where: str) -> Any:
    """One component: a model on ``meta``, a real scheduler, or a stand-in for what turns text and images to tensors."""
    at = f"{where}: {component.name}"
    standin = make_standin(component)
    if standin is not None:
        return standin
    cls = _component_class(component, at)
    import torch

    config = component.first("config.json", "scheduler_config.json")
    if not issubclass(cls, torch.nn.Module):
        if not hasattr(cls, "from_config"):
            raise UnsupportedPipeline(f"{at}: {component.class_name} is neither model, scheduler, tokenizer nor processor.")
        return _guarded(at, component, lambda: cls.from_config(_cleaned(config or {})))
    if config is None:
        raise ProfileError(f"{at}/config.json is missing; {component.class_name} cannot be built without it.")
    check_bounds(config, at)
    return _guarded(at, component, lambda: _build_module(cls, config, dtype))


def _component_class(component: Component, at: str) -> Any:
    library, name = component.library, component.class_name
    place = pipeline_modules().get(library, library)
    try:
        cls = getattr(importlib.import_module(place), name, None)
    except Exception as error:
        raise UnsupportedPipeline(f"{at}: {place}.{name} cannot be imported here ({error}).") from error
    if not inspect.isclass(cls) or cls.__module__.split(".")[0] not in ("diffusers", "transformers"):
        raise UnsupportedPipeline(f"{at}: the installed {place} has no class {name}; upgrade it, or pick another model.")
    return cls


def _guarded(at: str, component: Component, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except PlannerError as error:
        raise type(error)(f"{at}: {component.class_name}: {error}") from error
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ProfileError(f"{at}: {component.class_name} cannot be built from its config ({type(error).__name__}: {text}).") from error


def check_bounds(config: object, at: str, key: str = "") -> None:
    """Refuse configs that would build forever. Raises ProfileError naming the key."""
    if isinstance(config, dict):
        for name, value in config.items():
            check_bounds(value, at, str(name))
    elif isinstance(config, list):
        for value in config:
            check_bounds(value, at, key)
        total = sum(v for v in config if isinstance(v, int))
        if _REPEATS.search(key) and total > MAX_REPEATS and "channels" not in key:
            raise ProfileError(f"{at}/config.json: {key} sums to {total}; more than {MAX_REPEATS} is refused.")
    elif isinstance(config, int) and not isinstance(config, bool):
        repeats = config > MAX_REPEATS and _REPEATS.search(key) is not None and "channels" not in key
        if repeats or abs(config) > MAX_SIZE:
            raise ProfileError(f"{at}/config.json: {key} = {config} is refused as too large.")


def _cleaned(config: dict[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in config.items() if key not in _DROPPED_KEYS}


def _build_module(cls: Any, config: dict[str, Any], dtype: str) -> Any:
    """Parameters on ``meta``; small buffers real where the code allows it, so that masks and tables keep values."""
    make = _maker(cls, config, dtype)
    import torch

    with _default_dtype(dtype), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            with hybrid_factories(MAX_PARAMETERS):
                model = make()
        except ProfileError:
            raise
        except Exception:
            with torch.device("meta"):
                model = make()
    to_meta(model)
    apply_dtype(model, dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        raise ProfileError(f"{cls.__name__}: {count} parameters; more than {MAX_PARAMETERS} is refused.")
    return model.eval()


def _maker(cls: Any, config: dict[str, Any], dtype: str) -> Callable[[], Any]:
    if not hasattr(cls, "_from_config"):
        return lambda: cls.from_config(_cleaned(config))
    config_class = cls.config_class
    key = getattr(config_class, "base_config_key", "")
    if key and isinstance(config.get(key), dict) and config.get("model_type") != config_class.model_type:
        config = config[key]
    return lambda: cls._from_config(config_class.from_dict(_cleaned(config)), dtype=torch_dtype(dtype))


@contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    """diffusers and transformers construct under the asked dtype, so that fresh buffers have it."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_dtype(dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def torch_dtype(dtype: str) -> Any:
    """``fp16`` to ``torch.float16`` and so on."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]


def to_meta(model: Any) -> None:
    """Put every parameter on ``meta``, tied ones tied as before."""
    import torch

    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.device.type != "meta":
                if id(value) not in moved:
                    moved[id(value)] = torch.nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
                module._parameters[name] = moved[id(value)]


def apply_dtype(model: Any, dtype: str) -> None:
    """Type parameters and persistent buffers as loading would: floats in ``dtype`` but the kept ones in fp32.

    Kept: ``_keep_in_fp32_modules`` by name segment, in any dtype in diffusers (``load_model_dict_into_meta``), for
    fp16 only in transformers (``_get_dtype_plan``), where ``_keep_in_fp32_modules_strict`` covers bf16 too.
    """
    import torch

    wanted, kept = torch_dtype(dtype), kept_in_fp32(model, dtype)
    done: dict[int, Any] = {}
    for path, module in model.named_modules():
        for tensors, skip in ((module._parameters, ()), (module._buffers, module._non_persistent_buffers_set)):
            for name, value in tensors.items():
                if value is None or name in skip or not value.is_floating_point():
                    continue
                keep = not kept.isdisjoint((*path.split("."), name))
                target = torch.float32 if keep else wanted
                if value.dtype != target:
                    done.setdefault(id(value), (value, _cast(value, target)))
                    tensors[name] = done[id(value)][1]


def kept_in_fp32(model: Any, dtype: str) -> frozenset[str]:
    """Name segments whose tensors loading keeps in fp32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept, strict = ({kept} if isinstance(kept, str) else set(kept)), set(strict)
    if hasattr(model, "_from_config"):
        return frozenset((kept if dtype == "fp16" else set()) | (strict if dtype != "fp32" else set()))
    return frozenset(kept)


def _cast(value: Any, dtype: Any) -> Any:
    import torch

    cast = value.detach().to(dtype)
    return torch.nn.Parameter(cast, value.requires_grad) if isinstance(value, torch.nn.Parameter) else cast


def check_stored(component: Component, model: Any, stored: Stored, where: str) -> None:
    """Hold a built component against its files' headers.

    More tensors in the file than in the model are normal (from_pretrained leaves them unused); the reverse, or one
    name with two shapes, means that config and weights are of different models. Packed quantized files are not compared.

    Raises:
        ProfileError: naming the first tensor or both sizes.
    """
    if stored.dtype is None or "quantization_config" in (component.files.get("config.json") or {}):
        return
    built = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in built.items():
        if name in stored.tensors and stored.tensors[name][1] != shape and prod(shape) != prod(stored.tensors[name][1]):
            raise ProfileError(
                f"{where}: {component.name}: {name} is {list(stored.tensors[name][1])} in the safetensors header but "
                f"{list(shape)} by its config.json; config and weights are of different models."
            )
    elements = sum(parameter.numel() for parameter in model.parameters())
    if elements > stored.elements * 1.01:
        raise ProfileError(
            f"{where}: {component.name}: its config.json builds {elements} parameters, its safetensors files hold "
            f"{stored.elements}; weights are missing or belong to another model."
        )
