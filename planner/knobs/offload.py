"""``offload`` and its options: which weights wait in host memory, or on disk, until they are needed."""

from __future__ import annotations

from typing import Literal

from planner.facts import ComponentFacts
from planner.knobs.base import Conflict, Context, Knob, Site, Switch, Undo
from planner.knobs.words import as_count, as_word
from planner.recipe import Recipe
from planner.types import KnobValue, Settings

OFFLOADS = ("none", "model", "sequential", "group_block", "group_leaf")
GROUP = frozenset({"group_block", "group_leaf"})
PIPELINE_UTILS = "diffusers 0.42.1 pipelines/pipeline_utils.py"
GROUP_OFFLOADING = "diffusers 0.42.1 hooks/group_offloading.py"
UNWRITABLE = Conflict(
    values=frozenset({True}),
    other="quantization",
    other_values=frozenset({"any scheme"}),
    verdict="fails",
    reason="safetensors files cannot hold quantized tensors",
    source=f"{GROUP_OFFLOADING} ModuleGroup._check_disk_offload_torchao; tried",
)
GroupType = Literal["block_level", "leaf_level"]


class Offload(Knob):
    """``none`` moves every component to the device; the others keep them in host memory between uses."""

    name = "offload"
    stage = 80

    def check(self, value: KnobValue) -> KnobValue:
        return as_word(self.name, value, OFFLOADS)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        now = context.facts.offload
        return (now, *(value for value in OFFLOADS if value != now and self.refuse(value, context) is None))

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        facts = context.facts
        if value == facts.offload:
            return None
        if facts.offload != "none":
            return f"the pipeline already runs under {facts.offload} offload; remove its hooks before planning another"
        if context.device.kind == "cpu":
            return "the weights already are where they are computed: on the CPU"
        if value == "model" and not set(facts.offload_sequence) & {part.name for part in facts.components}:
            return f"{facts.class_name} sets no model_cpu_offload_seq, without which enable_model_cpu_offload raises ({PIPELINE_UTILS})"
        if value == "sequential":
            return _refuse_sequential(context)
        return _refuse_group(str(value), context) if value in GROUP else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        if value not in GROUP:
            return recipe.but(offload=value)
        kept = {part.name for part in context.facts.components if group_type(part, str(value)) is None}
        return recipe.but(offload=value, resident=recipe.resident | kept)

    def apply(self, site: Site, value: KnobValue) -> Undo:
        from planner.knobs import live, live_offload

        if value == site.facts.offload and value != "none":
            return live.nothing
        if value == "none":
            return live_offload.move(site)
        if value in GROUP:
            return live_offload.group(site, str(value))
        return live_offload.whole(site, sequential=value == "sequential")

    def to_python(self, value: KnobValue, context: Context) -> tuple[str, ...]:
        if value == context.facts.offload and value != "none":
            return ()
        device = context.device.kind
        if value == "none":
            return (f'pipe.to("{device}")',)
        if value in GROUP:
            return self.statements(value, {self.name: value}, context)
        return (f'pipe.enable_{value}_cpu_offload(device="{device}")',)

    def statements(self, value: KnobValue, settings: Settings, context: Context) -> tuple[str, ...]:
        if context.facts.offload != "none" or value not in (*GROUP, "sequential"):
            return self.to_python(value, context)
        kept = sorted(kept_by(settings))
        if value == "sequential":
            excluded = (f"pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, {', '.join(map(repr, kept))}]",)
            return (*(excluded if kept else ()), *self.to_python(value, context))
        return tuple(_group_statement(part, str(value), settings, context) for part in context.facts.components)


class OffloadStream(Switch):
    """Group offload copies the next group on a second stream while this one computes; pins a copy in host memory."""

    name = "offload_stream"
    stage = 81

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if value and context.device.kind != "cuda":
            return f"{context.device.name} has no streams; group_offloading.py raises on one without"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        return value if settings.get("offload") in GROUP and context.facts.offload == "none" else False

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(offload_stream=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        return _part_of_offload()


class OffloadBlocks(Knob):
    """Blocks that group offload moves at a time. A stream forces one (group_offloading.py:726)."""

    name = "offload_blocks"
    stage = 82

    def check(self, value: KnobValue) -> KnobValue:
        return as_count(self.name, value)

    def values(self, context: Context) -> tuple[KnobValue, ...]:
        blocks = max((len(part.block_paths) for part in context.facts.components), default=0)
        if context.device.kind == "cpu" or context.facts.offload != "none":
            return (1,)
        return (1, *(count for count in (2, 4, 8) if count < blocks))

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        grouped = settings.get("offload") == "group_block" and context.facts.offload == "none"
        return value if grouped and not settings.get("offload_stream") else 1

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(offload_blocks=int(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        return _part_of_offload()


class OffloadDisk(Switch):
    """Group offload keeps the weights in files instead of host memory: a fresh directory per component and plan.

    Components with tied weights stay in host memory: diffusers would write the second of two groups that share a
    tensor after emptying it for the first (``ModuleGroup._offload_to_disk``; tried).
    """

    name = "offload_disk"
    stage = 83
    conditional = (UNWRITABLE,)

    def refuse(self, value: KnobValue, context: Context) -> str | None:
        if not value:
            return None
        if context.device.kind != "cuda":
            return "group offload to disk loads straight to a CUDA device; safetensors knows no other here"
        quantized = [part.name for part in context.facts.components if part.quantization]
        if quantized:
            return f"{quantized[0]}: quantized weights cannot be written to safetensors files ({GROUP_OFFLOADING})"
        return None

    def settle(self, value: KnobValue, settings: Settings, context: Context) -> KnobValue:
        return value if settings.get("offload") in GROUP and context.facts.offload == "none" else False

    def clash(self, value: KnobValue, settings: Settings, context: Context) -> Conflict | None:
        return UNWRITABLE if value and settings.get("quantization", "none") != "none" else None

    def shape(self, recipe: Recipe, value: KnobValue, context: Context) -> Recipe:
        return recipe.but(offload_disk=bool(value))

    def apply(self, site: Site, value: KnobValue) -> Undo:
        return _part_of_offload()


def group_type(component: ComponentFacts, offload: str) -> GroupType | None:
    """How group offload treats a component: by blocks, by leaves, or None: it stays on the device.

    By blocks only where every entry point is covered: a VAE without ``_group_offload_block_modules`` breaks in
    ``decode`` (diffusers#11086), and the blocks of text encoders are not direct children, so all of one would move at
    once. Those go by leaves.
    """
    if not component.supports_group_offloading or component.quantization in ("quanto",):
        return None
    if offload != "group_block" or not component.block_paths or component.library != "diffusers":
        return "leaf_level"
    if component.role in ("vae", "other") and not component.group_block_modules:
        return "leaf_level"
    return "block_level"


def kept_by(settings: Settings) -> frozenset[str]:
    """Components that ``offload_keep`` names."""
    return frozenset(str(settings.get("offload_keep", "none")).split(",")) - {"none"}


def _group_statement(part: ComponentFacts, value: str, settings: Settings, context: Context) -> str:
    kind, device = None if part.name in kept_by(settings) else group_type(part, value), context.device.kind
    if kind is None:
        return f'pipe.{part.name}.to("{device}")'
    options = f'onload_device=torch.device("{device}"), offload_type="{kind}"'
    if kind == "block_level":
        options += f", num_blocks_per_group={settings.get('offload_blocks', 1)}"
    if settings.get("offload_stream"):
        options += ", use_stream=True"
    if settings.get("offload_disk") and not part.tied_weights:
        options += ", offload_to_disk_path=tempfile.mkdtemp()"
    return f"diffusers.hooks.apply_group_offloading(pipe.{part.name}, {options})"


def _refuse_sequential(context: Context) -> str | None:
    for part in context.facts.components:
        if part.quantization in ("gguf", "bitsandbytes", "quanto"):
            return f"{part.name}: {part.quantization} weights break sequential offload (diffusers#14691, #10800, #10526)"
    return None


def _refuse_group(value: str, context: Context) -> str | None:
    types = [group_type(part, value) for part in context.facts.components if part.role == "denoiser"]
    if value == "group_block" and "block_level" not in types:
        return f"no denoiser of {context.facts.class_name} has blocks that diffusers offloads"
    if not any(types):
        return f"no denoiser of {context.facts.class_name} supports group offload"
    return None


def _part_of_offload() -> Undo:
    """The options are put in force by ``offload`` itself."""
    from planner.knobs import live

    return live.nothing
