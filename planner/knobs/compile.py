"""``compile``: fuse the denoisers' operations with torch.compile, whole or block by block, or record them with jit."""

from __future__ import annotations

from planner.facts import ComponentFacts
from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.offload import GROUP
from planner.knobs.words import as_word
from planner.recipe import Recipe
from planner.types import KnobValue, Quality, Settings

COMPILES = ("none", "default", "reduce-overhead", "max-autotune", "regional", "jit-trace")
WHOLE = frozenset({"default", "reduce-overhead", "max-autotune"})
GRAPHS = frozenset({"reduce-overhead", "max-autotune"})
ANY = frozenset(COMPILES) - {"none"}
TRIED = "tried on torch 2.13, accelerate 1.15, diffusers 0.42.1"


def _conflict(values: frozenset[str], other: str, others: set[KnobValue], verdict: str, why: str, source: str) -> Conflict:
    return Conflict(
        values=frozenset(values),
        other=other,
        other_values=frozenset(others),
        verdict=verdict,  # type: ignore[arg-type]
        reason=why,
        source=source,
    )


CAST = _conflict(ANY, "quantization", {"fp8_layerwise"}, "pointless", "about 40 graph breaks and the recompile limit; fullgraph raises",
                 TRIED)  # fmt: skip
UNWRAPPED = _conflict(frozenset({"jit-trace"}), "quantization", {"any scheme"}, "untested", "tracing unwraps quantized tensors", "untried")
DECIDING = _conflict(GRAPHS, "cache", {"any but none"}, "fails", "a cache decides on the CPU whether blocks run, which a CUDA graph cannot",
                     "expected, untried")  # fmt: skip


class Compile(Knob):
    """Whole denoisers with one of torch's modes, their repeated blocks (``regional``), or ``torch.jit.trace``."""

    name = "compile"
    stage = 70
    conditional = (CAST, UNWRAPPED, DECIDING)
    conflicts = (
        _conflict(ANY, "offload", {"sequential"}, "pointless", "57 graph breaks, recompile limit reached", TRIED),
        _conflict(ANY, "offload", {"group_leaf"}, "pointless", "54 graph breaks, recompile limit reached", TRIED),
        _conflict(WHOLE, "offload", {"group_block"}, "pointless", "a graph break at every block; use regional", TRIED),
        _conflict(
            GRAPHS,
            "offload",
            {"model"},
            "fails",
            "CUDA graphs need weights that stay in one place",
            "expected, untried",
        ),
        _conflict(frozenset({"jit-trace"}), "offload", {"model", *GROUP}, "untested", "hooks are not traced", "untried"),
        _conflict(frozenset({"jit-trace"}), "fuse_qkv", {True}, "untested", "superseded by compile", "untried"),
    )

    def order(self, settings: Settings) -> int:
        """Before model offload, whose hook must sit on the wrapper; after group offload, whose hooks it must see."""
        return 85 if settings.get("offload") in GROUP else self.stage

    def check(self, value: KnobValue) -> KnobValue:
        return as_word(self.name, value, COMPILES)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        # jit-trace is accepted when asked for; torch.compile supersedes it, so it is not worth searching.
        words = ("default", "reduce-overhead", "max-autotune", "regional")
        return ("none", *(word for word in words if self.refuse(word, context) is None))

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value == "none":
            return None
        if not context.facts.of_role("denoiser"):
            return f"{context.facts.class_name} has no denoiser that diffusers can compile"
        if value == "jit-trace":
            return None
        return _refuse_inductor(str(value), context)

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        """Quantized or cast weights, by scheme: the values of ``quantization`` are free text."""
        scheme = str(settings.get("quantization", "none"))
        if value != "none" and "fp8_layerwise" in scheme:
            return CAST
        if value == "jit-trace" and scheme != "none":
            return UNWRAPPED
        return DECIDING if value in GRAPHS and settings.get("cache", "none") != "none" else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        if value == "none":
            return recipe
        if value == "regional":
            return recipe.but(fusion="regional")
        if value == "jit-trace":
            return recipe.but(fusion="trace")
        graphs = value in GRAPHS and context.device.kind == "cuda"
        return recipe.but(fusion="whole", cuda_graphs=graphs, autotuned=value == "max-autotune")

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live, live_compile

        if value == "none":
            return live.nothing
        if value == "jit-trace":
            return live_compile.trace(site)
        if value == "regional":
            return live_compile.regional(site)
        return live_compile.whole(site, str(value))

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        names = [part.name for part in context.facts.of_role("denoiser")]
        if value == "none":
            return ()
        if value == "regional":
            return tuple(f"pipe.{name}.compile_repeated_blocks()" for name in names)
        if value == "jit-trace":
            return ("# jit-trace: torch.jit.trace of the denoiser's forward; there is no diffusers call for it",)
        mode = "" if value == "default" else f', mode="{value}"'
        return tuple(f"pipe.{name} = torch.compile(pipe.{name}{mode})" for name in names)

    def statements(self, value: KnobValue, settings: Settings, context: Context) -> tuple[str, ...]:
        hooked = settings.get("offload") in GROUP or settings.get("cache", "none") != "none"
        if value != "regional" or hooked:
            return self.to_python(value, context)
        names = [part.name for part in context.facts.of_role("denoiser")]
        return tuple(f"pipe.{name}.compile_repeated_blocks(fullgraph=True)" for name in names)


def _refuse_inductor(value: str, context: Context) -> str | None:
    device = context.device
    if device.kind == "sim":
        return "a simulated device runs no compiled kernels"
    if device.kind == "cuda" and (device.compute_capability is None or device.compute_capability < (7, 0)):
        return "Triton needs compute capability 7.0"
    if device.kind == "cpu" and value in GRAPHS:
        return f"{value} is for CUDA graphs and Triton; on a CPU it equals default"
    unusable = context.usable.get("inductor", "whether torch.compile works here is unknown")
    if unusable is not None:
        return f"torch.compile: {unusable}"
    lacking = [part for part in context.facts.of_role("denoiser") if not _has_region(part)]
    if value == "regional" and lacking:
        return f"{lacking[0].class_name} names no repeated blocks, compile_repeated_blocks raises"
    return None


def _has_region(part: ComponentFacts) -> bool:
    return bool(part.repeated_blocks)
