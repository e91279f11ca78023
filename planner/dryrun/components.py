"""The modules of a pipeline and the methods through which a pipeline makes them compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

ALWAYS_ENTRY = frozenset({"generate"})
_BASES_WITHOUT_ENTRY_POINTS = frozenset({
    "Module", "ModelMixin", "ConfigMixin", "PushToHubMixin", "PeftAdapterMixin", "PreTrainedModel", "GenerationMixin", "AttentionMixin",
    "FromOriginalModelMixin", "CacheMixin", "UNet2DConditionLoadersMixin", "object", "EmbeddingAccessMixin", "AutoencoderMixin",
    "ModuleUtilsMixin", "ABC", "Generic", "Protocol", "FluxTransformer2DLoadersMixin", "SD3Transformer2DLoadersMixin"})  # fmt: skip
_NO_ENTRY = frozenset({"forward", "to", "half", "float", "train", "eval", "post_init", "init_weights", "load_state_dict", "clear_cache"})
_SWITCHES = ("enable_", "disable_", "set_", "get_input_embeddings", "get_output_embeddings")


def components(pipe: Any) -> dict[str, nn.Module]:
    """Modules by the name under which the pipeline holds them, through lists, dictionaries and nested pipelines."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for depth in (0, 1):  # a combined pipeline's own names for its parts' components win
        for name, module in _walk(vars(pipe).items(), "", depth, {id(pipe)}):
            if id(module) not in seen:
                seen.add(id(module))
                found[name] = module
    return found


def _walk(items: Any, prefix: str, depth: int, above: set[int]) -> Iterator[tuple[str, nn.Module]]:
    from diffusers import DiffusionPipeline

    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, nn.Module):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from _walk(((f"{key}.{index}", item) for index, item in enumerate(value)), prefix, depth, above)
        elif isinstance(value, dict) and not str(key).startswith("_"):
            yield from _walk(((f"{key}.{inner}", item) for inner, item in value.items()), prefix, depth, above)
        elif depth and isinstance(value, DiffusionPipeline) and id(value) not in above:
            yield from _walk(vars(value).items(), f"{name}.", depth, above | {id(value)})


def entry_points(cls: type) -> list[str]:
    """Public methods, other than ``forward``, that a pipeline may call on a component to make it compute."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__name__ in _BASES_WITHOUT_ENTRY_POINTS or base.__module__.startswith(("torch.", "builtins", "typing", "abc")):
            names |= ALWAYS_ENTRY & set(vars(base))
        else:
            names |= {name for name, value in vars(base).items() if _is_entry(name, value)}
    return sorted(names - _NO_ENTRY)


def _is_entry(name: str, value: Any) -> bool:
    method = callable(value) and not isinstance(value, type | staticmethod | classmethod)
    return method and not name.startswith("_") and not name.startswith(_SWITCHES)
