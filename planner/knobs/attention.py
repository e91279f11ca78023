"""``attention``: which kernel computes it. Values are diffusers' backend names plus the processor classes' words."""

from __future__ import annotations

from dataclasses import dataclass

from planner.dtypes import parse_dtypes
from planner.facts import ComponentFacts
from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.words import as_word
from planner.recipe import Attention as Kernel
from planner.recipe import Recipe
from planner.types import KnobValue, Quality, Settings

VANILLA = {"AttnProcessor2_0": "AttnProcessor", "AttnAddedKVProcessor2_0": "AttnAddedKVProcessor"}
"""SDPA processor class to the one that writes out the scores (diffusers attention_processor.py)."""
MASKED = {
    # Always pass a mask to the dispatcher: recorded on diffusers' own tiny configurations, 0.42.1.
    "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "ErnieImageTransformer2DModel",
    "Ideogram4Transformer2DModel",
    "NucleusMoEImageTransformer2DModel",
    "LongCatAudioDiTTransformer",
    # In some layers:
    "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "Krea2Transformer2DModel",
    "AceStepTransformer1DModel",
    # When the prompts of a batch differ in length (pipeline_qwenimage.py:265), or in newer versions always:
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
}
DISPATCH = "diffusers 0.42.1 models/attention_dispatch.py"


@dataclass(frozen=True, slots=True)
class Backend:
    """One dispatcher backend: its physical kernel, its limits, and the package it needs (a key of ``usable``)."""

    kernel: Kernel
    package: str | None = None
    half_only: bool = False
    takes_mask: bool = True
    capability: tuple[int, int] | None = None
    largest_head: int | None = None
    lossy: bool = False
    cuda_only: bool = True


BACKENDS: dict[str, Backend] = {
    "_native_math": Backend("math", cuda_only=False),
    "_native_efficient": Backend("efficient"),
    "_native_flash": Backend("flash", half_only=True, takes_mask=False, capability=(8, 0), largest_head=256),
    "_native_cudnn": Backend("cudnn", half_only=True, capability=(8, 0), largest_head=256),
    "xformers": Backend("efficient", package="xformers"),
    "flash": Backend("flash", "flash", half_only=True, takes_mask=False, capability=(8, 0), largest_head=256),
    "flash_hub": Backend("flash", "flash_hub", half_only=True, takes_mask=False, capability=(8, 0), largest_head=256),
    "_flash_3": Backend("flash", "_flash_3", half_only=True, takes_mask=False, capability=(9, 0), largest_head=256),
    "_flash_3_hub": Backend("flash", "_flash_3_hub", half_only=True, takes_mask=False, capability=(8, 0)),
    "flash_4_hub": Backend("flash", "flash_4_hub", half_only=True, takes_mask=False, capability=(9, 0)),
    "flash_varlen": Backend("flash", "flash_varlen", half_only=True, capability=(8, 0), largest_head=256),
    "sage": Backend("flash", "sage", half_only=True, takes_mask=False, capability=(8, 0), lossy=True),
    "sage_hub": Backend("flash", "sage_hub", half_only=True, takes_mask=False, capability=(8, 0), lossy=True),
}
ALIASES = {"cudnn": "_native_cudnn", "native": "sdpa", "math": "_native_math", "efficient": "_native_efficient"}
HALF_ONLY = frozenset(name for name, backend in BACKENDS.items() if backend.half_only)


class Attention(Knob):
    """``sdpa`` leaves the processors as they are. Denoisers and ControlNets only: a VAE's one attention stays SDPA."""

    name = "attention"
    stage = 60
    conflicts = (
        Conflict(
            values=HALF_ONLY,
            other="dtype",
            other_values=frozenset({"fp32"}),
            verdict="fails",
            reason="the kernel takes float16 and bfloat16 only",
            source=f"{DISPATCH} _check_qkv_dtype_bf16_or_fp16; torch SDPA flash and cuDNN kernels",
        ),
        Conflict(
            values=frozenset({"sliced", "vanilla"}),
            other="fuse_qkv",
            other_values=frozenset({True}),
            verdict="pointless",
            reason="setting another processor takes the fused one away",
            source="diffusers 0.42.1 models/attention_processor.py FusedAttnProcessor2_0; tried",
        ),
    )

    def check(self, value: KnobValue) -> KnobValue:
        word = ALIASES.get(str(value), value)
        return as_word(self.name, word, ("sdpa", "vanilla", "sliced", *BACKENDS))

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        words = ("vanilla", "sliced", *BACKENDS)
        return ("sdpa", *(word for word in words if self.refuse(word, context) is None))

    def quality(self, value: KnobValue, context: Context) -> Quality:
        if value == "sdpa":
            return "exact"
        backend = BACKENDS.get(str(value))
        return "lossy" if backend is not None and backend.lossy else "lossless"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        name = context.facts.class_name
        if value == "sdpa":
            return None
        if value == "vanilla":
            return None if _vanilla(context) else f"{name} has no SDPA processor that has a plain counterpart"
        if value == "sliced":
            sliced = any(component.has_attention_slice for component in context.facts.components)
            return None if sliced else f"no component of {name} has set_attention_slice, diffusers ignores the call"
        return _refuse_backend(str(value), BACKENDS[str(value)], context)

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        """The same as above where single components have a dtype of their own."""
        wanted = parse_dtypes(str(settings.get("dtype", context.facts.dtype)))
        single = wanted.parts and any(wanted.of(part.name, part.dtype) == "fp32" for part in _denoisers(context))
        return self.conflicts[0] if value in HALF_ONLY and single else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        if value == "sdpa":
            return recipe
        if value in BACKENDS:
            return recipe.but(attention=BACKENDS[str(value)].kernel)
        return recipe.but(attention=value)

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live, live_attention

        if value == "sdpa":
            return live.nothing
        if value == "vanilla":
            return live_attention.use_vanilla(site)
        if value == "sliced":
            return live_attention.use_sliced(site)
        return live_attention.use_backend(site, str(value))

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == "sdpa":
            return ()
        if value == "sliced":
            return ("pipe.enable_attention_slicing()",)
        if value == "vanilla":
            return tuple(line for component in _vanilla(context) for line in _vanilla_statements(component))
        names = [component.name for component in _denoisers(context) if component.attention_dispatcher[0]]
        if names:
            return tuple(f'pipe.{name}.set_attention_backend("{value}")' for name in names)
        return ("pipe.enable_xformers_memory_efficient_attention()",)


def _denoisers(context: Context) -> tuple[ComponentFacts, ...]:
    return (*context.facts.of_role("denoiser"), *context.facts.of_role("controlnet"))


def _vanilla(context: Context) -> list[ComponentFacts]:
    return [component for component in _denoisers(context) if VANILLA.keys() & set(component.attention_processors)]


def _vanilla_statements(component: ComponentFacts) -> list[str]:
    """Module by module: not every class that has such processors has ``set_attn_processor``."""
    home = "diffusers.models.attention_processor"
    return [
        f"for module in pipe.{component.name}.modules():\n"
        f'    if isinstance(getattr(module, "processor", None), {home}.{name}):\n'
        f"        module.set_processor({home}.{VANILLA[name]}())"
        for name in dict.fromkeys(component.attention_processors)
        if name in VANILLA
    ]


def _refuse_backend(name: str, backend: Backend, context: Context) -> str | None:
    reason = _refuse_by_device(backend, context)
    if reason is None and backend.package is not None:
        reason = context.usable.get(backend.package, f"whether `{backend.package}` is usable is unknown")
    return reason if reason is not None else _refuse_by_model(name, backend, context)


def _refuse_by_device(backend: Backend, context: Context) -> str | None:
    device = context.device
    if backend.cuda_only and device.kind != "cuda":
        return "the kernel runs on CUDA devices only"
    if backend.capability and (device.compute_capability is None or device.compute_capability < backend.capability):
        return f"the kernel needs compute capability {backend.capability[0]}.{backend.capability[1]}"
    return None


def _refuse_by_model(name: str, backend: Backend, context: Context) -> str | None:
    components = [component for component in _denoisers(context) if component.attention_dispatcher[1]]
    aware = [component for component in components if component.attention_dispatcher[0]]
    if not aware and not (name == "xformers" and components):
        return f"{context.facts.class_name} does not use diffusers' attention dispatcher"
    for component in aware:
        if not backend.takes_mask and component.class_name in MASKED:
            return f"{component.class_name} passes an attention mask, which {name} rejects ({DISPATCH})"
        largest = max(component.attention_head_dims, default=0)
        if backend.largest_head and largest > backend.largest_head:
            return f"{component.class_name} has heads of {largest}, {name} takes up to {backend.largest_head}"
    return None
