"""``chunked_forward``: feed-forward layers take one sample of the batch at a time."""

from __future__ import annotations

from planner.knobs.base import Context, Site, Switch, Undo
from planner.recipe import Recipe
from planner.types import KnobValue


class ChunkedForward(Switch):
    """``enable_forward_chunking(chunk_size=1, dim=0)`` on the denoisers that have it. Same numbers to 4e-7."""

    name = "chunked_forward"
    stage = 55

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value and not any(part.can_chunk_forward for part in context.facts.of_role("denoiser")):
            return f"no denoiser of {context.facts.class_name} has enable_forward_chunking"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(chunked_forward=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        names = [part.name for part in site.facts.of_role("denoiser") if part.can_chunk_forward]
        if not value or not names:
            return live.nothing
        modules = live.modules_of(site, "denoiser")

        def change() -> None:
            for name in names:
                modules[name].enable_forward_chunking(chunk_size=1, dim=0)

        return live.reversible(site, change)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        names = [part.name for part in context.facts.of_role("denoiser") if part.can_chunk_forward]
        return tuple(f"pipe.{name}.enable_forward_chunking(chunk_size=1, dim=0)" for name in names) if value else ()
