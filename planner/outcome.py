"""Which plan to take from a space, and why: alternatives, reasons, what binds, what more memory would change.

The rule of :func:`choose`. The search gives the cheapest candidate that fits. A simpler one is preferred where the gain is
within the noise of the model:

1. A plan that splits the batch is taken only if no unsplit one fits, or if it is faster than the best unsplit one by more
   than ``split_margin`` (relative).
2. If leaving the pipeline as it is fits and costs at most ``margin`` more than the winner, the pipeline is left as it is.
3. Otherwise departures are taken back one at a time, the cheapest to lose first, while the plan still fits, no rule forbids
   it and its cost stays within ``margin`` of the winner of 1 (not of the previous step, so margins do not add up).

The law that holds: the winner's cost never rises with the budget (the search is exact), so the chosen cost for a larger
budget is at most ``1 + margin`` times that for a smaller one; across a change from a split to an unsplit plan it is at most
``(1 + margin) * (1 + split_margin)`` times. A strict law cannot hold together with rule 2: the pipeline as it is may begin
to fit exactly where a plan that is faster by less than the noise was chosen before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations

from planner.knobs import defaults, knob, violations
from planner.knobs.attention import BACKENDS
from planner.knobs.compile import COMPILES
from planner.knobs.offload import OFFLOADS
from planner.search import Candidate, Limits, Value
from planner.space import Space
from planner.types import DTYPES, KnobValue, Objective, Rejection
from planner.units import format_bytes, format_seconds

MARGIN = 0.02
"""Relative difference of cost that is not worth a departure; an assumption about the noise between two predictions."""
ALIKE = 1.005
"""Ratio of times below which an explanation calls them equal."""
GAIN = 0.05
"""Least relative gain that ``what_if`` reports."""
MAJOR = ("offload", "dtype", "quantization", "attention", "compile", "batch_split", "vae_tiling", "vae_slicing", "channels_last")
"""Knobs whose every value an explanation answers for."""
WORDS: dict[str, tuple[KnobValue, ...]] = {
    "dtype": DTYPES,
    "offload": OFFLOADS,
    "attention": ("vanilla", "sliced", *BACKENDS),
    "compile": COMPILES,
    "vae_slicing": (True,),
    "vae_tiling": (True,),
    "channels_last": (True,),
}
"""Values that rules are asked about even where a knob does not offer them here."""
FRONTIER_POINTS = 16
FRONTIER_STEP = 0.97
"""Neighbouring points of a frontier differ by at least 3 % of memory."""
PRICED_CHANGES = 3
"""Departures in which the candidates of a picture may differ from the plan."""
RESOLUTION_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The next better plan, and how much more budget it takes."""

    extra_bytes: int
    candidate: Candidate
    speedup: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything that was decided. Costs are nanoseconds, sizes bytes; settings name every knob.

    ``chosen`` is None when nothing fits; then ``leanest`` is what needs least and ``shortfall_bytes`` what it lacks in
    ``short_phase``. ``candidates`` is the size of the space on paper, ``evaluated`` the phases priced.
    """

    chosen: Candidate | None
    baseline: Candidate
    leanest: Candidate | None
    shortfall_bytes: int | None
    short_phase: str | None
    alternatives: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]
    frontier: tuple[Candidate, ...]
    binding: str | None
    what_if: WhatIf | None
    candidates: int
    evaluated: int
    priced: tuple[Candidate, ...]


def baseline(space: Space) -> Candidate:
    """Leaving the pipeline as it is, but for what the user fixed."""
    return space.solver.evaluate({axis.name: axis.values[0] for axis in space.problem.axes})


def choose(space: Space, objective: Objective = "latency", *, margin: float = MARGIN, split_margin: float = 0.1) -> Candidate | None:
    """The plan to take, or None when nothing fits. The rule is at the head of this module.

    ``throughput`` of a given workload is its latency; compare workloads by time per image. ``memory`` takes the candidate
    that needs least, and the fastest of those. ``split_margin``: the model's own uncertainty of a latency.
    """
    if objective == "memory":
        leanest = space.solver.leanest(stock_bytes=space.limits.stock_bytes)
        return leanest if leanest is not None and leanest.fits(space.limits) else None
    best = space.solver.best(space.limits)
    if best is None:
        return None
    winner = _unsplit(space, best, split_margin)
    allowed = winner.cost * (1 + margin)
    plain = baseline(space)
    if space.solver.refusal(plain.settings) is None and plain.fits(space.limits) and plain.cost <= allowed:
        return plain
    while True:
        simpler = [each for each in _simpler(space, winner) if each.cost <= allowed]
        if not simpler:
            return winner
        winner = min(simpler, key=lambda each: (each.cost, each.departures, each.rank))


def _unsplit(space: Space, best: Candidate, split_margin: float) -> Candidate:
    if "batch_split" in space.fixed or best.settings.get("batch_split", 1) == 1:
        return best
    whole = space.solver.best(space.limits, {"batch_split": 1})
    return whole if whole is not None and whole.cost <= best.cost * (1 + split_margin) else best


def _simpler(space: Space, candidate: Candidate) -> Iterator[Candidate]:
    """Candidates with one departure taken back (and options that lose their effect with it), allowed and fitting."""
    axes = {axis.name: axis.values for axis in space.problem.axes}
    for name, value in candidate.values:
        if value == axes[name][0]:
            continue
        changed = {**candidate.settings, name: axes[name][0]}
        settled = {each: knob(each).settle(changed[each], changed, space.context) for each in changed}
        if any(settled[each] not in axes[each] for each in settled) or space.solver.refusal(settled) is not None:
            continue
        found = space.solver.evaluate(settled)
        if found.departures < candidate.departures and found.fits(space.limits):
            yield found


# -- reasons -----------------------------------------------------------------------------------------------------------


def explain_choice(space: Space, chosen: Candidate | None) -> Outcome:
    """Why ``chosen`` (None: nothing fits), from searches of the same space with one value fixed or another budget."""
    solver, limits = space.solver, space.limits
    leanest = None if chosen is not None else solver.leanest(stock_bytes=limits.stock_bytes) or solver.leanest()
    short = None if leanest is None else _shortfall(leanest, limits)
    alternatives, rejected = _others(space, chosen)
    hint = _what_if(space, chosen) if chosen is not None else None
    return Outcome(
        chosen,
        baseline(space),
        leanest,
        short,
        largest_phase(space, leanest) if short and leanest is not None else None,
        alternatives,
        rejected,
        frontier(space),
        _binding(space, chosen, hint) if chosen is not None else None,
        hint,
        space.problem.size,
        solver.evaluations,
        _priced(space, chosen) if chosen is not None else (),
    )


def largest_phase(space: Space, candidate: Candidate) -> str:
    """The phase whose bytes decide what a candidate needs."""
    pairs = zip(space.problem.phases, candidate.demands, strict=True)
    return max(pairs, key=lambda pair: pair[1].peak_bytes)[0].name


def _shortfall(candidate: Candidate, limits: Limits) -> int:
    device = candidate.needed_bytes - limits.bytes if limits.bytes is not None else 0
    host = candidate.stock_bytes - limits.stock_bytes if limits.stock_bytes is not None else 0
    return device if device > 0 else max(host, 0)


def _others(space: Space, chosen: Candidate | None) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """For every other value of a major knob: the best plan with it, or why there is none."""
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    for name in MAJOR:
        values = space.problem.values(name)
        for value in dict.fromkeys((*values, *WORDS.get(name, ()))):
            if name in space.fixed or (chosen is not None and value == chosen.settings[name]):
                continue
            count = space.problem.size // max(len(values), 1)
            if value not in values:
                rejected.append(_refused(space, name, value, count))
                continue
            best = space.solver.best(space.limits, {name: value})
            if best is not None and best not in found:
                found.append(best)
            rejected.append(_lost(space, name, value, count, best, chosen))
    return tuple(sorted(found, key=lambda each: each.rank)), tuple(rejected)


def _refused(space: Space, name: str, value: KnobValue, count: int) -> Rejection:
    reason = next((why for knob_name, other, why in space.left_out if (knob_name, other) == (name, value)), None)
    reason = reason or knob(name).refuse(value, space.context)
    if reason is None:
        found = violations({**defaults(space.context), name: value}, space.context)
        reason = found[0][2] if found else _ruled_out(space, name, value) or "it makes no difference here"
    return Rejection(settings={name: value}, kind="rule", reason=reason, count=count)


def _ruled_out(space: Space, name: str, value: KnobValue) -> str | None:
    """What a rule of this pipeline says against one value, the rest as it is."""
    chosen = {axis.name: axis.values[0] for axis in space.problem.axes}
    if value not in space.problem.values(name):
        return None
    told = (rule.refuse({**chosen, name: value}) for rule in space.problem.rules if not rule.silent)
    return next((reason for reason in told if reason is not None), None)


def _lost(space: Space, name: str, value: Value, count: int, best: Candidate | None, chosen: Candidate | None) -> Rejection:
    setting = {name: value}
    if best is None:
        return _unfit(space, setting, count)
    if chosen is None or best.rank < chosen.rank:
        return Rejection(settings=setting, kind="time", reason="its gain is within the model's uncertainty", count=count)
    times = best.cost / chosen.cost if chosen.cost else 1.0
    if best.cost == chosen.cost:
        return Rejection(settings=setting, kind="dominated", reason="no faster, and one change more", count=count)
    seconds, lean = format_seconds(best.nanoseconds / 1e9), best.needed_bytes < chosen.needed_bytes
    only_setup = times >= ALIKE and best.nanoseconds < ALIKE * chosen.nanoseconds
    parts = [f"no faster ({seconds})" if times < ALIKE or only_setup else f"{times:.2f} times as slow ({seconds})"]
    parts += [] if lean else ["no less memory"]
    parts += [f"{format_seconds(best.setup_nanoseconds / 1e9)} to set up"] if only_setup else []
    return Rejection(settings=setting, kind="time" if lean else "dominated", reason=", ".join(parts), count=count)


def _unfit(space: Space, setting: dict[str, KnobValue], count: int) -> Rejection:
    """No candidate with this value fits: by how much the leanest misses, or which rule forbids all."""
    name, value = next(iter(setting.items()))
    stock_bytes = space.limits.stock_bytes
    leanest = space.solver.leanest(setting, stock_bytes)
    if leanest is not None:
        short, phase = _shortfall(leanest, space.limits), largest_phase(space, leanest)
        holes = space.budget_bytes is not None and leanest.needed_bytes <= space.budget_bytes and short > 0
        if holes:
            short = max(space.lacking_bytes(leanest), short)
        what = "short for the holes between its blocks" if holes else "short"
        reason = f"needs at least {format_bytes(leanest.needed_bytes)} in {phase}: {format_bytes(short)} {what}"
        return Rejection(settings=setting, kind="memory", reason=reason, count=count, shortfall_bytes=short, phase=phase)
    leanest = space.solver.leanest(setting)
    if leanest is not None:
        short = leanest.stock_bytes - (stock_bytes or 0)
        reason = f"keeps at least {format_bytes(leanest.stock_bytes)} in host memory: {format_bytes(short)} short"
        return Rejection(settings=setting, kind="host", reason=reason, count=count, shortfall_bytes=short)
    return _refused(space, name, value, count)


def frontier(space: Space) -> tuple[Candidate, ...]:
    """Memory against time: from the fastest of all to the leanest, whatever the device budget."""
    points: list[Candidate] = []
    budget: int | None = None
    while len(points) < FRONTIER_POINTS:
        point = space.solver.best(Limits(budget, space.limits.stock_bytes))
        if point is None:
            break
        if points and points[-1].cost == point.cost:
            points.pop()
        points.append(point)
        budget = min(point.needed_bytes - 1, int(point.needed_bytes * FRONTIER_STEP))
    return tuple(points)


def _priced(space: Space, chosen: Candidate) -> tuple[Candidate, ...]:
    """Everything that was priced in full, and what departs from the plan in up to three major knobs; by cost."""
    others = [(name, value) for name in MAJOR for value in space.problem.values(name) if value != chosen.settings[name]]
    for changes in chain.from_iterable(combinations(others, count) for count in range(1, PRICED_CHANGES + 1)):
        changed = {**chosen.settings, **dict(changes)}
        settled = {name: knob(name).settle(value, changed, space.context) for name, value in changed.items()}
        if all(value in space.problem.values(name) for name, value in settled.items()) and space.solver.refusal(settled) is None:
            space.solver.evaluate(settled)
    return tuple(sorted(space.solver.priced.values(), key=lambda each: each.rank))


def _what_if(space: Space, chosen: Candidate) -> WhatIf | None:
    """The least budget, to 16 MiB, at which a plan is faster by more than the least gain."""
    if space.limits.bytes is None:
        return None
    wanted = chosen.cost / (1 + GAIN)
    best = space.solver.best(Limits(None, space.limits.stock_bytes))
    if best is None or best.cost >= wanted:
        return None
    low = space.limits.bytes
    while best.needed_bytes - low > RESOLUTION_BYTES:
        middle = (low + best.needed_bytes) // 2
        found = space.solver.best(Limits(middle, space.limits.stock_bytes))
        if found is not None and found.cost < wanted:
            best = found
        else:
            low = middle
    # A plan that was passed over needs no more than the budget, but room for the holes between its blocks.
    beyond = best.needed_bytes - space.budget_bytes if space.budget_bytes is not None else 0
    extra = max(beyond, space.lacking_bytes(best))
    return WhatIf(extra, best, chosen.cost / best.cost) if extra > 0 else None


def _binding(space: Space, chosen: Candidate, hint: WhatIf | None) -> str:
    """What limits the plan now: memory of a phase, where more of it would help; else what its longest phase waits for."""
    if hint is not None:
        phase = largest_phase(space, hint.candidate)
        return f"memory: a faster plan needs {format_bytes(hint.extra_bytes)} more in {phase}"
    cost = space.model.cost(space.recipe(chosen.settings))
    if not cost.phases:
        return "time: the pipeline's own code"
    longest = max(cost.phases, key=lambda phase: phase.seconds)
    bound = "transfer" if longest.transfer_seconds > longest.compute_seconds else longest.cost.time.bound
    return f"time: {cost.trace.calls[longest.call].name} is bound by {bound}"
