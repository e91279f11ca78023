"""``tf32`` and ``cudnn_benchmark``: process-wide switches of torch, put back by undo."""

from __future__ import annotations

from planner.dtypes import parse_dtypes
from planner.knobs.base import Context, Site, Switch, Undo
from planner.recipe import Recipe
from planner.types import KnobValue, Quality, Settings


class Tf32(Switch):
    """Matmuls of float32 tensors in TensorFloat-32 (10-bit mantissa). Convolutions use it by torch's own default."""

    name = "tf32"
    stage = 5

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "lossless" if value else "exact"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        capability = context.device.compute_capability
        if value and (context.device.kind != "cuda" or capability is None or capability < (8, 0)):
            return "TF32 needs a CUDA device of compute capability 8.0 or above"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        """Without float32 matmuls the switch changes nothing."""
        wanted = parse_dtypes(str(settings.get("dtype", context.facts.dtype)))
        return value if any(wanted.of(part.name, part.dtype) == "fp32" for part in context.facts.components) else False

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(tf32=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if not value:
            return live.nothing
        import torch

        # The older interface on purpose: after the new ``fp32_precision`` the old getters raise, which torch.compile's
        # max-autotune calls (pytorch#166387).
        return live.reversible(site, lambda: torch.set_float32_matmul_precision("high"))

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return ('torch.set_float32_matmul_precision("high")',) if value else ()


class CudnnBenchmark(Switch):
    """cuDNN times its convolution algorithms at the first call of each shape, which then needs more memory for once."""

    name = "cudnn_benchmark"
    credited = False
    stage = 6

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        convolves = any(part.convolutions_2d or part.convolutions_3d for part in context.facts.components)
        return (False, True) if convolves and self.refuse(True, context) is None else (False,)

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        return "cuDNN runs on CUDA devices only" if value and context.device.kind != "cuda" else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(cudnn_benchmark=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if not value:
            return live.nothing
        import torch

        return live.reversible(site, lambda: setattr(torch.backends.cudnn, "benchmark", True))

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return ("torch.backends.cudnn.benchmark = True",) if value else ()
