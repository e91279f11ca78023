"""``quantization``: weights of single components in 8 or 4 bits: ``none`` or ``transformer=int8wo,text_encoder=int8wo``."""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import UsageError
from planner.facts import ComponentFacts
from planner.knobs.base import Context, Knob, Site, Undo
from planner.knobs.words import as_word
from planner.recipe import Recipe
from planner.types import KnobValue, Quality


@dataclass(frozen=True, slots=True)
class Scheme:
    """How ``nn.Linear`` weights are stored; ``config`` is torchao's class, None for diffusers' layerwise casting."""

    config: str | None
    capability: tuple[int, int] | None = None
    packages: tuple[str, ...] = ("torchao",)
    multiple: int = 1
    """Sizes of a layer must be multiples of this for its kernel; other layers are left alone."""


SCHEMES: dict[str, Scheme] = {
    "int8wo": Scheme("Int8WeightOnlyConfig"),
    # int8 tensor cores since Turing (NVIDIA's CUDA programming guide, compute capability table).
    "int8dq": Scheme("Int8DynamicActivationInt8WeightConfig", capability=(7, 5), multiple=16),
    "fp8wo": Scheme("Float8WeightOnlyConfig"),
    # torchao asserts 8.9 when it quantizes (quant_api.py:1334); _scaled_mm takes multiples of 16.
    "fp8dq": Scheme("Float8DynamicActivationFloat8WeightConfig", capability=(8, 9), multiple=16),
    # torchao 0.18 raises "Requires mslk >= 1.0.0" without that package.
    "int4wo": Scheme("Int4WeightOnlyConfig", capability=(8, 0), packages=("torchao", "mslk"), multiple=128),
    "fp8_layerwise": Scheme(None, packages=()),
}


class Quantization(Knob):
    """Applied in place to loaded weights; the originals wait in host memory, so that undo is exact."""

    name = "quantization"
    stage = 40

    def check(self, value: KnobValue) -> KnobValue:
        return format_schemes(parse_schemes(value))

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        denoisers = [part.name for part in context.facts.of_role("denoiser")]
        encoders = [part.name for part in context.facts.of_role("text_encoder")]
        found: list[KnobValue] = ["none"]
        for scheme in SCHEMES:
            choices = [denoisers] if scheme == "fp8_layerwise" else [denoisers, [*denoisers, *encoders], encoders]
            for names in choices:
                value = format_schemes(dict.fromkeys(names, scheme))
                if names and value not in found and self.refuse(value, context) is None:
                    found.append(value)
        return tuple(found)

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == "none" else "lossy"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        known = {part.name: part for part in context.facts.components}
        for name, scheme in parse_schemes(value).items():
            if name not in known:
                return f"{context.facts.class_name} has no component {name!r}; it has {', '.join(known)}"
            reason = _refuse(known[name], scheme, context)
            if reason is not None:
                return f"{name}={scheme}: {reason}"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(weights={**recipe.weights, **parse_schemes(value)})

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live, live_quantization

        schemes = parse_schemes(value)
        return live_quantization.quantize(site, schemes) if schemes else live.nothing

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return tuple(_statement(context.facts.component(name), scheme) for name, scheme in parse_schemes(value).items())


def parse_schemes(value: KnobValue) -> dict[str, str]:
    """Component to scheme, sorted by component; empty for ``none``. Raises UsageError."""
    if value in ("none", False, ""):
        return {}
    found: dict[str, str] = {}
    for item in str(value).split(","):
        name, equals, scheme = (part.strip() for part in item.partition("="))
        if not equals or not name or name in found:
            raise UsageError(f"quantization={value}: write COMPONENT=SCHEME,… once per component, or none.")
        found[name] = as_word("quantization", scheme, SCHEMES)
    return dict(sorted(found.items()))


def format_schemes(schemes: dict[str, str]) -> str:
    """The canonical text of a choice of schemes."""
    return ",".join(f"{name}={scheme}" for name, scheme in sorted(schemes.items())) or "none"


def _refuse(part: ComponentFacts, scheme: str, context: Context) -> str | None:
    if part.quantization is not None:
        return f"its weights are already quantized ({part.quantization})"
    if context.facts.offload != "none":
        return f"the pipeline already runs under {context.facts.offload} offload, whose host copies stay as they are"
    if scheme == "fp8_layerwise":
        return _refuse_layerwise(part)
    if not part.linear_parameters:
        return "it has no linear layers"
    return _refuse_torchao(SCHEMES[scheme], context)


def _refuse_layerwise(part: ComponentFacts) -> str | None:
    if not part.can_cast_layerwise:
        return "a transformers model reports float8 as its dtype then, and its inputs are cast to it (diffusers#10347)"
    if any(leaf.path.startswith("encoder_hid_proj.") for leaf in part.leaves):
        return "its image projection casts its input to the weight's stored dtype (diffusers embeddings.py:1296)"
    if part.role == "vae":
        return "pipelines call decode, and read the VAE's dtype, outside of the hooked forward"
    return None


def _refuse_torchao(scheme: Scheme, context: Context) -> str | None:
    for package in scheme.packages:
        reason = context.usable.get(package, f"whether `{package}` is usable is unknown")
        if reason is not None:
            return reason
    device = context.device
    if device.kind == "sim":
        return "a simulated device has no quantized kernels"
    if scheme.capability is None:
        return None
    if device.kind == "cpu":
        return None if scheme.config == "Int8DynamicActivationInt8WeightConfig" else "its kernel needs a CUDA device"
    if device.compute_capability is None or device.compute_capability < scheme.capability:
        return f"its kernel needs compute capability {scheme.capability[0]}.{scheme.capability[1]}"
    return None


def _statement(part: ComponentFacts, scheme: str) -> str:
    """The same layers as applying chooses: none that stays in float32, none whose sizes the kernel does not take."""
    if scheme == "fp8_layerwise":
        return f"pipe.{part.name}.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=pipe.{part.name}.dtype)"
    multiple, kept = SCHEMES[scheme].multiple, part.keep_in_fp32
    tests = ["isinstance(layer, torch.nn.Linear)"]
    if kept:
        tests.append(f"not {{{', '.join(map(repr, kept))}}} & set(path.split('.'))")
    if multiple > 1:
        tests.append(f"layer.in_features % {multiple} == 0 and layer.out_features % {multiple} == 0")
    chosen = f", filter_fn=lambda layer, path: {' and '.join(tests)}" if len(tests) > 1 else ""
    return f"torchao.quantization.quantize_(pipe.{part.name}, torchao.quantization.{SCHEMES[scheme].config}(){chosen})"
