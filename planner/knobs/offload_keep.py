"""``offload_keep``: components that stay on the device while the rest is offloaded: ``none`` or ``text_encoder,vae``."""

from __future__ import annotations

from itertools import combinations

from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.offload import GROUP, PIPELINE_UTILS, group_type, kept_by
from planner.recipe import Recipe
from planner.types import KnobValue, Settings

EVERY_SUBSET = 3
"""Of more components than this only the smallest ones together are tried, from one to all: 32 subsets of five say little more."""
KEEPING = frozenset({"sequential", *GROUP})
SENT_AWAY = Conflict(
    values=frozenset({"any component"}),
    other="offload",
    other_values=frozenset({"model"}),
    verdict="pointless",
    reason="each call ends with everything moved to the host, what is excluded too, and that back: as many copies, more memory",
    source=f"{PIPELINE_UTILS} maybe_free_model_hooks and enable_model_cpu_offload; copies counted",
)


class OffloadKeep(Knob):
    """Components that stay on the device under sequential and group offload: encoders and VAEs are then not copied at each call.

    Denoisers and ControlNets are what offload is for; the others are tried.
    """

    name = "offload_keep"
    stage = 84
    conditional = (SENT_AWAY,)

    def check(self, value: KnobValue) -> KnobValue:
        names = sorted(set(map(str.strip, str(value or "none").split(","))) - {"", "none"})
        return ",".join(names) or "none"

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        if context.device.kind == "cpu" or context.facts.offload != "none":
            return ("none",)
        parts = [part for part in context.facts.components if part.role in ("text_encoder", "vae") and group_type(part, "group_leaf")]
        names = [part.name for part in sorted(parts, key=lambda part: part.weight_bytes)]
        several = range(1, len(names) + 1)
        if len(names) > EVERY_SUBSET:
            return ("none", *(self.check(",".join(names[:count])) for count in several))
        return ("none", *(self.check(",".join(chosen)) for count in several for chosen in combinations(names, count)))

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        known = [part.name for part in context.facts.components]
        chosen = kept_by({self.name: value})
        unknown = sorted(chosen - set(known))
        if unknown:
            return f"{context.facts.class_name} has no component {unknown[0]!r}; it has {', '.join(known)}"
        if chosen >= {part.name for part in context.facts.of_role("denoiser")} and chosen:
            return "with the denoiser on the device nothing is left that is worth offloading"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        offloads = settings.get("offload", "none") != "none" and context.facts.offload == "none"
        return value if offloads else "none"

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        return SENT_AWAY if value != "none" and settings.get("offload") in SENT_AWAY.other_values else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        kept = kept_by({self.name: value})
        return recipe.but(resident=recipe.resident | kept) if kept else recipe

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        return live.nothing  # ``offload`` itself reads it
