"""The cells worth measuring on a device, each with what it is expected to take and what it is worth knowing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from benchmarks.gpu.measure import repetitions_for
from benchmarks.gpu.practices import PRACTICES, WORDS
from benchmarks.gpu.probing import MAX_OPERATIONS
from benchmarks.gpu.records import Cell, Predicted
from benchmarks.gpu.subjects import Subject, source_of, weight_estimate_bytes
from planner.cost.coefficients import Coefficients, default_coefficients
from planner.cost.estimate import estimate_of
from planner.cost.model import CostModel
from planner.decide import decide, usable_here
from planner.dryrun.provider import Traces
from planner.errors import NoFeasiblePlan, PlannerError
from planner.knobs import KNOBS, normalize, violations
from planner.knobs.base import Context
from planner.models import ModelSource
from planner.progress import Progress, silent
from planner.space import recipe_of
from planner.targets import with_budget
from planner.types import Device, Estimate, KnobValue, Settings, Workload
from planner.units import GIB

logger = logging.getLogger(__name__)

VALUES = {"device-probe": 400.0, "operation-probe": 12.0, "baseline": 15.0, "batch": 5.0, "value": 4.0, "option": 2.0, "choice": 45.0,
          "practice": 6.0, "rival": 4.0, "nearest-miss": 2.5}  # fmt: skip
"""What knowing a cell is worth: first what calibrates everything, then what the promise is about (the choice on a small
card, its rivals, today's practices), then every value of every knob once. The scale is a matter of judgement."""
KNOBS_TO_COVER = ("offload", "offload_stream", "offload_blocks", "compile", "vae_slicing", "vae_tiling", "vae_tile", "attention", "dtype",
                  "channels_last", "fuse_qkv", "tf32", "cudnn_benchmark", "chunked_forward")  # fmt: skip
MAIN_KNOBS = frozenset({"offload", "compile", "vae_slicing", "vae_tiling", "attention", "dtype", "channels_last"})
NEEDS: dict[str, dict[str, KnobValue]] = {
    "offload_stream": {"offload": "group_block"},
    "offload_blocks": {"offload": "group_block"},
    "vae_tile": {"vae_tiling": True},
}
"""What an option needs to have an effect."""
RIVALS = 12
"""Best predicted plans measured for every card and workload, besides the best of every offload value."""
MOST_ALIKE = 2
NEAREST_MISSES = 4
MISS_SHARE = 1.35
"""A plan that is predicted to need up to this many times the budget may be a missed fit, and is tried."""
BYTES_PER_SECOND_BUILT = 2.5e9
START_SECONDS = 15.0
"""A new process: importing torch and diffusers, creating a CUDA context. Assumed; corrected by the first one."""


@dataclass(slots=True)
class Planner:
    """Predictions for one subject on one device: traces are made once per batch."""

    subject: Subject
    device: Device
    coefficients: Coefficients | None = None
    probes: Mapping[str, float] | None = None
    _source: ModelSource | None = None
    _traces: dict[str, Traces] = field(default_factory=dict)
    _models: dict[str, CostModel] = field(default_factory=dict)

    @property
    def source(self) -> ModelSource:
        if self._source is None:
            self._source = source_of(self.subject)
        return self._source

    def traces(self, workload: Workload) -> Traces:
        """The dry run of one workload. Raises as ``Traces.of`` does."""
        key = workload.model_dump_json()
        if key not in self._traces:
            self._traces[key] = Traces.of(self.source, workload)
        return self._traces[key]

    def model(self, workload: Workload) -> CostModel:
        """Prices plans of one workload on the whole device."""
        key = workload.model_dump_json()
        if key not in self._models:
            traces = self.traces(workload)
            coefficients = self.coefficients or default_coefficients(self.device)
            self._models[key] = CostModel(traces, self.device, coefficients, traces.workload.batch_size, self.probes)
        return self._models[key]

    def context(self, workload: Workload, device: Device | None = None) -> Context:
        """What the knobs decide by. Lossy values are not measured."""
        traces = self.traces(workload)
        return Context(facts=traces.facts, device=device or self.device, workload=traces.workload, quality="lossless",
                       usable=usable_here(self.device))  # fmt: skip

    def estimate(self, workload: Workload, settings: Settings, device: Device | None = None) -> Estimate:
        """The estimate of settings, on the whole device or on a smaller card that it plays."""
        context = self.context(workload, device)
        model = self.model(workload)
        before = model.device
        model.device = device or self.device  # only its budget differs, so that what is priced already stays right
        try:
            return estimate_of(model, recipe_of(normalize(settings, context), context))
        finally:
            model.device = before


def small_card(device: Device, cap_bytes: int) -> Device:
    """The device as a card of ``cap_bytes``: what CUDA takes is gone, and the budget is what autoplan would take."""
    free = cap_bytes - default_coefficients(device).context_bytes
    return with_budget(device.model_copy(update={"total_bytes": cap_bytes, "free_bytes": free, "budget_bytes": None}), None)


# -- all cells --------------------------------------------------------------------------------------------------------


def cells_for(subjects: Iterable[Subject], device: Device, kinds: frozenset[str], say: Progress = silent) -> Iterator[Cell]:
    """Every cell of these subjects, each once; a subject that cannot be traced here is left out with a warning."""
    if "probe" in kinds:
        yield from device_probes(device)
    for subject in subjects:
        planner = Planner(subject, device)
        say(f"planning the cells of {subject.name}")
        try:
            yield from merged(_of_subject(planner, kinds))
        except PlannerError as error:
            logger.warning("%s is left out: %s", subject.name, error)


def _of_subject(planner: Planner, kinds: frozenset[str]) -> Iterator[Cell]:
    subject, device = planner.subject, planner.device
    if "probe" in kinds:
        yield from operation_probes(planner)
    if "plan" in kinds:
        yield from plan_cells(planner)
    caps = subject.caps if device.kind == "cuda" else ()
    for gib, batch in caps:
        if gib * GIB < device.total_bytes:
            workload = subject.at_batch(batch)
            if "capped" in kinds:
                yield from capped_cells(planner, workload, gib * GIB)
            if "practice" in kinds:
                yield from practice_cells(planner, workload, gib * GIB)
    if "practice" in kinds and device.kind == "cuda":
        yield from practice_cells(planner, subject.at_batch(1), None)


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """Each identity once: the highest value stays, a choice stays a choice."""
    found: dict[str, Cell] = {}
    for cell in cells:
        known = found.get(cell.identity)
        if known is None:
            found[cell.identity] = cell
            continue
        best = max((known, cell), key=lambda one: one.value)
        found[cell.identity] = best.model_copy(update={"chosen": known.chosen or cell.chosen})
    return list(found.values())


# -- (a) every value --------------------------------------------------------------------------------------------------


def plan_cells(planner: Planner) -> Iterator[Cell]:
    """The plain pipeline at every batch; every value of every knob at batch 1 (VAE slicing: at the next)."""
    for number, batch in enumerate(planner.subject.batches):
        workload = planner.subject.at_batch(batch)
        context = planner.context(workload)
        wanted: list[tuple[str, dict[str, KnobValue], str]] = [("batch" if number else "baseline", {}, f"batch {batch}, plain")]
        changes = [change for change in value_changes(context) if number == 0 or change[0] in ("vae_slicing", "vae_tiling", "compile")]
        if number > 1:
            changes = [change for change in changes if change[0] in ("vae_slicing", "vae_tiling")]
        for name, settings in changes:
            kind = "value" if name in MAIN_KNOBS else "option"
            wanted.append((kind, settings, f"batch {batch}, " + ", ".join(f"{k}={v}" for k, v in settings.items())))
        for kind, settings, note in wanted:
            cell = planned(planner, workload, settings, kind=kind, note=note)
            if cell is not None:
                yield cell


def value_changes(context: Context) -> Iterator[tuple[str, dict[str, KnobValue]]]:
    """(knob, settings): every value that is not the plain one, with what it needs to have an effect; rules respected."""
    for knob in KNOBS:
        if knob.name not in KNOBS_TO_COVER:
            continue
        seen = set()
        for value in knob.values(context)[1:]:
            chosen: dict[str, KnobValue] = {**NEEDS.get(knob.name, {}), knob.name: value}
            full = normalize(chosen, context)
            if value not in seen and full[knob.name] == value and not violations(chosen, context):
                seen.add(value)
                yield knob.name, chosen


def planned(planner: Planner, workload: Workload, settings: Settings, *, kind: str, note: str, card: Device | None = None,
            needs_fit: bool = True, chosen: bool = False, scale: float = 1.0) -> Cell | None:  # fmt: skip
    """A cell for settings; None where they do not fit the device by far, so that nothing would be learned."""
    context = planner.context(workload, card)
    full = normalize(settings, context)
    estimate = planner.estimate(workload, full, card)
    if needs_fit and not estimate.fits:
        return None
    return Cell(
        kind="capped" if card is not None else "plan", subject=planner.subject.name, workload=workload, settings=full, chosen=chosen,
        cap_bytes=card.total_bytes if card is not None else None, allowed_bytes=card.free_bytes if card is not None else None, note=note,
        predicted=Predicted.of(estimate), cost_seconds=cost_seconds(planner, estimate, full),
        value=VALUES[kind] * planner.subject.weight * scale)  # fmt: skip


def cost_seconds(planner: Planner, estimate: Estimate, settings: Settings) -> float:
    """Seconds a cell takes: weights to the device, copied once more where a stream pins them; compiling, the first call,
    the repetitions, and on a CPU a call that records memory."""
    weights, link = weight_estimate_bytes(planner.subject), planner.device.link_bytes_per_second
    moved = weights / (0.35 * link) if link else 0.0
    pinned = weights / BYTES_PER_SECOND_BUILT if settings.get("offload_stream") else 0.0
    calls = 1 + repetitions_for(estimate.latency_seconds) + (planner.device.kind == "cpu")
    return moved + pinned + 1.5 * estimate.setup_seconds + calls * estimate.latency_seconds


# -- (b) small cards --------------------------------------------------------------------------------------------------


def capped_cells(planner: Planner, workload: Workload, cap_bytes: int) -> Iterator[Cell]:
    """The planner's choice on a small card, the best of a moderate space, the best of every offload, the nearest misses."""
    card = small_card(planner.device, cap_bytes)
    label = f"{cap_bytes // GIB} GiB"
    chosen = own_choice(planner, workload, card)
    if chosen is not None:
        yield from _kept(planned(planner, workload, chosen, kind="choice", note=f"{label}: the planner's choice", card=card, chosen=True,
                                 needs_fit=False))  # fmt: skip
    priced = priced_space(planner, workload, card)
    for number, (settings, _) in enumerate(rivals(priced)):
        yield from _kept(planned(planner, workload, settings, kind="rival", note=f"{label}: rival {number + 1}", card=card,
                                 scale=1 / (1 + number / RIVALS)))  # fmt: skip
    for settings, _ in nearest_misses(priced, card):
        yield from _kept(planned(planner, workload, settings, kind="nearest-miss", note=f"{label}: predicted not to fit", card=card,
                                 needs_fit=False))  # fmt: skip


def _kept(cell: Cell | None) -> tuple[Cell, ...]:
    return () if cell is None else (cell,)


def own_choice(planner: Planner, workload: Workload, card: Device) -> dict[str, KnobValue] | None:
    """What ``autoplan`` would take on that card; None when it says that nothing fits."""
    from planner.autoplan import Request

    if planner.device.free_bytes is None:  # prepared elsewhere: what is installed here says nothing of the machine to come
        card = card.model_copy(update={"free_bytes": None})
    traces = planner.traces(workload)
    model = CostModel(traces, card, planner.coefficients or default_coefficients(card), traces.workload.batch_size)
    try:
        return dict(decide(planner.source, traces, model, Request()).settings)
    except NoFeasiblePlan:
        return None


Priced = list[tuple[dict[str, KnobValue], Estimate]]


def moderate_space(context: Context) -> Iterator[dict[str, KnobValue]]:
    """Offload with and without streams, compile, the VAE whole or in parts, memory format, batch in one or two parts."""
    batch = context.workload.batch_size
    offloads: tuple[dict[str, KnobValue], ...] = tuple({"offload": value} for value in ("none", "model", "sequential"))
    offloads += tuple({"offload": value, "offload_stream": stream} for value in ("group_block", "group_leaf") for stream in (False, True))
    compiles = ("none", "default", "regional")
    vaes: tuple[dict[str, KnobValue], ...] = ({}, {"vae_slicing": batch > 1, "vae_tiling": True})
    splits = (1, 2) if batch % 2 == 0 else (1,)
    seen = set()
    for offload, compiled, vae, layout, split in product(offloads, compiles, vaes, (False, True), splits):
        settings: dict[str, KnobValue] = {**offload, **vae, "compile": compiled, "channels_last": layout, "batch_split": split}
        full = normalize(settings, context)
        key = tuple(sorted(full.items()))
        if key not in seen and not violations(full, context):
            seen.add(key)
            yield full


def priced_space(planner: Planner, workload: Workload, card: Device) -> Priced:
    """The moderate space with its estimates, fastest first."""
    context = planner.context(workload, card)
    found = [(settings, planner.estimate(workload, settings, card)) for settings in moderate_space(context)]
    return sorted(found, key=lambda item: item[1].latency_seconds)


def rivals(priced: Priced) -> Priced:
    """The fastest that fit, no more than two of one offload and compile, and the fastest of every offload value that fits."""
    fitting, alike = [item for item in priced if item[1].fits], Counter[tuple[KnobValue, ...]]()
    kept: Priced = []
    for item in fitting:
        kind = tuple(item[0][name] for name in ("offload", "offload_stream", "compile"))
        alike[kind] += 1
        if alike[kind] <= MOST_ALIKE and len(kept) < RIVALS:
            kept.append(item)
    for value in dict.fromkeys(settings["offload"] for settings, _ in fitting):
        best = next(item for item in fitting if item[0]["offload"] == value)
        if best not in kept:
            kept.append(best)
    return kept


def nearest_misses(priced: Priced, card: Device) -> Priced:
    """Faster than the best that fits, and just too large: where a missed fit would hurt."""
    best = next((estimate.latency_seconds for _, estimate in priced if estimate.fits), float("inf"))
    limit = MISS_SHARE * (card.budget_bytes or card.total_bytes)
    near = [item for item in priced if not item[1].fits and item[1].latency_seconds < best and item[1].peak_reserved_bytes < limit]
    return sorted(near, key=lambda item: item[1].peak_reserved_bytes)[:NEAREST_MISSES]


# -- (c) today's practice ---------------------------------------------------------------------------------------------


def practice_cells(planner: Planner, workload: Workload, cap_bytes: int | None) -> Iterator[Cell]:
    """Each practice on the same card; one that cannot hold the weights still says so by running out of memory."""
    card = small_card(planner.device, cap_bytes) if cap_bytes is not None else None
    for practice, nearest in PRACTICES.items():
        context = planner.context(workload, card)
        if violations(nearest, context):
            continue
        estimate = planner.estimate(workload, nearest, card)
        cost = cost_seconds(planner, estimate, nearest)
        yield Cell(kind="practice", subject=planner.subject.name, workload=workload, practice=practice, note=WORDS[practice],
                   cap_bytes=cap_bytes, allowed_bytes=card.free_bytes if card is not None else None,
                   predicted=Predicted.of(estimate) if practice != "diffusers-mm" else None, cost_seconds=cost,
                   value=VALUES["practice"] * planner.subject.weight * (1.0 if cap_bytes is not None else 0.5))  # fmt: skip


# -- (d) probes -------------------------------------------------------------------------------------------------------


def device_probes(device: Device) -> Iterator[Cell]:
    """The grid of the planner's own calibration. On a CPU the quick one."""
    quick = device.kind == "cpu"
    yield Cell(kind="probe", subject="device", note="quick grid" if quick else "full grid", cost_seconds=10.0 if quick else 60.0,
               value=VALUES["device-probe"])  # fmt: skip


def operation_probes(planner: Planner) -> Iterator[Cell]:
    """Every distinct operation of the subject's call at batch 1, with how often it occurs."""
    workload = planner.subject.at_batch(1)
    trace = planner.traces(workload).trace()
    counts: dict[str, int] = {}
    for index, call in enumerate(trace.calls):
        each = np.bincount(call.shape, weights=call.columns.get("times"), minlength=len(call.shapes)).tolist()
        for text, count in zip(call.shapes, each, strict=True):
            counts[text] = counts.get(text, 0) + int(count) * trace.count(index)
    kept = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_OPERATIONS])
    cost = 5.0 if planner.device.kind == "cpu" else min(30.0, 3.0 + 0.05 * len(kept))
    yield Cell(kind="probe", subject=planner.subject.name, workload=workload, operations=kept, note=f"{len(kept)} operations of batch 1",
               cost_seconds=cost, value=VALUES["operation-probe"] * planner.subject.weight)  # fmt: skip


def switch_seconds(subjects: Iterable[Subject]) -> dict[str, float]:
    """Seconds to start a process and build a subject in it."""
    found = {subject.name: START_SECONDS + weight_estimate_bytes(subject) / BYTES_PER_SECOND_BUILT for subject in subjects}
    return {**found, "device": START_SECONDS}


__all__ = ["Planner", "VALUES", "capped_cells", "cells_for", "cost_seconds", "merged", "moderate_space", "nearest_misses", "own_choice",
           "plan_cells", "practice_cells", "priced_space", "rivals", "small_card", "switch_seconds", "value_changes"]  # fmt: skip
