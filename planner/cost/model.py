"""The cost model: one recipe's memory, time and host needs, summed phase by phase from the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

from planner.cost.coefficients import Coefficients
from planner.cost.condense import condensed, per_call
from planner.cost.kernels import CallTime, call_time
from planner.cost.quantized import LOADED_ON_DEVICE
from planner.cost.residency import Known, Residency, component_bytes, residency, vae_mode, variant_of
from planner.cost.transfer import transfer_seconds
from planner.cost.workspace import operator_bytes
from planner.dryrun.trace import DTYPE_CODES, CallTrace, Ints, Kind, PipelineTrace, VaeMode
from planner.facts import PipelineFacts
from planner.recipe import Attention, Fusion, Recipe
from planner.types import Device


class TraceSource(Protocol):
    """Where traces come from: :class:`planner.dryrun.provider.Traces`, or a fixed one in tests."""

    @property
    def facts(self) -> PipelineFacts: ...

    def trace(self, dtype: str | None, batch_size: int | None, modes: tuple[VaeMode, ...] = ()) -> PipelineTrace: ...


@dataclass(frozen=True, slots=True)
class CallCost:
    """One distinct component call under one recipe; weights that stay for the whole call are not in it."""

    peak_bytes: int
    activations_bytes: int
    workspace_bytes: int
    window_bytes: int
    time: CallTime


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """One distinct component call with all its repetitions: what a phase line of an explanation shows."""

    call: int
    count: int
    resident_bytes: int
    held_bytes: int
    cost: CallCost
    compute_seconds: float
    transfer_seconds: float
    in_graph: bool

    @property
    def peak_bytes(self) -> int:
        return self.resident_bytes + self.held_bytes + self.cost.peak_bytes

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.transfer_seconds


@dataclass(frozen=True, slots=True)
class AroundCost:
    """What the pipeline itself costs besides its components: its own code, its pictures, and putting the plan in force."""

    glue_peak_bytes: int
    blas_bytes: int
    glue_seconds: float
    host_seconds: float
    setup_seconds: float
    setup_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one candidate costs. Times are of the whole workload (all calls of a split batch)."""

    phases: tuple[PhaseCost, ...]
    glue_peak_bytes: int
    graph_pool_bytes: int
    blas_bytes: int
    glue_seconds: float
    host_seconds: float
    """Pictures from tensors, on the host."""
    setup_seconds: float
    setup_peak_bytes: int
    host_bytes: int
    residency: Residency
    trace: PipelineTrace
    calls: int

    @property
    def peak_bytes(self) -> int:
        """Peak of torch's allocated bytes, setting up included."""
        running = max([phase.peak_bytes for phase in self.phases] + [self.glue_peak_bytes]) + self.blas_bytes
        return max(running, self.setup_peak_bytes)

    @property
    def needed_bytes(self) -> int:
        """What the budget must hold: the peak, what graphs keep in pools of their own meanwhile, or the setting up."""
        outside = [phase.peak_bytes for phase in self.phases if not phase.in_graph] + [self.glue_peak_bytes]
        return max(self.peak_bytes, max(outside) + self.blas_bytes + self.graph_pool_bytes, self.setup_peak_bytes)

    @property
    def seconds(self) -> float:
        """Latency of the workload."""
        return self.calls * (sum(phase.seconds for phase in self.phases) + self.glue_seconds + self.host_seconds)


TIMELESS = frozenset({"fused_qkv", "cudnn_benchmark", "chunked_forward"})
"""Recipe fields that change memory but no predicted time: nothing measured tells how much they gain or cost."""
WEIGHTLESS = frozenset({"tf32", "steps_factor", "denoiser_factor"})
"""Recipe fields that change time but no bytes."""


@dataclass(frozen=True, slots=True)
class Local:
    """What of a recipe one component's cost depends on; equal for all recipes that treat the component alike."""

    attention: Attention
    channels_last: bool
    fusion: Fusion
    cuda_graphs: bool
    autotuned: bool
    tf32: bool
    fused_qkv: bool
    cudnn_benchmark: bool
    settled: bool
    chunked_forward: bool
    scheme: str | None

    @property
    def fused(self) -> bool:
        """Pointwise neighbours are merged into one kernel."""
        return self.fusion in ("whole", "regional")

    def recipe(self) -> Recipe:
        """A recipe for this component alone."""
        return Recipe(attention=self.attention, channels_last=self.channels_last, fusion=self.fusion, cuda_graphs=self.cuda_graphs,
                      autotuned=self.autotuned, tf32=self.tf32, fused_qkv=self.fused_qkv, cudnn_benchmark=self.cudnn_benchmark,
                      settled=self.settled, chunked_forward=self.chunked_forward)  # fmt: skip


@lru_cache(maxsize=4096)
def _for_memory(local: Local) -> Local:
    """What changes memory: of compiling, that it fuses; then weights are not rebuilt for each operation."""
    return replace(local, fusion="whole" if local.fused else "none", cuda_graphs=False, autotuned=False, tf32=False,
                   scheme=None if local.fused else local.scheme)  # fmt: skip


@lru_cache(maxsize=4096)
def _for_time(local: Local, single: bool) -> Local:
    """What changes time: how a graph was compiled does not, nor TF32 without ``single``-precision operations."""
    timeless: dict[str, Any] = dict.fromkeys(TIMELESS, False)
    return replace(local, fusion="whole" if local.fused else "none", autotuned=False, tf32=local.tf32 and single, **timeless)


@per_call
def _has_single(call: CallTrace) -> bool:
    return bool((call.dtype == DTYPE_CODES["fp32"]).any())


def probes_for(probes: Mapping[str, float] | None, call: CallTrace, local: Local) -> Mapping[str, float] | None:
    """Probes of a call's operations in the layout and with the attention kernel that the component runs with."""
    if probes is None or (not local.channels_last and local.attention in ("default", "flash", "efficient", "cudnn")):
        return probes
    from planner.calibrate import in_variant

    found = in_variant(probes, call, "channels_last" if local.channels_last else "")
    if local.attention in ("default", "flash", "efficient", "cudnn"):
        return found
    other = in_variant(probes, call, "vanilla") if local.attention == "vanilla" else {}
    plain = {text: seconds for text, seconds in found.items() if not text.startswith('["attention"')}
    return plain | {text: seconds for text, seconds in other.items() if text.startswith('["attention"')}


def localized(recipe: Recipe, role: str, component: str) -> Local:
    """The part of a recipe that reaches a component of that role: attention and compile act on denoisers, and so on."""
    denoises = role in ("denoiser", "controlnet")
    compiled = denoises or (role == "vae" and recipe.fuse_vae) or component in recipe.only
    weights, recipe = recipe.weights, recipe.of(component)
    convolves = denoises or role == "vae"
    return Local(
        attention=recipe.attention if denoises else "default",
        channels_last=recipe.channels_last and convolves,
        fusion=recipe.fusion if compiled else "none",
        cuda_graphs=recipe.cuda_graphs and compiled,
        autotuned=recipe.autotuned and compiled,
        tf32=recipe.tf32,
        fused_qkv=recipe.fused_qkv and denoises,
        cudnn_benchmark=recipe.cudnn_benchmark and convolves,
        settled=recipe.settled,
        chunked_forward=recipe.chunked_forward and denoises,
        scheme=weights.get(component),
    )


@dataclass(slots=True)
class CostModel:
    """Prices recipes for one workload on one device. Evaluations of equal component calls are shared."""

    traces: TraceSource
    device: Device
    coefficients: Coefficients
    batch_size: int
    probes: Mapping[str, float] | None = None
    known: Known = field(default_factory=Known)
    """What follows from the traces alone; models of the same traces may share it, whatever their devices."""
    memory_scale: float = 1.0
    """Learned correction of activations and workspace for this device and pipeline (1: none)."""
    time_scale: float = 1.0
    """Learned correction of times for this device and pipeline (1: none)."""
    evaluations: int = 0
    _calls: dict[object, CallCost] = field(default_factory=dict)
    _times: dict[object, CallTime] = field(default_factory=dict)
    _running: dict[object, int] = field(default_factory=dict)
    _roles: dict[str, str] = field(default_factory=dict)

    def key(self, thing: object) -> int:
        """A key for a trace or a part of one. The thing is kept, or its id could be given to another."""
        self.known.things[id(thing)] = thing
        return id(thing)

    def trace_for(self, recipe: Recipe) -> PipelineTrace:
        """The trace that a recipe runs: its dtype, its share of the batch, its VAE mode."""
        mode = vae_mode(recipe)
        return self.traces.trace(recipe.dtype, self.batch_size // recipe.calls, (mode,) if mode is not None else ())

    def cost(self, recipe: Recipe) -> Cost:
        """Price one recipe. Pure: equal recipes give equal costs."""
        self.evaluations += 1
        trace = self.trace_for(recipe)
        placed = self.residency(trace, recipe)
        phases = [self.phase_cost(trace, index, recipe, placed) for index in range(len(trace.calls))]
        around = self.around_cost(trace, recipe, placed)
        setup = around.setup_seconds + sum(self.compile_seconds(trace, phase.call, phase.cost.time, recipe) for phase in phases)
        return Cost(
            tuple(phases), around.glue_peak_bytes, self._graph_pool(trace, recipe, phases), around.blas_bytes, around.glue_seconds,
            around.host_seconds, setup, around.setup_peak_bytes, placed.host_bytes, placed, trace, recipe.calls)  # fmt: skip

    def phase_cost(self, trace: PipelineTrace, index: int, recipe: Recipe, placed: Residency) -> PhaseCost:
        """One distinct call with all its repetitions. Reads the trace's, the offload's and its own component's recipe fields."""
        counts, helds, _ = self._held(trace)
        cost = self.call_cost(trace, index, recipe, placed)
        moved = transfer_seconds(placed, index, counts[index], cost.time, self.device, self.coefficients, recipe,
                                 trace.calls[index].component)  # fmt: skip
        compute = self.compute_seconds(trace, index, cost.time, recipe)
        graphs = self._local(trace, index, recipe).cuda_graphs
        return PhaseCost(index, counts[index], placed.resident_bytes[index], helds[index], cost, compute, moved, graphs)

    def compute_seconds(self, trace: PipelineTrace, index: int, time: CallTime, recipe: Recipe) -> float:
        """All repetitions of one distinct call, copies between host and device not counted."""
        return self._held(trace)[0][index] * self._repeat_factor(trace, index, recipe) * time.seconds * self.time_scale

    def call_seconds(self, trace: PipelineTrace, index: int, recipe: Recipe) -> CallTime:
        """Time of one distinct call alone: cheaper than :meth:`call_cost`, and independent of where weights are."""
        call = self.variant(trace, index, recipe)
        local = self._local(trace, index, recipe)
        return self._time(call, local, local.recipe(), local.scheme)

    def around_cost(self, trace: PipelineTrace, recipe: Recipe, placed: Residency) -> AroundCost:
        """What belongs to no component. Reads only the trace's and the offload's recipe fields, and ``steps_factor``."""
        weights = component_bytes(self.traces.facts, trace, recipe, self.known)
        return AroundCost(
            self._glue_peak(trace, placed), self.blas_bytes, self._glue_seconds(trace, self._held(trace)[2], recipe),
            trace.to_host_bytes / self.coefficients.picture_bytes_per_second, self._placing_seconds(recipe, weights),
            self._setup_peak(recipe, weights, self._tuning_bytes(trace, recipe)))  # fmt: skip

    def forget(self) -> None:
        """Drop shared evaluations, after a correction changed."""
        self._calls.clear()
        self._times.clear()

    # -- one component call -----------------------------------------------------------------------------------------

    def call_cost(self, trace: PipelineTrace, index: int, recipe: Recipe, placed: Residency) -> CallCost:
        """Memory and time of one distinct call; the same for all recipes that treat this component alike."""
        call = self.variant(trace, index, recipe)
        local = localized(recipe, self.role(call.component), call.component)
        window = placed.window[index]
        key = (self.key(call), local, None if window is None else self.key(window))
        known = self._calls.get(key)
        if known is None:
            known = self._calls[key] = self._price(call, local, recipe.weights.get(call.component), window)
        return known

    def variant(self, trace: PipelineTrace, index: int, recipe: Recipe) -> CallTrace:
        """The call as the recipe's VAE mode makes it."""
        return variant_of(trace, index, recipe, self.traces.facts)

    def variants_of(self, trace: PipelineTrace, index: int, recipe: Recipe) -> tuple[Literal["", "channels_last", "vanilla"], ...]:
        """Layouts and attention kernels in which a call's operations can be probed; none when it is compiled."""
        local = self._local(trace, index, recipe)
        if local.fused:
            return ()
        layout: Literal["", "channels_last"] = "channels_last" if local.channels_last else ""
        return (layout, "vanilla") if local.attention == "vanilla" else (layout,)

    def role(self, component: str) -> str:
        """Role of a component by its name."""
        if not self._roles:
            self._roles.update({item.name: item.role for item in self.traces.facts.components})
        return self._roles.get(component, "other")

    def _price(self, call: CallTrace, local: Local, scheme: str | None, window: Ints | None) -> CallCost:
        recipe = local.recipe()
        time = self._time(call, local, recipe, scheme)
        if not len(call):
            return CallCost(0, 0, 0, 0, time)
        live = _live_bytes(call, local.fused)
        slim, which = self._condensed(call)
        workspace = operator_bytes(slim, self.device, recipe, None if local.fused else scheme)[which]
        if local.cudnn_benchmark and not local.settled and self.device.kind == "cuda":
            workspace = workspace + (call.kind == Kind.CONVOLUTION) * (call.read_bytes + call.write_bytes)
        moving = _moving_bytes(call, window)
        total = ((live + workspace) * self.memory_scale).astype(np.int64) + moving
        at = int(total.argmax())
        return CallCost(int(total[at]), int(live[at] * self.memory_scale), int(workspace[at] * self.memory_scale), int(moving[at]), time)

    def running_bytes(self, trace: PipelineTrace, index: int, recipe: Recipe) -> int:
        """At most what :meth:`call_cost` says of a call's peak, wherever weights are: activations and workspace alone."""
        call = self.variant(trace, index, recipe)
        local = _for_memory(self._local(trace, index, recipe))
        key = (self.key(call), local, self.memory_scale)
        if key not in self._running:
            slim, live = self._condensed(call)[0], self._most_live(call, local.fused)
            workspace = operator_bytes(slim, self.device, local.recipe(), local.scheme)
            self._running[key] = int(((live + workspace) * self.memory_scale).max(initial=0))
        return self._running[key]

    def _most_live(self, call: CallTrace, fused: bool) -> Ints:
        """Per condensed operation, the most that lives while it runs."""
        key = (self.key(call), fused)
        if key not in self.known.most_live:
            slim, which = self._condensed(call)
            self.known.most_live[key] = most = np.zeros(len(slim), dtype=np.int64)
            np.maximum.at(most, which, _live_bytes(call, fused))
        return self.known.most_live[key]

    def least_running_bytes(self, call: CallTrace, window: Ints | None) -> int:
        """At most what :meth:`call_cost` says of the call's peak, whatever the local knobs: activations and moving weights alone."""
        key = (self.key(call), None if window is None else self.key(window), self.memory_scale)
        if key not in self.known.least:
            live = (_live_bytes(call, True) * self.memory_scale).astype(np.int64)
            self.known.least[key] = int((live + _moving_bytes(call, window)).max(initial=0))
        return self.known.least[key]

    def _time(self, call: CallTrace, local: Local, recipe: Recipe, scheme: str | None) -> CallTime:
        """Time depends on fewer knobs than memory does, and CUDA graphs change its launch part only."""
        slim = self._condensed(call)[0]
        key = (self.key(call), _for_time(local, _has_single(slim)))
        known = self._times.get(key)
        if known is None:
            probes = probes_for(self.probes, slim, local)
            known = self._times[key] = call_time(slim, self.device, self.coefficients, recipe, scheme, probes, local.fused)
        return known

    def _condensed(self, call: CallTrace) -> tuple[CallTrace, Ints]:
        known = self.known.condensed.get(self.key(call))
        if known is None:
            known = self.known.condensed[self.key(call)] = condensed(call)
        return known

    # -- sums over the pipeline -------------------------------------------------------------------------------------

    def residency(self, trace: PipelineTrace, recipe: Recipe) -> Residency:
        """The offload simulation for a recipe, shared by all recipes that place weights alike."""
        key = (self.key(trace), recipe.offload, recipe.offload_stream, recipe.offload_blocks, recipe.offload_disk, recipe.resident,
               recipe.fused_qkv, tuple(sorted(recipe.weights.items())), _placements(recipe), vae_mode(recipe))  # fmt: skip
        if key not in self.known.residencies:
            self.known.residencies[key] = residency(self.traces.facts, trace, recipe, self.known)
        return self.known.residencies[key]

    def held(self, trace: PipelineTrace) -> tuple[list[int], list[int]]:
        """Per distinct call: how often it is made, and the most bytes that the pipeline holds when it starts."""
        return self._held(trace)[:2]

    def _held(self, trace: PipelineTrace) -> tuple[list[int], list[int], int]:
        """Per distinct call its count and the most the pipeline holds when it starts; and all glue operations."""
        known = self.known.held.get(self.key(trace))
        if known is None:
            counts, helds = [0] * len(trace.calls), [0] * len(trace.calls)
            for event in trace.events:
                counts[event.call] += 1
                helds[event.call] = max(helds[event.call], event.held_bytes)
            glue = sum(event.glue_operations for event in trace.events) + trace.tail.glue_operations
            known = self.known.held[self.key(trace)] = (counts, helds, glue)
        return known

    def _repeat_factor(self, trace: PipelineTrace, index: int, recipe: Recipe) -> float:
        """Share of the denoiser's calls that remains under fewer steps or a cache."""
        if self.role(trace.calls[index].component) not in ("denoiser", "controlnet"):
            return 1.0
        return recipe.steps_factor * recipe.denoiser_factor

    def _glue_peak(self, trace: PipelineTrace, placed: Residency) -> int:
        rest = max(placed.resident_bytes, default=0) if placed.rest_bytes else 0
        between = max([event.glue_peak_bytes for event in trace.events], default=0)
        last = placed.resident_bytes[trace.events[-1].call] if trace.events and placed.rest_bytes == 0 else placed.rest_bytes
        return max(between + min(rest, placed.rest_bytes), trace.tail.glue_peak_bytes + last)

    def _local(self, trace: PipelineTrace, index: int, recipe: Recipe) -> Local:
        component = trace.calls[index].component
        return localized(recipe, self.role(component), component)

    def _graph_pool(self, trace: PipelineTrace, recipe: Recipe, phases: list[PhaseCost]) -> int:
        if not recipe.cuda_graphs:
            return 0
        return max((phase.cost.activations_bytes + phase.cost.workspace_bytes for phase in phases
                    if self._local(trace, phase.call, recipe).cuda_graphs), default=0)  # fmt: skip

    @property
    def blas_bytes(self) -> int:
        """cuBLAS's workspace, which stays from the first product on."""
        return self.coefficients.blas_workspace_bytes if self.device.kind == "cuda" else 0

    def _glue_seconds(self, trace: PipelineTrace, operations: int, recipe: Recipe) -> float:
        moved = sum(event.glue_bytes for event in trace.events) + trace.tail.glue_bytes
        each = max(self.coefficients.launch_seconds, self.coefficients.kernel_seconds)
        rate = self.device.bandwidth_bytes_per_second * self.coefficients.bandwidth_share
        return (operations * each + moved / rate) * recipe.steps_factor

    def _placing_seconds(self, recipe: Recipe, weights: Mapping[str, int]) -> float:
        """One-off: moving the weights and quantizing them. Sources: the coefficients named here."""
        seconds = 0.0
        if recipe.offload == "none" and self.device.kind == "cuda" and self.traces.facts.device != "cuda":
            link = self.device.link_bytes_per_second or 0
            seconds += sum(weights.values()) / (link * self.coefficients.pageable_share) if link else 0.0
        quantized = sum(weights.get(name, 0) for name in recipe.weights)
        return seconds + quantized / self.coefficients.quantize_bytes_per_second

    def compile_seconds(self, trace: PipelineTrace, index: int, time: CallTime, recipe: Recipe) -> float:
        """One-off: compiling what one distinct call runs. Sources: the coefficients named here."""
        local = self._local(trace, index, recipe)
        if not local.fused:
            return 0.0
        share = 0.15 if local.fusion == "regional" else 1.0
        seconds = share * time.kernels * self.coefficients.compile_seconds_per_kernel
        if local.autotuned:
            call = trace.calls[index]
            seconds += len(set(call.shape[call.kind == Kind.MATMUL].tolist())) * self.coefficients.autotune_seconds_per_matmul
        return seconds

    def _setup_peak(self, recipe: Recipe, weights: Mapping[str, int], tuning_bytes: int) -> int:
        """Most device memory while the plan is being put in force: resident weights, and what autotuning compares."""
        if recipe.offload == "none":
            there = {name for name in weights if recipe.of(name).offload in ("none", "model")}
        else:
            there = set(recipe.resident) | {name for name, scheme in recipe.weights.items() if scheme in LOADED_ON_DEVICE}
        return sum(weights[name] for name in there if name in weights) + tuning_bytes

    def _tuning_bytes(self, trace: PipelineTrace, recipe: Recipe) -> int:
        """Autotuning runs each convolution on made-up data: input, its copy in the other layout, result and reference.

        Source: torch _inductor/select_algorithm.py; FLUX with a compiled VAE at batch 16 peaks 4 x 8 GiB above its weights.
        """
        most = 0
        for index in range(len(trace.calls)):
            if self._local(trace, index, recipe).autotuned:
                call = self.variant(trace, index, recipe)
                inputs = np.maximum(call.read_bytes - call.param_bytes, 0)
                most = max(most, int((2 * (inputs + call.write_bytes) * (call.kind == Kind.CONVOLUTION)).max(initial=0)))
        return most


def _placements(recipe: Recipe) -> tuple[object, ...]:
    """What distinguishes the offload of components with a recipe of their own."""
    return tuple((name, own.offload, own.offload_stream, own.offload_blocks, own.offload_disk, own.fused_qkv)
                 for name, own in sorted(recipe.only.items()))  # fmt: skip


def _live_bytes(call: CallTrace, fused: bool) -> Ints:
    return np.minimum(call.fused_live_bytes, call.live_bytes) if fused else call.live_bytes


def _moving_bytes(call: CallTrace, window: Ints | None) -> Ints:
    """Moving weights per operation. Another VAE mode has other operations; there the largest unit bounds its window."""
    if window is None:
        return np.zeros(len(call), dtype=np.int64)
    return window if len(window) == len(call) else np.full(len(call), int(window.max(initial=0)), dtype=np.int64)
