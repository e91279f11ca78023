"""Which weights are on the device when, and what is copied, for each offload strategy as diffusers and accelerate do it."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from planner.cost.quantized import IMMOVABLE, leaf_bytes
from planner.dryrun.trace import CallTrace, Ints, PipelineTrace
from planner.facts import ComponentFacts, PipelineFacts
from planner.recipe import Recipe
from planner.types import DTYPE_BYTES

_WINDOWED = ("sequential", "group_block", "group_leaf")


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
    extra: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Known:
    """What was found out about single components, for one pipeline's facts: most recipes treat most components alike."""

    totals: dict[object, int] = field(default_factory=dict)
    plans: dict[object, WindowPlan] = field(default_factory=dict)
    passages: dict[object, tuple[CallTrace, Passage]] = field(default_factory=dict)
    """Kept with the call, so that its id stays its own."""


def component_bytes(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, known: Known | None = None) -> dict[str, int]:
    """Weight bytes of every component at rest, in the trace's dtype, quantized or fused as the recipe says."""
    known, resting = known or Known(), resting_bytes(facts, trace)
    found = {}
    for part in facts.components:
        key = (part.name, resting[part.name], recipe.weights.get(part.name))
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
    if component.quantization or component.dtype == dtype:
        return component.weight_bytes
    return round(component.weight_bytes * DTYPE_BYTES.get(dtype, 4) / DTYPE_BYTES.get(component.dtype, 4))


def _stored_total(component: ComponentFacts, size: int, recipe: Recipe) -> int:
    """Stored bytes of a component that weighs ``size`` unquantized; a tensor of several modules counts once."""
    scheme = recipe.weights.get(component.name)
    if scheme is None or not component.leaves:
        return size
    scale = size / component.weight_bytes if component.weight_bytes else 1.0
    return sum(leaf_bytes(component, scheme, scale)) - round(tied_bytes(component) * scale)


def tied_bytes(component: ComponentFacts) -> int:
    """Bytes that the leaves count more than once because a tensor belongs to several modules."""
    return max(sum(leaf.bytes for leaf in component.leaves) - component.weight_bytes, 0)


def residency(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, known: Known | None = None) -> Residency:
    """Simulate the recipe's offload strategy over the calls that the pipeline really made, in their order.

    ``known`` carries what was found out about single components from one recipe of this pipeline to the next.
    """
    known = known or Known()
    sizes = component_bytes(facts, trace, recipe, known)
    if recipe.offload == "model":
        return _model_offload(facts, trace, sizes, {name for name, scheme in recipe.weights.items() if scheme in IMMOVABLE})
    if any(recipe.of(part.name).offload in _WINDOWED for part in facts.components):
        return _windowed(facts, trace, recipe, sizes, known)
    return _all_resident(facts, trace, sizes)


def _upcast_bytes(trace: PipelineTrace, sizes: Mapping[str, int], recipe_weights: int = 0) -> list[int]:
    """Per distinct call, what the running component weighs above its bytes at rest (an upcast VAE)."""
    out = [0] * len(trace.calls)
    least: dict[str, int] = {}
    for event in trace.events:
        name = trace.calls[event.call].component
        least[name] = min(least.get(name, event.weight_bytes), event.weight_bytes)
    for event in trace.events:
        name = trace.calls[event.call].component
        out[event.call] = max(out[event.call], event.weight_bytes - least[name])
    return out


def _all_resident(facts: PipelineFacts, trace: PipelineTrace, sizes: Mapping[str, int]) -> Residency:
    total = sum(sizes.values())
    resident = tuple(total + extra for extra in _upcast_bytes(trace, sizes))
    none = (0,) * len(trace.calls)
    return Residency(resident, (None,) * len(trace.calls), none, none, none, total, 0, 0)


def _model_offload(facts: PipelineFacts, trace: PipelineTrace, sizes: Mapping[str, int], immovable: Set[str]) -> Residency:
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
    upcast = _upcast_bytes(trace, sizes)
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
    left = sum(sizes[name] for name in on_device - always)
    if count and trace.events:
        offload[trace.events[-1].call] += left  # maybe_free_model_hooks at the end of the call
    host = sum(size for name, size in sizes.items() if name not in always)
    return Residency(tuple(resident), (None,) * count, tuple(onload), tuple(offload), tuple(moves),
                     sum(sizes[name] for name in always), host, 0)  # fmt: skip


def _windowed(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, sizes: Mapping[str, int], known: Known) -> Residency:
    """Sequential and group offload: what the running component holds moves with the module that runs."""
    count = len(trace.calls)
    moving = {part.name: part for part in facts.components if _moves(facts, part, recipe)}
    resting = resting_bytes(facts, trace)
    keys = {name: _plan_key(name, recipe, resting[name]) for name in moving}
    for name in moving:
        if keys[name] not in known.plans:
            known.plans[keys[name]] = window_plan(moving[name], recipe, resting[name], name in recipe.only)
    plans = {name: known.plans[keys[name]] for name in moving}
    fixed = sum(plan.fixed_bytes for plan in plans.values())
    base = sum(size for name, size in sizes.items() if name not in moving) + fixed
    upcast = _upcast_bytes(trace, sizes)
    windows: list[Ints | None] = []
    onload, offload, moves, resident = [0] * count, [0] * count, [0] * count, [base] * count
    for index, call in enumerate(trace.calls):
        plan = plans.get(call.component)
        if plan is None:
            windows.append(None)
            resident[index] += upcast[index]
            continue
        size = sizes[call.component]
        passage = _passage(plan, keys[call.component], call, (size + upcast[index]) / size if size else 1.0, known)
        windows.append(passage.window)
        times = trace.count(index)
        onload[index], moves[index] = passage.loaded_bytes * times, passage.moves * times
        offload[index] = passage.loaded_bytes * times if plan.copies_back else 0
    host = sum(sizes[name] for name in moving)
    pinned = sum(plan.pinned_bytes for plan in plans.values())
    return Residency(tuple(resident), tuple(windows), tuple(onload), tuple(offload), tuple(moves), base, host + pinned, pinned)


def _plan_key(name: str, recipe: Recipe, size: int) -> tuple[object, ...]:
    """All that :func:`window_plan` looks at."""
    own = recipe.of(name)
    return name, size, own.offload, own.offload_stream, own.offload_blocks, recipe.weights.get(name), name in recipe.only


def _passage(plan: WindowPlan, plan_key: object, call: CallTrace, scale: float, known: Known) -> Passage:
    key = (plan_key, id(call), scale)
    if key not in known.passages:
        known.passages[key] = call, plan.over(call, scale)
    return known.passages[key][1]


def _moves(facts: PipelineFacts, component: ComponentFacts, recipe: Recipe) -> bool:
    kept = component.name in recipe.resident and component.name not in recipe.only
    return recipe.of(component.name).offload in _WINDOWED and not kept and component.name not in facts.excluded_from_offload


@dataclass(frozen=True, slots=True)
class Passage:
    """One call under a moving window: bytes on the device per operation, bytes loaded and modules moved in all."""

    window: Ints
    loaded_bytes: int
    moves: int


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Units that move together, by the module whose call brings them in; they stay until that call returns."""

    units: Mapping[str, tuple[int, int]]
    """Module path to (number of the group, its bytes). A module's own tensors come in while its children run, too."""
    fixed_bytes: int
    """On the device all the time: buffers under sequential offload."""
    ahead: bool
    """The next unit is loaded while one runs (prefetch on a stream); known after a first ``forward``, never for ``decode``."""
    copies_back: bool
    pinned_bytes: int
    nested: bool = False
    """Blocks of named parts, each of which has a ``forward`` of its own whatever the component's entry point."""

    def over(self, call: CallTrace, scale: float = 1.0) -> Passage:
        """What one call holds and loads; ``scale`` is for weights that were cast since the facts were read."""
        chains = [self._chain(path) for path in call.modules]
        used = np.array([sum(size for _, size in chain) for chain in chains] + [0], dtype=np.float64)
        order = call.module if len(call) else np.zeros(0, np.int64)
        runs = _runs(order)
        window = used[order] if len(order) else np.zeros(0)
        entered = _entered([chains[module] for module in order[runs]] if len(order) else [])
        if self.ahead and (call.method == "forward" or self.nested) and len(order):
            following = np.array([*(max((size for _, size in new), default=0) for new in entered[1:]), 0], dtype=np.float64)
            lengths = np.diff([*runs.tolist(), len(order)])
            window = window + np.repeat(_next_nonzero(following), lengths)
        loaded = sum(size for new in entered for _, size in new)
        return Passage((window * scale).astype(np.int64), round(loaded * scale), sum(len(new) for new in entered))

    def _chain(self, path: str) -> tuple[tuple[int, int], ...]:
        """Groups of the module and of all modules around it."""
        found: dict[int, int] = {}
        parts = path.split(".") if path else []
        for length in range(len(parts) + 1):
            unit = self.units.get(".".join(parts[:length]))
            if unit is not None:
                found[unit[0]] = unit[1]
        return tuple(found.items())


def _runs(order: Ints) -> Ints:
    """Starts of the stretches in which one module runs."""
    return np.flatnonzero(np.diff(order, prepend=-1)) if len(order) else np.zeros(0, np.int64)


def _entered(chains: list[tuple[tuple[int, int], ...]]) -> list[tuple[tuple[int, int], ...]]:
    """Per stretch, the groups that were not there in the stretch before."""
    out, before = [], frozenset[int]()
    for chain in chains:
        out.append(tuple(unit for unit in chain if unit[0] not in before))
        before = frozenset(number for number, _ in chain)
    return out


def _next_nonzero(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each place the first value from there on that is not zero."""
    out = values.copy()
    for place in range(len(out) - 2, -1, -1):
        out[place] = values[place] or out[place + 1]
    return out


def window_plan(component: ComponentFacts, recipe: Recipe, size: int, literal: bool = False) -> WindowPlan:
    """The units that sequential, leaf or block offload moves in one component that weighs ``size`` bytes unquantized.

    ``literal``: block level as diffusers alone would do it; the planner takes leaves where blocks do not cover a component.
    """
    own = recipe.of(component.name)
    stream = own.offload_stream and own.offload in ("group_block", "group_leaf")
    bytes_of = _scaled_leaves(component, recipe, size)
    fixed = _fixed_buffers(component, size) if own.offload == "sequential" else {}
    by_block = own.offload == "group_block" and (literal or moves_by_block(component))
    if by_block:
        units = _block_units(component, bytes_of, 1 if stream else max(own.offload_blocks, 1))
    else:
        units = {path: (number, leaf - fixed.get(path, 0)) for number, (path, leaf) in enumerate(bytes_of.items())}
    pinned = sum(1 << max(leaf - 1, 1).bit_length() for leaf in bytes_of.values() if leaf) if stream else 0
    return WindowPlan(units, sum(fixed.values()), stream, own.offload != "sequential" and not stream, pinned,
                      by_block and bool(component.group_block_modules))  # fmt: skip


def _fixed_buffers(component: ComponentFacts, size: int) -> dict[str, int]:
    """Buffers that sequential offload leaves on the device: where the top module owns parameters, those in no state dict.

    Source: diffusers enable_sequential_cpu_offload, ``offload_buffers=len(model._parameters) > 0``; accelerate
    AlignDevicesHook.init_hook.
    """
    scale = size / component.weight_bytes if component.weight_bytes else 1.0
    takes_along = any(leaf.path == "" and leaf.bytes > leaf.buffer_bytes for leaf in component.leaves)
    fixed = {leaf.path: leaf.unsaved_buffer_bytes if takes_along else leaf.buffer_bytes for leaf in component.leaves}
    return {path: round(size * scale) for path, size in fixed.items() if size}


def moves_by_block(component: ComponentFacts) -> bool:
    """Whether block-level group offload covers every entry point; other components go by leaves (knobs/offload.py)."""
    covered = component.role not in ("vae", "other") or bool(component.group_block_modules)
    return bool(component.block_paths) and component.library == "diffusers" and covered


def _scaled_leaves(component: ComponentFacts, recipe: Recipe, size: int) -> dict[str, int]:
    scale = size / component.weight_bytes if component.weight_bytes else 1.0
    stored = leaf_bytes(component, recipe.weights.get(component.name), scale)
    return {leaf.path: bytes_ for leaf, bytes_ in zip(component.leaves, stored, strict=True)}


def _block_units(component: ComponentFacts, bytes_of: Mapping[str, int], width: int) -> dict[str, tuple[int, int]]:
    """Groups of ``width`` neighbouring blocks, brought in by any of them; the rest comes and goes with the module around it.

    Buffers of that rest are there twice: ``Module.to`` replaces a buffer, and the group keeps moving the one it knew.
    """
    grouped: dict[str, int] = {}
    rest: dict[str, int] = {}
    twice = {leaf.path: leaf.buffer_bytes for leaf in component.leaves if leaf.path}
    for path, size in bytes_of.items():
        block = next((prefix for prefix in component.block_paths if path == prefix or path.startswith(prefix + ".")), None)
        if block is None:
            around = _named_around(component, path)
            rest[around] = rest.get(around, 0) + size + twice.get(path, 0) * (path != around)
        else:
            grouped[block] = grouped.get(block, 0) + size
    if "" in rest:
        rest[""] = max(rest[""] - tied_bytes(component), 0)
    units = {around: (number, size) for number, (around, size) in enumerate(rest.items())}
    lists: dict[str, list[str]] = {}
    for block in component.block_paths:
        lists.setdefault(block.rpartition(".")[0], []).append(block)
    number = len(units)
    for blocks in lists.values():
        for start in range(0, len(blocks), width):
            group = blocks[start : start + width]
            number += 1
            units |= {block: (number, sum(grouped.get(each, 0) for each in group)) for block in group}
    return units


def _named_around(component: ComponentFacts, path: str) -> str:
    """The innermost of the class's ``_group_offload_block_modules`` that a module lies in: each is split by itself."""
    parts = path.split(".") if path else []
    depth = 0
    while depth < len(parts) and parts[depth] in component.group_block_modules:
        depth += 1
    return ".".join(parts[:depth])
