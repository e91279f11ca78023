"""``scheduler`` and ``steps``: a faster solver that needs fewer denoising steps. Other images, so lossy."""

from __future__ import annotations

from planner.errors import UsageError
from planner.knobs.base import Conflict, Context, Knob, Site, Undo
from planner.knobs.words import as_count
from planner.recipe import Recipe
from planner.types import KnobValue, Quality, Settings

FAST = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
FAST_STEPS = 25
"""DPM-Solver++ and UniPC: good samples in 20 to 25 steps (diffusers documentation, schedulers/overview)."""
SLOW = frozenset({"DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler",
                  "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"})  # fmt: skip
AS_IS = "as_is"
FEW_STEPS = Conflict(
    values=frozenset({"fewer than planned"}),
    other="scheduler",
    other_values=frozenset({"any but " + " and ".join(FAST)}),
    verdict="wrong",
    reason="fewer steps with a first-order solver lose image quality",
    source="diffusers documentation, schedulers/overview",
)


class Scheduler(Knob):
    """The class that takes the scheduler's config; ``as_is`` keeps the pipeline's own."""

    name = "scheduler"
    stage = 7

    def check(self, value: KnobValue) -> KnobValue:
        if not isinstance(value, str) or not value.isidentifier():
            raise UsageError(f"scheduler={value}: wanted the name of a diffusers scheduler class, or {AS_IS}.")
        return value

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        if context.facts.scheduler not in SLOW:
            return (AS_IS,)
        return (AS_IS, *(name for name in FAST if self.refuse(name, context) is None))

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == AS_IS else "lossy"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value in (AS_IS, context.facts.scheduler):
            return None
        if not context.facts.inspects_scheduler:
            name = context.facts.class_name
            return f"{name} hands its scheduler arguments that another may not take (no prepare_extra_step_kwargs)"
        if context.facts.learns_variance:
            return f"{context.facts.scheduler} takes the predicted variance off the denoiser's output, {value} does not"
        if value in context.facts.scheduler_compatibles:
            return None
        return f"{value} is not among the schedulers that take the config of {context.facts.scheduler}"

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        return AS_IS if value == context.facts.scheduler else value

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        if value in (AS_IS, site.facts.scheduler):
            return live.nothing
        import diffusers

        def change() -> None:
            site.pipe.scheduler = getattr(diffusers, str(value)).from_config(site.pipe.scheduler.config)

        return live.reversible(site, change)

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == AS_IS:
            return ()
        return (f"pipe.scheduler = diffusers.{value}.from_config(pipe.scheduler.config)",)


class Steps(Knob):
    """Denoising steps; 0 is what the workload or the pipeline asks for. Handed to the call by ``plan.run``."""

    name = "steps"
    stage = 8
    conditional = (FEW_STEPS,)

    def check(self, value: KnobValue) -> KnobValue:
        return as_count(self.name, value, least=0)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        planned = planned_steps(context)
        fewer = context.facts.scheduler in SLOW and planned is not None and planned > FAST_STEPS
        return (0, FAST_STEPS) if fewer else (0,)

    def quality(self, value: KnobValue, context: Context) -> Quality:
        return "exact" if value == 0 else "lossy"

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        planned = planned_steps(context)
        if value and planned is None:
            return f"{context.facts.class_name} has no num_inference_steps to change"
        if value and planned is not None and int(value) > planned:
            return f"{value} steps are more than the {planned} planned"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        return 0 if value == planned_steps(context) else value

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        """Fewer steps only with a solver of higher order."""
        fast = settings.get("scheduler") in FAST or context.facts.scheduler in FAST
        return FEW_STEPS if value and not fast else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        planned = planned_steps(context)
        return recipe.but(steps_factor=int(value) / planned) if value and planned else recipe

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        return live.nothing

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        return (f"# call pipe(..., num_inference_steps={value})",) if value else ()


def planned_steps(context: Context) -> int | None:
    """Steps of the workload, else the default of the pipeline's call."""
    return context.workload.num_inference_steps or context.facts.default_steps
