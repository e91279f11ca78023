"""``dtype``: the floating type of all components or of single ones, modules that must stay in float32 respected."""

from __future__ import annotations

from planner.dtypes import parse_dtypes
from planner.facts import ComponentFacts
from planner.knobs.base import Context, Knob, Site, Undo
from planner.recipe import Recipe
from planner.types import DTYPES, KnobValue, Quality

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FP16_BREAKS = {
    # Class name prefix of a component: what happens in float16, where it was reported.
    "FluxTransformer": "values overflow without clipping, Fill paints black (diffusers#9097, diffusers#10533)",
    "ZImageTransformer": "NaN and black images (Tongyi-MAI/Z-Image#14)",
    "QwenImageTransformer": "NaN (comfyanonymous/ComfyUI#10751)",
    "StableCascadeUNet": "broken in float16 (diffusers#6970)",
    "AutoencoderKLMiniMaxH3": "keeps float32 weights and decodes under autocast at twice the memory (diffusers#14746)",
}


class Dtype(Knob):
    """fp32, fp16 or bf16 for the whole pipeline, or ``bf16,vae=fp32`` with single components in another.

    Most pipelines demand one dtype of encoder, denoiser and VAE, so the search tries whole pipelines only. A VAE in fp32 beside
    16 bit is never faster nor smaller, and what it does for the pictures no estimate tells: a mix is for the user to ask for,
    and is refused where the dry run does not get through with it.
    """

    name = "dtype"
    stage = 20

    def check(self, value: KnobValue) -> KnobValue:
        return parse_dtypes(str(value)).text

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        now = context.facts.dtype
        others = [dtype for dtype in DTYPES if dtype != now and self.refuse(dtype, context) is None]
        return (now, *others)

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if not _changed(value, context) else "lossless"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        known = [part.name for part in context.facts.components]
        unknown = [name for name in parse_dtypes(str(value)).parts if name not in known]
        if unknown:
            return f"{context.facts.class_name} has no component {unknown[0]!r}; it has {', '.join(known)}"
        changed = _changed(value, context)
        if not changed:
            return None
        quantized = [part.name for part in context.facts.components if part.quantization]
        if quantized:
            return f"{', '.join(quantized)}: already quantized, `.to(dtype)` raises or casts only a part"
        if context.facts.offload != "none":
            return f"the pipeline already runs under {context.facts.offload} offload, whose host copies keep the old dtype"
        bf16 = _refuse_bf16(context) if "bf16" in changed.values() else None
        fp16 = [part for part in context.facts.components if changed.get(part.name) == "fp16"]
        return bf16 or (_refuse_fp16(context, fp16) if fp16 else None)

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(dtype=value) if _changed(value, context) else recipe

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if value == site.facts.dtype:
            return live.nothing
        import torch

        from planner.knobs import live_cast

        wanted = parse_dtypes(str(value))
        given = {part.name: wanted.parts.get(part.name) or wanted.base for part in site.facts.components}
        return live_cast.cast(site, {name: getattr(torch, TORCH_NAMES[dtype]) for name, dtype in given.items() if dtype})

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == context.facts.dtype:
            return ()
        wanted, parts = parse_dtypes(str(value)), context.facts.components
        if wanted.parts:
            chosen = [(part, wanted.parts.get(part.name) or wanted.base) for part in parts]
            return tuple(_statement(part, each, TORCH_NAMES[each]) for part, each in chosen if each)
        dtype = TORCH_NAMES[str(value)]
        if value == "fp32" or not any(part.library == "transformers" or _kept(part, str(value)) for part in parts):
            return (f"pipe.to(torch.{dtype})",)
        return tuple(_statement(part, str(value), dtype) for part in parts)


def _changed(value: KnobValue, context: Context) -> dict[str, str]:
    """Components that get another dtype than they have, by name. A plain word that is the pipeline's own changes nothing."""
    wanted = parse_dtypes(str(value))
    base = None if wanted.base == context.facts.dtype else wanted.base
    given = {part.name: (wanted.parts.get(part.name) or base, part.dtype) for part in context.facts.components}
    return {name: dtype for name, (dtype, now) in given.items() if dtype and dtype != now}


def _kept(part: ComponentFacts, value: str) -> tuple[str, ...]:
    """Names that stay in float32; those of transformers in float16 only."""
    return part.keep_in_fp32 if part.library == "diffusers" or value == "fp16" else ()


def _statement(part: ComponentFacts, value: str, dtype: str) -> str:
    """``state_dict`` leaves out the buffers that transformers computes, which loading keeps in float32."""
    kept = _kept(part, value)
    if not kept and part.library != "transformers":
        return f"pipe.{part.name}.to(torch.{dtype})"
    stays = f" and not {{{', '.join(map(repr, kept))}}} & set(name.split('.'))" if kept else ""
    return (
        f"for name, weight in pipe.{part.name}.state_dict(keep_vars=True).items():\n"
        f"    if weight.is_floating_point(){stays}:\n"
        f"        weight.data = weight.data.to(torch.{dtype})"
    )


def _refuse_bf16(context: Context) -> str | None:
    capability = context.device.compute_capability
    if context.device.kind == "cuda" and (capability is None or capability < (8, 0)):
        return f"bfloat16 needs compute capability 8.0, {context.device.name} has {_dotted(capability)}"
    return None


def _refuse_fp16(context: Context, parts: list[ComponentFacts]) -> str | None:
    if context.device.kind == "cpu":
        return "float16 on a CPU is converted to float32 and back in most kernels; bf16 needs as little memory"
    for component in parts:
        for prefix, reason in FP16_BREAKS.items():
            if component.class_name.startswith(prefix):
                return f"{component.name} ({component.class_name}): {reason}"
    return None


def _dotted(capability: tuple[int, int] | None) -> str:
    return "an unknown one" if capability is None else f"{capability[0]}.{capability[1]}"
