"""``batch_split``: the batch in several pipeline calls. Applied by ``plan.run``, not by changing the pipeline."""

from __future__ import annotations

from planner.knobs.base import Context, Knob, Site, Undo
from planner.knobs.words import as_count
from planner.recipe import Recipe
from planner.types import KnobValue


class BatchSplit(Knob):
    """Calls per batch; divisors of the batch size, so that every call has the same shapes."""

    name = "batch_split"
    stage = 10

    def check(self, value: KnobValue) -> KnobValue:
        return as_count(self.name, value)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        batch = context.workload.batch_size
        return tuple(calls for calls in range(1, batch + 1) if batch % calls == 0 and self.refuse(calls, context) is None)

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        calls, batch = int(value), context.workload.batch_size
        if calls == 1:
            return None
        if context.facts.batch_argument is None:
            return f"{context.facts.class_name} has no argument for a number of images, so its batch cannot be split"
        if batch % calls:
            return f"a batch of {batch} does not split into {calls} equal calls"
        return None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(calls=int(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live

        return live.nothing

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == 1:
            return ()
        share = context.workload.batch_size // int(value)
        return (f"# call pipe(...) {value} times with {context.facts.batch_argument}={share}",)
