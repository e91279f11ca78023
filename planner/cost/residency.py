"""Which weights are on the device when, and what is copied, for each offload strategy as diffusers and accelerate do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.cost.kernels import stored_share
from planner.dryrun.trace import CallTrace, Ints, PipelineTrace
from planner.facts import ComponentFacts, PipelineFacts
from planner.recipe import Recipe
from planner.types import DTYPE_BYTES


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


def component_bytes(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe) -> dict[str, int]:
    """Weight bytes of every component at rest, in the trace's dtype, quantized or fused as the recipe says."""
    seen: dict[str, int] = {}
    for event in trace.events:
        name = trace.calls[event.call].component
        seen[name] = min(seen.get(name, event.weight_bytes), event.weight_bytes)
    out = {}
    for component in facts.components:
        size = seen.get(component.name) or _cast_bytes(component, trace.dtype)
        out[component.name] = quantized_bytes(component, size, recipe.weights.get(component.name), trace.dtype)
    return out


def _cast_bytes(component: ComponentFacts, dtype: str) -> int:
    if component.quantization or component.dtype == dtype:
        return component.weight_bytes
    return round(component.weight_bytes * DTYPE_BYTES.get(dtype, 4) / DTYPE_BYTES.get(component.dtype, 4))


def quantized_bytes(component: ComponentFacts, size: int, scheme: str | None, dtype: str) -> int:
    """Bytes after quantizing the linear weights (all weights for layerwise fp8 storage)."""
    if scheme is None or scheme == "none":
        return size
    parameters = component.parameters if scheme == "fp8_layerwise" else component.linear_parameters
    saved = parameters * DTYPE_BYTES.get(dtype, 2) - parameters * 2 * stored_share(scheme)
    return max(int(size - saved), 0)


def residency(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe) -> Residency:
    """Simulate the recipe's offload strategy over the calls that the pipeline really made, in their order."""
    sizes = component_bytes(facts, trace, recipe)
    if recipe.offload == "none":
        return _all_resident(facts, trace, sizes)
    if recipe.offload == "model":
        return _model_offload(facts, trace, sizes)
    return _windowed(facts, trace, recipe, sizes)


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


def _model_offload(facts: PipelineFacts, trace: PipelineTrace, sizes: Mapping[str, int]) -> Residency:
    """accelerate's hook chain: a component that runs sends its predecessor in the chain back and comes over itself.

    Source: diffusers ``DiffusionPipeline.enable_model_cpu_offload`` and accelerate ``CpuOffload``. Components outside the
    chain are loaded at first use and stay until the call ends; excluded ones are always resident.
    """
    chain = [name for name in facts.offload_sequence if name in sizes]
    predecessor = {name: chain[index - 1] for index, name in enumerate(chain) if index}
    always = {name for name in facts.excluded_from_offload if name in sizes}
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


def _windowed(facts: PipelineFacts, trace: PipelineTrace, recipe: Recipe, sizes: Mapping[str, int]) -> Residency:
    """Sequential and group offload: what the running component holds moves with the operation that runs."""
    count = len(trace.calls)
    kept = {name for name in sizes if name in recipe.resident or name in facts.excluded_from_offload}
    base = sum(sizes[name] for name in kept)
    windows: list[Ints | None] = []
    onload, offload, moves, resident = [0] * count, [0] * count, [0] * count, [base] * count
    upcast = _upcast_bytes(trace, sizes)
    plans: dict[str, WindowPlan] = {}
    for index, call in enumerate(trace.calls):
        name = call.component
        if name in kept or name not in sizes:
            windows.append(None)
            resident[index] += upcast[index]
            continue
        plan = plans.setdefault(name, window_plan(facts.component(name), recipe, sizes[name]))
        window, used_bytes, used_units = plan.over(call, sizes[name] + upcast[index])
        windows.append(window)
        times = trace.count(index)
        onload[index] = used_bytes * times
        moves[index] = used_units * times
        copies_back = recipe.offload in ("group_block", "group_leaf") and not recipe.offload_stream
        offload[index] = used_bytes * times if copies_back else 0
    host = sum(size for name, size in sizes.items() if name not in kept)
    pinned = _power_of_two_sum(facts, sizes, kept) if recipe.offload_stream else 0
    return Residency(tuple(resident), tuple(windows), tuple(onload), tuple(offload), tuple(moves), base, host + pinned, pinned)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Units that move together: module path prefix to bytes, and what stays for the whole call."""

    units: tuple[tuple[str, int], ...]
    always_bytes: int
    ahead: int
    """Units loaded before they are needed (prefetch on a stream)."""
    total_bytes: int

    def over(self, call: CallTrace, weight_bytes: int) -> tuple[Ints, int, int]:
        """Bytes on the device per operation, bytes loaded by one call and units moved by it."""
        scale = weight_bytes / self.total_bytes if self.total_bytes else 1.0
        unit_of = self._units_of(call.modules)[call.module] if len(call) else np.zeros(0, np.int64)
        sizes = np.array([size for _, size in self.units] + [0], dtype=np.float64)
        order = _forward_fill(unit_of)
        window = np.where(order >= 0, sizes[order], 0.0)
        for step in range(1, self.ahead + 1):
            following = np.where(order >= 0, np.minimum(order + step, len(self.units)), len(self.units))
            window = window + sizes[following]
        used = sorted({int(unit) for unit in unit_of if unit >= 0})
        loaded = self.always_bytes + sum(self.units[unit][1] for unit in used)
        return ((window + self.always_bytes) * scale).astype(np.int64), round(loaded * scale), len(used) + (1 if self.always_bytes else 0)

    def _units_of(self, paths: tuple[str, ...]) -> Ints:
        """The innermost unit that each module path belongs to, or -1."""
        places = {prefix: index for index, (prefix, _) in enumerate(self.units)}
        out = np.full(len(paths), -1, dtype=np.int64)
        for row, path in enumerate(paths):
            prefix = path
            while prefix not in places and "." in prefix:
                prefix = prefix.rpartition(".")[0]
            out[row] = places.get(prefix, -1)
        return out


def _forward_fill(units: Ints) -> Ints:
    """Between two units the earlier one is gone already: operations outside any unit hold none."""
    return units


def window_plan(component: ComponentFacts, recipe: Recipe, size: int) -> WindowPlan:
    """The units that sequential, leaf or block offload moves in one component."""
    leaves = [(leaf.path, leaf.bytes) for leaf in component.leaves]
    total = sum(bytes_ for _, bytes_ in leaves)
    by_block = recipe.offload == "group_block" and component.block_paths and component.role != "vae"
    if not by_block:
        return WindowPlan(tuple(leaves), 0, 1 if recipe.offload_stream else 0, total)
    blocks = list(component.block_paths)
    grouped: dict[str, int] = {}
    rest = 0
    width = 1 if recipe.offload_stream else max(recipe.offload_blocks, 1)
    for path, bytes_ in leaves:
        block = next((prefix for prefix in blocks if path == prefix or path.startswith(prefix + ".")), None)
        if block is None:
            rest += bytes_
        else:
            grouped[block] = grouped.get(block, 0) + bytes_
    units = [(block, grouped[block]) for block in blocks if block in grouped]
    if width > 1:
        units = _widened(units, width)
    return WindowPlan(tuple(units), rest, 1 if recipe.offload_stream else 0, total)


def _widened(units: list[tuple[str, int]], width: int) -> list[tuple[str, int]]:
    """Every block of a group holds the whole group while it runs."""
    out = []
    for start in range(0, len(units), width):
        group = units[start : start + width]
        size = sum(bytes_ for _, bytes_ in group)
        out += [(path, size) for path, _ in group]
    return out


def _power_of_two_sum(facts: PipelineFacts, sizes: Mapping[str, int], kept: set[str]) -> int:
    """torch's pinned-memory cache rounds each block up to a power of two (ATen CachingHostAllocator)."""
    total = 0
    for component in facts.components:
        if component.name in kept or component.name not in sizes:
            continue
        raw = sum(leaf.bytes for leaf in component.leaves)
        scale = sizes[component.name] / raw if raw else 1.0
        total += sum(1 << max(round(leaf.bytes * scale) - 1, 1).bit_length() for leaf in component.leaves if leaf.bytes)
    return total
