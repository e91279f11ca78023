"""``channels_last``: convolution weights in NHWC, which tensor cores and oneDNN read without transposing."""

from __future__ import annotations

from planner.facts import ComponentFacts
from planner.knobs.base import Context, Site, Switch, Undo
from planner.recipe import Recipe
from planner.types import KnobValue


class ChannelsLast(Switch):
    """All convolutional components that have weights of rank 4 and none of rank 5."""

    name = "channels_last"
    stage = 50

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if not value or any(map(convertible, context.facts.components)):
            return None
        if any(component.has_mixed_rank_weights for component in context.facts.components):
            return "its convolutions are three-dimensional: torch raises `required rank 4 tensor` for channels_last"
        return f"{context.facts.class_name} has no convolutions that it would change"

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(channels_last=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        names = [component.name for component in site.facts.components if convertible(component)]
        if not value or not names:
            return live.nothing
        import torch

        modules = live.modules_of(site)

        def change() -> None:
            for name in names:
                for _, tensor in live.tensor_slots(modules[name]):
                    if tensor.dim() == 4 and tensor.is_floating_point():
                        tensor.data = tensor.data.to(memory_format=torch.channels_last)

        return live.reversible(site, change)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if not value:
            return ()
        names = [component.name for component in context.facts.components if convertible(component)]
        return tuple(f"pipe.{name}.to(memory_format=torch.channels_last)" for name in names)


def convertible(component: ComponentFacts) -> bool:
    """A denoiser, ControlNet or VAE with two-dimensional convolutions only."""
    if component.role not in ("denoiser", "controlnet", "vae"):
        return False
    return component.convolutions_2d > 0 and not component.has_mixed_rank_weights
