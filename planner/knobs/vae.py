"""``vae_slicing``, ``vae_tiling`` and ``vae_tile``: decode one image, or one tile, at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.facts import ComponentFacts
from planner.knobs.base import Context, Knob, Site, Switch, Undo
from planner.knobs.words import as_count
from planner.recipe import Recipe
from planner.types import KnobValue, Quality, Settings

if TYPE_CHECKING:
    from torch import nn

SMALLEST_TILE_PIXELS = 128
"""Below this the seams cover most of a tile; an assumption, smaller ones can be fixed by the user."""
LEAST_TILE_PIXELS = 16
"""Two latent pixels of a VAE that shrinks by 8: with one, the stride between tiles rounds to zero and diffusers fails."""
NEEDS_TILING = {"AutoencoderKLAllegro": "its decode is implemented for tiles only (autoencoder_kl_allegro.py:804)"}


class VaeSlicing(Switch):
    """Images of a batch are encoded and decoded one after the other. Same numbers, up to kernel noise (1e-6)."""

    name = "vae_slicing"
    stage = 90

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        now = any(vae.slicing_on for vae in _able(context, "has_slicing"))
        useful = context.workload.batch_size > 1 and self.refuse(not now, context) is None
        return (now, not now) if useful else (now,)

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value and not _able(context, "has_slicing"):
            return f"no VAE of {context.facts.class_name} implements slicing"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(vae_slicing=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        return _switch(site, bool(value), "slicing")

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return _statements(context, bool(value), "slicing")


class VaeTiling(Switch):
    """Images larger than a tile are decoded in overlapping, blended tiles: less memory, slightly other pixels."""

    name = "vae_tiling"
    stage = 91

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        now = any(vae.tiling_on for vae in _able(context, "has_tiling"))
        return (now, not now) if self.refuse(not now, context) is None else (now,)

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == self.values(context)[0] else "lossless"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value and not _able(context, "has_tiling"):
            return f"no VAE of {context.facts.class_name} implements tiling"
        tiny = [vae for vae in _able(context, "has_tiling") if (vae.tile_pixels or LEAST_TILE_PIXELS) < LEAST_TILE_PIXELS]
        if value and tiny:
            return f"{tiny[0].name}: tiles of {tiny[0].tile_pixels} pixels leave no room to overlap"
        forced = [vae for vae in context.facts.of_role("vae") if vae.class_name in NEEDS_TILING]
        if not value and forced:
            return f"{forced[0].name} ({forced[0].class_name}): {NEEDS_TILING[forced[0].class_name]}"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(vae_tiling=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        return _switch(site, bool(value), "tiling")

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return _statements(context, bool(value), "tiling")


class VaeTile(Knob):
    """Side of a tile in pixels. ``AutoencoderKL`` takes it from its config, 1024 for SDXL, SD3 and FLUX, where tiling
    at 1024x1024 would do nothing. 0 means that no VAE has tiles."""

    name = "vae_tile"
    stage = 92

    def check(self, value: KnobValue) -> KnobValue:
        return as_count(self.name, value, least=0)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        own = _own_tile(context)
        halves = [own >> shift for shift in (1, 2, 3) if own >> shift >= SMALLEST_TILE_PIXELS]
        return (own, *(size for size in halves if self.refuse(size, context) is None))

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == _own_tile(context) else "lossless"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        own = _own_tile(context)
        if value == own:
            return None
        if own == 0:
            return f"no VAE of {context.facts.class_name} has a tile size"
        if int(value) < 8 or ((int(value) * 8) % own and own % int(value)):
            return f"a tile of {value} pixels is no simple fraction of the VAE's own {own}"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        return value if settings.get("vae_tiling") else _own_tile(context)

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe if value == _own_tile(context) else recipe.but(vae_tile_pixels=int(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        changed = {vae.name: vae.tile_pixels for vae in site.facts.of_role("vae") if _resizable(vae)}
        changed = {name: own for name, own in changed.items() if own and own != value}
        if not changed or not value:
            return live.nothing
        modules = live.modules_of(site, "vae")

        def change() -> None:
            for name, own in changed.items():
                for attribute, size in tile_sizes(modules[name], int(value), int(own or 0)).items():
                    setattr(modules[name], attribute, size)

        return live.reversible(site, change)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        own = _own_tile(context)
        if value == own:
            return ()
        vae = next(vae for vae in context.facts.of_role("vae") if _resizable(vae))
        return (
            f"for name, size in vars(pipe.{vae.name}).copy().items():",
            "    if name.startswith('tile_') and isinstance(size, int) and 'frames' not in name:",
            f"        setattr(pipe.{vae.name}, name, size * {value} // {own})",
        )


def tile_sizes(module: nn.Module, pixels: int, own_pixels: int) -> dict[str, int]:
    """Tile sizes, latent tile sizes and strides of a VAE scaled from ``own_pixels`` to ``pixels``; frames untouched."""
    sizes = {name: size for name, size in vars(module).items() if name.startswith("tile_") and "frames" not in name}
    return {name: size * pixels // own_pixels for name, size in sizes.items() if isinstance(size, int)}


def _able(context: Context, ability: str) -> list[ComponentFacts]:
    return [vae for vae in context.facts.of_role("vae") if getattr(vae, ability)]


def _resizable(vae: ComponentFacts) -> bool:
    return vae.has_tiling and bool(vae.tile_pixels)


def _own_tile(context: Context) -> int:
    return next((vae.tile_pixels or 0 for vae in context.facts.of_role("vae") if _resizable(vae)), 0)


def _switch(site: Site, wanted: bool, what: str) -> Undo:
    from planner.knobs import live

    able = [vae.name for vae in site.facts.of_role("vae") if getattr(vae, f"has_{what}")]
    on = {vae.name for vae in site.facts.of_role("vae") if getattr(vae, f"{what}_on")}
    modules = live.modules_of(site, "vae")
    names = [name for name in able if (name in on) != wanted]
    if not names:
        return live.nothing

    def change() -> None:
        for name in names:
            getattr(modules[name], f"{'enable' if wanted else 'disable'}_{what}")()

    return live.reversible(site, change)


def _statements(context: Context, wanted: bool, what: str) -> tuple[str, ...]:
    verb = "enable" if wanted else "disable"
    vaes = [vae for vae in _able(context, f"has_{what}") if getattr(vae, f"{what}_on") != wanted]
    return tuple(f"pipe.{vae.name}.{verb}_{what}()" for vae in vaes)
