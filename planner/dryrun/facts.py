"""Reads a live or meta pipeline into :class:`PipelineFacts`. Looks, never moves, copies or changes anything."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from planner.batching import batch_argument_of
from planner.errors import UnsupportedPipeline
from planner.facts import ComponentFacts, Leaf, PipelineFacts, Role

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DENOISERS = ("unet", "transformer", "prior", "decoder", "unconditional_transformer")
VAES = ("vae", "movq", "vqvae", "audio_vae", "vqgan")
NO_FUSION = {
    # Raise, or run without any effect, when asked to fuse: tried on diffusers' own tiny configurations, 0.42.1.
    "LTX2VideoTransformer3DModel",
    "PRXTransformer2DModel",
}


def read_facts(pipe: Any) -> PipelineFacts:
    """Facts of a pipeline whose weights may be real, on ``meta`` or offloaded.

    Raises:
        UnsupportedPipeline: not a ``diffusers.DiffusionPipeline``.
    """
    modules = pipeline_modules(pipe)
    cls: Any = type(pipe)
    components = tuple(read_component(name, module) for name, module in modules.items())
    source = _pipeline_source(cls)
    scheduler = getattr(pipe, "scheduler", None)
    return PipelineFacts(
        class_name=cls.__name__,
        components=components,
        offload_sequence=tuple((cls.model_cpu_offload_seq or "").split("->")) if cls.model_cpu_offload_seq else (),
        excluded_from_offload=tuple(cls._exclude_from_cpu_offload),
        dtype=_pipeline_dtype(components),
        device=_pipeline_device(modules),
        offload=_offload_in_force(modules),
        guides_in_two_calls='cache_context("uncond")' in source,
        opens_cache_context="cache_context(" in source,
        has_current_timestep=hasattr(cls, "current_timestep"),
        has_fuse_qkv_method=hasattr(cls, "fuse_qkv_projections"),
        batch_argument=batch_argument_of(_call_parameters(cls)),
        vae_shares_dtype="vae.dtype" not in source,
        default_steps=_default_steps(cls),
        scheduler=None if scheduler is None else type(scheduler).__name__,
        inspects_scheduler="prepare_extra_step_kwargs" in source,
        learns_variance="learned" in str(getattr(getattr(scheduler, "config", None), "variance_type", "")),
        scheduler_compatibles=tuple(sorted(getattr(type(scheduler), "_compatibles", ()))),
    )


def pipeline_modules(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's ``nn.Module`` components by name, ``torch.compile`` wrappers removed.

    Raises:
        UnsupportedPipeline: not a ``diffusers.DiffusionPipeline``.
    """
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        kind = f"{type(pipe).__module__}.{type(pipe).__qualname__}"
        raise UnsupportedPipeline(f"{kind} is no diffusers pipeline; pass a loaded DiffusionPipeline.")
    found = {name: vars(pipe).get(name) for name in pipe.config if not name.startswith("_")}
    return {name: unwrap(module) for name, module in found.items() if isinstance(module, nn.Module)}


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor stores; for a quantized tensor those of its inner tensors (``__tensor_flatten__``)."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None or not hasattr(type(tensor), "__tensor_unflatten__"):
        return int(tensor.numel() * tensor.element_size())
    inner = (getattr(tensor, name) for name in flatten()[0])
    return sum(tensor_bytes(part) for part in inner if isinstance(part, torch.Tensor))


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers that this very module owns; what accelerate took to the host is looked up there."""
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is None:
            continue
        if tensor.device.type == "meta" and kept is not None:
            with contextlib.suppress(KeyError):
                tensor = kept[name]
        yield name, tensor


def _storage_key(tensor: torch.Tensor) -> tuple[int, int]:
    """One key for all that is one tensor: tied weights are separate objects once accelerate offloads them."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a wrapper around several tensors
        address = 0
    return (address, tensor.numel()) if address and tensor.numel() else (id(tensor), -1)


def read_component(name: str, module: nn.Module) -> ComponentFacts:
    """Facts of one component."""
    cls = type(module)
    owned = [tensor for part in module.modules() for _, tensor in own_tensors(part)]
    tensors = {_storage_key(tensor): tensor for tensor in owned}
    parameters = {_storage_key(tensor): tensor for tensor in module.parameters()}
    attention = _attention_facts(module)
    return ComponentFacts(
        name=name,
        class_name=cls.__name__,
        library=cls.__module__.partition(".")[0],
        role=_role(name, module),
        dtype=_component_dtype(tensors.values()),
        parameters=sum(tensor.numel() for tensor in parameters.values()),
        weight_bytes=sum(tensor_bytes(tensor) for tensor in tensors.values()),
        leaves=tuple(_leaves(module)),
        tied_weights=len(tensors) < len(owned),
        block_paths=_block_paths(module),
        convolutions_2d=sum(isinstance(part, nn.Conv2d | nn.ConvTranspose2d) for part in module.modules()),
        convolutions_3d=sum(isinstance(part, nn.Conv3d | nn.ConvTranspose3d) for part in module.modules()),
        # torch converts tensors of rank 4 and 5 and raises at the latter for channels_last.
        has_mixed_rank_weights=any(tensor.dim() == 5 for tensor in tensors.values()),
        linear_parameters=sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear)),
        repeated_blocks=tuple(getattr(module, "_repeated_blocks", None) or ()),
        supports_group_offloading=bool(getattr(module, "_supports_group_offloading", True)),
        group_block_modules=tuple(getattr(module, "_group_offload_block_modules", None) or ()),
        keep_in_fp32=tuple(getattr(module, "_keep_in_fp32_modules", None) or ()),
        can_cache=hasattr(module, "enable_cache"),
        can_chunk_forward=hasattr(module, "enable_forward_chunking"),
        can_cast_layerwise=hasattr(module, "enable_layerwise_casting"),
        quantization=_quantization(module, tensors.values()),
        **attention,
        **_vae_facts(module),
    )


def _role(name: str, module: nn.Module) -> Role:
    library = type(module).__module__.partition(".")[0]
    base = name.rstrip("_0123456789")
    if "controlnet" in name or "ControlNet" in type(module).__name__:
        return "controlnet"
    if name in VAES or base in VAES:
        return "vae"
    if "text_encoder" in name:
        return "text_encoder"
    if library == "diffusers" and any(base.endswith(word) for word in DENOISERS):
        return "denoiser"
    return "other"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch.")))


def _component_dtype(tensors: Any) -> str:
    """The floating dtype that most elements have: a few modules are often kept in float32."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return _dtype_name(max(elements, key=lambda dtype: elements[dtype])) if elements else "fp32"


def _pipeline_dtype(components: tuple[ComponentFacts, ...]) -> str:
    """The denoiser's dtype, else that of the largest component."""
    denoisers = [component for component in components if component.role == "denoiser"]
    chosen = max(denoisers or components, key=lambda component: component.parameters, default=None)
    return "fp32" if chosen is None else chosen.dtype


def _pipeline_device(modules: dict[str, nn.Module]) -> str:
    for module in modules.values():
        for parameter in module.parameters():
            return str(parameter.device.type)
    return "cpu"


def _leaves(module: nn.Module) -> Iterator[Leaf]:
    for path, part in module.named_modules():
        owned = [tensor_bytes(tensor) for _, tensor in own_tensors(part)]
        if owned:
            linear = tensor_bytes(dict(own_tensors(part))["weight"]) if isinstance(part, nn.Linear) else 0
            buffers = {name: tensor_bytes(tensor) for name, tensor in own_tensors(part) if name in part._buffers}
            unsaved = sum(size for name, size in buffers.items() if name in part._non_persistent_buffers_set)
            yield Leaf(path=path, class_name=type(part).__name__, bytes=sum(owned), linear_weight_bytes=linear,
                       buffer_bytes=sum(buffers.values()), unsaved_buffer_bytes=unsaved)  # fmt: skip


def _block_paths(module: nn.Module) -> tuple[str, ...]:
    """Groups of diffusers' block-level offload (``_apply_group_offloading_block_level``), as module paths."""
    wanted = set(getattr(module, "_group_offload_block_modules", None) or ())
    return tuple(_blocks_below(module, "", wanted))


def _blocks_below(module: nn.Module, prefix: str, named: set[str]) -> Iterator[str]:
    for name, child in module.named_children():
        if name in named:
            yield from _blocks_below(child, f"{prefix}{name}.", named)
        elif isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (f"{prefix}{name}.{index}" for index in range(len(child)))


def attention_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention modules with a diffusers processor, by path."""
    for path, part in module.named_modules():
        if getattr(part, "processor", None) is not None and hasattr(part, "set_processor"):
            yield path, part


def _attention_facts(module: nn.Module) -> dict[str, Any]:
    found = [part for _, part in attention_modules(module)]
    processors: list[Any] = [part.processor for part in found]
    names = tuple(sorted({type(processor).__name__ for processor in processors}))
    aware = sum(hasattr(processor, "_attention_backend") for processor in processors)
    return {
        "has_attention_slice": hasattr(type(module), "set_attention_slice"),
        "attention_dispatcher": (aware, len(processors)),
        "attention_processors": names,
        "attention_head_dims": tuple(sorted({size for size in map(_head_dim, found) if size})),
        "can_fuse_qkv": _can_fuse(module, found, names),
    }


def _head_dim(part: Any) -> int:
    heads, inner = getattr(part, "heads", None), getattr(part, "inner_dim", None)
    if isinstance(heads, int) and isinstance(inner, int) and heads:
        return inner // heads
    return int(getattr(part, "head_dim", 0) or 0)


def _can_fuse(module: nn.Module, attention: list[Any], processors: tuple[str, ...]) -> bool:
    """Fusing has an effect: some attention has separate projections. Added-KV processors raise (attention.py)."""
    if not hasattr(module, "fuse_qkv_projections") or type(module).__name__ in NO_FUSION:
        return False
    able = (part for part in attention if getattr(part, "_supports_qkv_fusion", True))
    fusible = any(hasattr(part, "fuse_projections") and hasattr(part, "to_q") for part in able)
    return fusible and not any("Added" in name for name in processors)


def _vae_facts(module: nn.Module) -> dict[str, Any]:
    has_tiling = hasattr(module, "use_tiling") and hasattr(module, "enable_tiling")
    has_slicing = hasattr(module, "use_slicing") and hasattr(module, "enable_slicing")
    arguments = tuple(inspect.signature(module.enable_tiling).parameters) if has_tiling else ()
    config = getattr(module, "config", None)
    return {
        "has_tiling": has_tiling,
        "has_slicing": has_slicing,
        "tiling_on": has_tiling and bool(module.use_tiling),
        "slicing_on": has_slicing and bool(module.use_slicing),
        "tile_pixels": _tile_pixels(module) if has_tiling else None,
        "tile_arguments": arguments,
        "force_upcast": bool(getattr(config, "force_upcast", False)),
    }


def _tile_pixels(module: nn.Module) -> int | None:
    sizes = [getattr(module, f"tile_sample_min_{side}", None) for side in ("size", "height", "width")]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known else None


def _quantization(module: Any, tensors: Any) -> str | None:
    config = getattr(getattr(module, "config", None), "quantization_config", None)
    method = getattr(config, "quant_method", None)
    if method is not None:
        return str(getattr(method, "value", method))
    if any(type(tensor).__module__.startswith("torchao") for tensor in tensors):
        return "torchao"
    return "unknown" if getattr(module, "is_quantized", False) else None


def _offload_in_force(modules: dict[str, nn.Module]) -> str:
    """Under block-level group offload some components go by leaves."""
    found = [each for module in modules.values() for part in module.modules() if (each := _hook_offload(part))]
    return "group_block" if "group_block" in found else next(iter(found), "none")


def _hook_offload(part: nn.Module) -> str | None:
    hook = getattr(part, "_hf_hook", None)
    for single in getattr(hook, "hooks", (hook,)):
        if type(single).__name__ in ("CpuOffload", "UserCpuOffloadHook"):
            return "model"
        if getattr(single, "offload", False):
            return "sequential"
    registry = getattr(part, "_diffusers_hook", None)
    grouped = None if registry is None else registry.get_hook("group_offloading")
    if grouped is not None:
        return "group_leaf" if "leaf" in str(grouped.config.offload_type).lower() else "group_block"
    return None


@lru_cache(maxsize=256)
def _pipeline_source(cls: Any) -> str:
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (OSError, KeyError):
        return ""


def _call_parameters(cls: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls.__call__).parameters)


def _default_steps(cls: Any) -> int | None:
    steps = _call_parameters(cls).get("num_inference_steps")
    return steps.default if steps is not None and isinstance(steps.default, int) else None
