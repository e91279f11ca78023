"""Which weights are on the device when, and what is copied, for each offload strategy as diffusers and accelerate do it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from planner.cost.condense import repeats
from planner.cost.quantized import IMMOVABLE, fused_bytes, leaf_bytes
from planner.cost.windows import Passage, WindowPlan, tied_bytes, window_plan
from planner.dryrun.trace import CallTrace, Ints, PipelineTrace, VaeMode
from planner.dtypes import parse_dtypes
from planner.facts import ComponentFacts, PipelineFacts
from planner.recipe import Recipe
from planner.types import DTYPE_BYTES, DTYPES

if TYPE_CHECKING:
    from planner.cost.reserved import Reserved

_GROUPED = ("group_block", "group_leaf")
_WINDOWED = ("sequential", *_GROUPED)


@dataclass(frozen=True, slots=True)
class Residency:
    """Weights through one pipeline call.

    ``resident_bytes``: per distinct call, the most weight bytes on the device besides a moving window (see ``window``).
    ``window``: per distinct call under sequential and group offload, the moving part per operation, else None.
    ``onload_bytes``/``offload_bytes``: copied to and from the device over the whole pipeline call, per distinct call.
    ``moves``: modules moved, per distinct call. ``host_bytes``, ``pinned_bytes``: weights kept on the host.
    """

    resident_bytes: tuple[int, ...]
    window: tuple[Ints | None, ...]
    onload_bytes: tuple[int, ...]
    offload_bytes: tuple[int, ...]
    moves: tuple[int, ...]
    rest_bytes: int
    """On the device between calls of the pipeline."""
    host_bytes: int
    pinned_bytes: int
    disk_bytes: Mapping[str, int] = field(default_factory=dict)
    """By component: weights that wait in files, not on the host."""


@dataclass(frozen=True, slots=True)
class Events:
    """What a trace's events say of weights. ``upcast_bytes``: per distinct call, what the running component weighs above its
    bytes at rest (an upcast VAE). ``counts``: how often each distinct call is made."""

    trace: PipelineTrace
    resting: dict[str, int]
    upcast_bytes: tuple[int, ...]
    counts: tuple[int, ...]
    calls_of: dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Moved:
    """What one moving component adds. ``calls``: index, window, bytes onloaded and offloaded and modules moved, by distinct call."""

    fixed_bytes: int
    pinned_bytes: int
    calls: tuple[tuple[int, Ints, int, int, int], ...]


@dataclass(slots=True)
class Known:
    """What was found out about one pipeline's traces, whatever the device: most recipes treat most components alike."""

    totals: dict[object, int] = field(default_factory=dict)
    plans: dict[object, WindowPlan] = field(default_factory=dict)
    passages: dict[object, Passage] = field(default_factory=dict)
    orders: dict[int, tuple[CallTrace, int]] = field(default_factory=dict)
    """By id of a call: the number of the order in which its modules run, which calls of other dtypes and batches share."""
    numbers: dict[object, int] = field(default_factory=dict)
    events: dict[int, Events] = field(default_factory=dict)
    moved: dict[object, _Moved] = field(default_factory=dict)
    residencies: dict[object, Residency] = field(default_factory=dict)
    condensed: dict[int, tuple[CallTrace, Ints]] = field(default_factory=dict)
    held: dict[int, tuple[list[int], list[int], int]] = field(default_factory=dict)
    most_live: dict[object, Ints] = field(default_factory=dict)
    replays: dict[object, Reserved] = field(default_factory=dict)
    """What :mod:`planner.cost.reserved` found for recipes."""
    least: dict[object, int] = field(default_factory=dict)
    things: dict[int, object] = field(default_factory=dict)
    """By id: keys of the tables above are ids of these."""


def component_bytes(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, known: Known | None = None) -> dict[str, int]:
    """Weight bytes of every component at rest, in the trace's dtype, quantized or fused as the recipe says."""
    known = known or Known()
    resting = events_of(facts, trace, known).resting
    found = {}
    for part in facts.components:
        key = (part.name, resting[part.name], recipe.weights.get(part.name), fuses(part, recipe))
        if key not in known.totals:
            known.totals[key] = _stored_total(part, resting[part.name], recipe)
        found[part.name] = known.totals[key]
    return found


def resting_bytes(facts: PipelineFacts, trace: PipelineTrace) -> dict[str, int]:
    """Weight bytes of every component between its calls, before any quantization."""
    seen: dict[str, int] = {}
    for event in trace.events:
        name = trace.calls[event.call].component
        seen[name] = min(seen.get(name, event.weight_bytes), event.weight_bytes)
    return {part.name: seen.get(part.name) or _cast_bytes(part, trace.dtype) for part in facts.components}


def _cast_bytes(component: ComponentFacts, dtype: str) -> int:
    dtype = parse_dtypes(dtype).of(component.name, component.dtype) if dtype in DTYPES or "=" in dtype else dtype
    if component.quantization or component.dtype == dtype:
        return component.weight_bytes
    return round(component.weight_bytes * DTYPE_BYTES.get(dtype, 4) / DTYPE_BYTES.get(component.dtype, 4))


def _stored_total(component: ComponentFacts, size: int, recipe: Recipe) -> int:
    """Stored bytes of a component that weighs ``size`` unquantized; a tensor of several modules counts once."""
    scheme = recipe.weights.get(component.name)
    scale = size / component.weight_bytes if component.weight_bytes else 1.0
    added = sum(fused_bytes(component, scheme, scale)) if fuses(component, recipe) else 0
    if scheme is None or not component.leaves:
        return size + added
    return sum(leaf_bytes(component, scheme, scale)) - round(tied_bytes(component) * scale) + added


def fuses(component: ComponentFacts, recipe: Recipe) -> bool:
    """Whether the component runs with fused projections beside its separate ones."""
    return recipe.of(component.name).fused_qkv and component.role in ("denoiser", "controlnet")


def residency(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, known: Known | None = None) -> Residency:
    """Simulate the recipe's offload strategy over the calls that the pipeline really made, in their order.

    ``known`` carries what was found out about single components from one recipe of this pipeline to the next.
    """
    known = known or Known()
    sizes = component_bytes(facts, trace, recipe, known)
    if recipe.offload == "model":
        immovable = {name for name, scheme in recipe.weights.items() if scheme in IMMOVABLE}
        return _model_offload(facts, trace, sizes, immovable, events_of(facts, trace, known).upcast_bytes)
    if any(recipe.of(part.name).offload in _WINDOWED for part in facts.components):
        return _windowed(facts, trace, recipe, sizes, known)
    return _all_resident(trace, sizes, events_of(facts, trace, known).upcast_bytes)


def events_of(facts: PipelineFacts, trace: PipelineTrace, known: Known) -> Events:
    """What the events of a trace say of weights, read once."""
    found = known.events.get(id(trace))
    if found is None:
        upcast, counts = [0] * len(trace.calls), [0] * len(trace.calls)
        calls_of: dict[str, tuple[int, ...]] = {}
        for index, call in enumerate(trace.calls):
            calls_of[call.component] = (*calls_of.get(call.component, ()), index)
        resting = resting_bytes(facts, trace)
        for event in trace.events:
            least = resting.get(trace.calls[event.call].component, event.weight_bytes)
            upcast[event.call] = max(upcast[event.call], event.weight_bytes - least)
            counts[event.call] += 1
        found = known.events[id(trace)] = Events(trace, resting, tuple(upcast), tuple(counts), calls_of)
    return found


def _all_resident(trace: PipelineTrace, sizes: Mapping[str, int], upcast: tuple[int, ...]) -> Residency:
    total = sum(sizes.values())
    resident = tuple(total + extra for extra in upcast)
    none = (0,) * len(trace.calls)
    return Residency(resident, (None,) * len(trace.calls), none, none, none, total, 0, 0)


def _model_offload(facts: PipelineFacts, trace: PipelineTrace, sizes: Mapping[str, int], immovable: Set[str],
                   upcast: tuple[int, ...]) -> Residency:  # fmt: skip
    """accelerate's hook chain: a component that runs sends its predecessor in the chain back and comes over itself.

    Source: diffusers ``DiffusionPipeline.enable_model_cpu_offload`` and accelerate ``CpuOffload``. Components outside the
    chain are loaded at first use and stay until the call ends; excluded ones are always resident.
    """
    chain = [name for name in facts.offload_sequence if name in sizes]
    predecessor = {name: chain[index - 1] for index, name in enumerate(chain) if index}
    always = {name for name in sizes if name in facts.excluded_from_offload or name in immovable}
    on_device = set(always)
    count = len(trace.calls)
    resident, onload, offload, moves = ([0] * count for _ in range(4))
    for event in trace.events:
        name = trace.calls[event.call].component
        before = predecessor.get(name)
        if before in on_device and before not in always:
            on_device.discard(before)
            offload[event.call] += sizes[before]
            moves[event.call] += 1
        if name in sizes and name not in on_device:
            on_device.add(name)
            onload[event.call] += sizes[name]
            moves[event.call] += 1
        resident[event.call] = max(resident[event.call], sum(sizes[part] for part in on_device) + upcast[event.call])
    if count and trace.events:
        # maybe_free_model_hooks at the end sets all up anew: what is excluded goes to the host with the others, and back.
        passing = sum(sizes[name] for name in always - immovable)
        last = trace.events[-1].call
        offload[last] += sum(sizes[name] for name in on_device - always) + passing
        onload[last] += passing
    host = sum(size for name, size in sizes.items() if name not in always)
    return Residency(tuple(resident), (None,) * count, tuple(onload), tuple(offload), tuple(moves),
                     sum(sizes[name] for name in always), host, 0)  # fmt: skip


def _windowed(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, sizes: Mapping[str, int], known: Known) -> Residency:
    """Sequential and group offload: what the running component holds moves with the module that runs."""
    events, mode = events_of(facts, trace, known), vae_mode(recipe)
    moving = [part for part in facts.components if _moves(facts, part, recipe)]
    moved = []
    for part in moving:
        key = (id(trace), _plan_key(part.name, recipe, events.resting[part.name]), sizes[part.name], mode if part.role == "vae" else None)
        if key not in known.moved:
            known.moved[key] = _moved(facts, trace, part, recipe, sizes[part.name], events, known)
        moved.append(known.moved[key])
    count = len(trace.calls)
    base = sum(sizes.values()) - sum(sizes[part.name] for part in moving) + sum(each.fixed_bytes for each in moved)
    windows: list[Ints | None] = [None] * count
    onload, offload, moves = [0] * count, [0] * count, [0] * count
    filed = {part.name: sizes[part.name] for part in moving if _is_filed(part, recipe)}
    resident = [base + upcast for upcast in events.upcast_bytes]
    pinned = 0
    for part, each in zip(moving, moved, strict=True):
        pinned += 0 if part.name in filed else each.pinned_bytes
        for index, windows[index], onload[index], returned, moves[index] in each.calls:
            offload[index] = 0 if part.name in filed else returned  # what has a file is dropped
            resident[index] = base  # its window has the upcast in it
    host = sum(sizes[part.name] for part in moving) - sum(filed.values())
    return Residency(tuple(resident), tuple(windows), tuple(onload), tuple(offload), tuple(moves), base, host + pinned, pinned, filed)


def _is_filed(component: ComponentFacts, recipe: Recipe) -> bool:
    """Groups whose tensors belong to one module each go to files, and leave nothing on the host (``ModuleGroup._offload_to_disk``)."""
    own = recipe.of(component.name)
    return own.offload_disk and own.offload in _GROUPED and not component.tied_weights


def _moved(facts: PipelineFacts, trace: PipelineTrace, part: ComponentFacts, recipe: Recipe, size: int, events: Events,
           known: Known) -> _Moved:  # fmt: skip
    key = _plan_key(part.name, recipe, events.resting[part.name])
    if key not in known.plans:
        known.plans[key] = window_plan(part, recipe, events.resting[part.name], part.name in recipe.only)
    plan, calls = known.plans[key], []
    for index in events.calls_of.get(part.name, ()):
        scale = (size + events.upcast_bytes[index]) / size if size else 1.0
        passage = _passage(plan, key, variant_of(trace, index, recipe, facts), scale, known)
        times = events.counts[index]
        calls.append((index, passage.window, passage.loaded_bytes * times, passage.returned_bytes * times, passage.moves * times))
    return _Moved(plan.fixed_bytes if calls or not plan.ahead else 0, plan.pinned_bytes, tuple(calls))


def variant_of(trace: PipelineTrace, index: int, recipe: Recipe, facts: PipelineFacts) -> CallTrace:
    """A call as the recipe's VAE mode makes it: slices and tiles bring the VAE's modules in again and again."""
    call, mode = trace.calls[index], vae_mode(recipe)
    if mode is None or all(part.name != call.component for part in facts.of_role("vae")):
        return call
    return trace.variants.get((index, mode.text), call)


def vae_mode(recipe: Recipe) -> VaeMode | None:
    """The VAE mode that a recipe asks for; None when it leaves the VAE as it is."""
    if not recipe.vae_slicing and not recipe.vae_tiling:
        return None
    return VaeMode(slicing=bool(recipe.vae_slicing), tile_pixels=(recipe.vae_tile_pixels or 0) if recipe.vae_tiling else None)


def _plan_key(name: str, recipe: Recipe, size: int) -> tuple[object, ...]:
    """All that :func:`window_plan` looks at."""
    own = recipe.of(name)
    return name, size, own.offload, own.offload_stream, own.offload_blocks, recipe.weights.get(name), name in recipe.only


def _passage(plan: WindowPlan, plan_key: object, call: CallTrace, scale: float, known: Known) -> Passage:
    """Nothing but the order of the modules decides, so one simulation serves most dtypes and shares of a batch."""
    if id(call) not in known.orders:
        order = call.method, call.modules, call.module.tobytes(), repeats(call).tobytes()
        known.orders[id(call)] = call, known.numbers.setdefault(order, len(known.numbers))
    key = (plan_key, known.orders[id(call)][1], scale)
    if key not in known.passages:
        known.passages[key] = plan.over(call, scale)
    return known.passages[key]


def _moves(facts: PipelineFacts, component: ComponentFacts, recipe: Recipe) -> bool:
    """The class's ``_exclude_from_cpu_offload`` binds accelerate's offloading, not group offload (pipeline_utils.py)."""
    own = recipe.of(component.name).offload
    kept = component.name in recipe.resident and component.name not in recipe.only
    kept |= own == "sequential" and component.name in facts.excluded_from_offload
    return own in _WINDOWED and not kept
