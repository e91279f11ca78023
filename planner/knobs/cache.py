"""``cache``: reuse of what the denoiser computed in earlier steps, by diffusers' cache hooks."""

from __future__ import annotations

from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.words import as_word
from planner.recipe import Recipe
from planner.types import KnobValue, Quality

NEEDS_CONTEXT = ("first_block", "taylorseer")
NEEDS_TIMESTEP = ("pab",)
CACHES = ("none", *NEEDS_CONTEXT, *NEEDS_TIMESTEP, "faster", "mag")
NO_EFFECT = {("taylorseer", "WanTransformer3DModel"): "none of its modules match TaylorSeer's patterns"}
FAILS = {("first_block", "Flux2Transformer2DModel"): "raises TypeError in its first block"}


class Cache(Knob):
    """What a cache saves depends on the images, so no estimate credits it: it is used when the user fixes it."""

    name = "cache"
    credited = False
    stage = 88
    conflicts = (
        Conflict(
            values=frozenset(CACHES) - {"none"},
            other="compile",
            other_values=frozenset({"jit-trace"}),
            verdict="fails",
            reason="a trace records one way through the cache's decisions for ever",
            source="torch.jit.trace documentation: control flow is not recorded",
        ),
    )

    def check(self, value: KnobValue) -> KnobValue:
        return as_word(self.name, value, CACHES)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        return ("none", *(word for word in CACHES[1:] if self.refuse(word, context) is None))

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == "none" else "lossy"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        facts = context.facts
        if value == "none":
            return None
        if value == "mag":
            return "MagCache needs magnitude ratios measured for this very checkpoint (diffusers MagCacheConfig)"
        if value == "faster":
            return "FasterCache must be told how each model guides and raises where that is wrong (tried on CogVideoX)"
        denoisers = facts.of_role("denoiser")
        if not denoisers or not all(part.can_cache for part in denoisers):
            return f"the denoiser of {facts.class_name} has no enable_cache"
        if value in NEEDS_CONTEXT and not facts.opens_cache_context:
            return f"{facts.class_name} never opens a cache_context, so the cache raises at run time (diffusers#12760)"
        if value in NEEDS_TIMESTEP and not facts.has_current_timestep:
            return f"{facts.class_name} has no current_timestep, which this cache asks for"
        if value in NEEDS_TIMESTEP and facts.guides_in_two_calls:
            return f"{facts.class_name} may guide in two calls per step, which this cache mixes up (it has one state)"
        if value == "first_block" and any(len(part.block_paths) < 2 for part in denoisers):
            return "FirstBlockCache needs two blocks or more, it skips all but the first"
        reasons = (table.get((str(value), part.class_name)) for part in denoisers for table in (NO_EFFECT, FAILS))
        return next((reason for reason in reasons if reason), None)

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if value == "none":
            return live.nothing
        modules = list(live.modules_of(site, "denoiser").values())

        def change() -> None:
            for module in modules:
                module.enable_cache(_config(site, str(value)))

        def official() -> None:
            for module in modules:
                if getattr(module, "_cache_config", None) is not None:
                    module._reset_stateful_cache()
                    module.disable_cache()

        return live.reversible(site, change, official)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == "none":
            return ()
        names = [part.name for part in context.facts.of_role("denoiser")]
        return tuple(f"pipe.{name}.enable_cache({_TEXTS[str(value)]})" for name in names)


_TEXTS = {
    "first_block": "diffusers.FirstBlockCacheConfig(threshold=0.05)",
    "taylorseer": "diffusers.TaylorSeerCacheConfig()",
    "pab": (
        "diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, "
        "current_timestep_callback=lambda: pipe.current_timestep)"
    ),
}


def _config(site: Site, value: str) -> object:
    """diffusers' own defaults; the attention of every second step for the broadcast, as in its documentation."""
    import diffusers

    pipe = site.pipe
    if value == "first_block":
        return diffusers.FirstBlockCacheConfig(threshold=0.05)
    if value == "taylorseer":
        return diffusers.TaylorSeerCacheConfig()
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )
