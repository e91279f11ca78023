"""``fuse_qkv``: query, key and value in one matmul. Same numbers; the separate weights stay in memory beside it."""

from __future__ import annotations

from planner.knobs.base import Context, Site, Switch, Undo
from planner.recipe import Recipe
from planner.types import KnobValue


class FuseQkv(Switch):
    """Denoisers only. Applied before anything that holds on to weights: quantization, offload, compile."""

    name = "fuse_qkv"
    credited = False
    stage = 30

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if not value:
            return None
        if not any(part.can_fuse_qkv for part in context.facts.of_role("denoiser")):
            return f"no denoiser of {context.facts.class_name} has projections that diffusers fuses"
        quantized = [part.name for part in context.facts.of_role("denoiser") if part.quantization]
        if quantized:
            return f"{quantized[0]}: quantized weights cannot be concatenated (aten.cat is not implemented)"
        if context.facts.offload != "none":
            return "its weights are under offload hooks, which would not see the fused ones"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(fused_qkv=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if not value:
            return live.nothing
        import torch

        names = {part.name for part in site.facts.of_role("denoiser") if part.can_fuse_qkv}
        modules = [module for name, module in live.modules_of(site).items() if name in names]

        def change() -> None:
            # The new layers draw initial values before they are filled: not from the user's random state.
            devices = [part for part in {next(module.parameters()).device for module in modules} if part.type == "cuda"]
            with torch.random.fork_rng(devices=devices):
                for module in modules:
                    module.fuse_qkv_projections()

        # ``unfuse_qkv_projections`` leaves the fused weights of many models behind; restoring the modules does not.
        return live.reversible(site, change)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        parts = [part for part in context.facts.of_role("denoiser") if part.can_fuse_qkv]
        return tuple(f"pipe.{part.name}.fuse_qkv_projections()" for part in parts) if value else ()
