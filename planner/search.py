"""Exact search over named axes: the cheapest assignment that stays within its limits. Knows nothing of what is planned.

A problem is a list of axes (ordered values, the first leaves things as they are), phases and rules. A phase answers, for
values of its own axes, how many bytes it needs and how long it takes; bytes of a candidate are the *maximum* over phases,
time is the *sum*. So once the axes that several phases share are decided, the private axes of each phase are decided
independently of each other. Shared axes are walked depth first, group by group, the children of a group in order of a
lower bound, and a branch is left when its bound exceeds the best candidate found or a limit. The result is the true
optimum; ties go to fewer departures from the defaults, then to earlier values of earlier axes.

Times are whole nanoseconds: sums of integers do not depend on their order, so equal candidates are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import accumulate, pairwise, product
from math import prod
from typing import Literal

Value = bool | int | str
Assignment = Mapping[str, Value]
Rank = tuple[int, int, tuple[int, ...]]
"""Cost, departures from the defaults, index of each value in axis order: what a search minimises, in this order."""
Goal = Literal["cost", "bytes"]


@dataclass(frozen=True, slots=True)
class Axis:
    """A decision. The first value leaves things as they are; choosing any other is a departure."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Demand:
    """What one phase asks for. ``kept_bytes`` stay taken while phases run that keep nothing themselves (memory pools)."""

    peak_bytes: int = 0
    nanoseconds: int = 0
    setup_nanoseconds: int = 0
    kept_bytes: int = 0


NOTHING = Demand()


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the whole with demands of its own.

    ``price`` is exact and gets values of all ``axes``. ``floor`` gets the values decided so far and answers with a demand
    that is at most the exact one in bytes, and at most in cost, for every completion that the rules allow; with all values
    given its cost is at most the exact cost. ``beside``: other phases' ``kept_bytes`` are there while this one runs.
    """

    name: str
    axes: tuple[str, ...]
    price: Callable[[Assignment], Demand]
    floor: Callable[[Assignment], Demand] | None = None
    beside: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """Why values of some axes do not go together: ``refuse`` answers with the reason, or None.

    A rule that is ``silent`` only keeps two names of one candidate from being counted twice.
    """

    axes: tuple[str, ...]
    refuse: Callable[[Assignment], str | None]
    source: str = ""
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Stock:
    """A second resource with a limit of its own (host memory), decided by ``axes`` alone."""

    axes: tuple[str, ...]
    bytes: Callable[[Assignment], int]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that may be used. ``None`` is no limit."""

    bytes: int | None = None
    stock_bytes: int | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Problem:
    """``calls``: how often the result will be used; setting up is weighed against it. None: setting up costs nothing.

    ``first``: groups of shared axes in the order in which they are best decided; the rest follow one by one in axis order.
    A group is for axes of which bounds say little before all of them are decided. ``weightless``: axes that change no bytes
    anywhere.
    """

    axes: tuple[Axis, ...]
    phases: tuple[Phase, ...]
    rules: tuple[Rule, ...] = ()
    stock: Stock | None = None
    calls: int | None = None
    first: tuple[tuple[str, ...], ...] = ()
    weightless: frozenset[str] = frozenset()

    def cost(self, demand: Demand) -> int:
        """Nanoseconds that the search minimises: all calls and their share of the setting up."""
        return demand.nanoseconds if self.calls is None else demand.nanoseconds * self.calls + demand.setup_nanoseconds

    def values(self, name: str) -> tuple[Value, ...]:
        """Values of an axis, the one that leaves things as they are first."""
        return next(axis.values for axis in self.axes if axis.name == name)

    @property
    def size(self) -> int:
        """Candidates on paper, rules aside."""
        return prod(len(axis.values) for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One priced assignment; ``demands`` are in the order of the phases."""

    values: tuple[tuple[str, Value], ...]
    demands: tuple[Demand, ...]
    needed_bytes: int
    stock_bytes: int
    nanoseconds: int
    setup_nanoseconds: int
    rank: Rank

    @property
    def settings(self) -> dict[str, Value]:
        return dict(self.values)

    @property
    def cost(self) -> int:
        return self.rank[0]

    @property
    def departures(self) -> int:
        return self.rank[1]

    def fits(self, limits: Limits) -> bool:
        """Within every limit."""
        return _within(self.needed_bytes, limits.bytes) and _within(self.stock_bytes, limits.stock_bytes)


@dataclass(frozen=True, slots=True)
class _Option:
    """One choice of a phase's private axes, with a lower bound of its rank."""

    rank: Rank
    floor_bytes: int
    values: dict[str, Value]


@dataclass(slots=True)
class _Run:
    """One search in progress."""

    goal: Goal
    limits: Limits
    domains: dict[str, tuple[tuple[int, Value], ...]]
    fixed: dict[str, Value]
    rules_at: list[tuple[Rule, ...]]
    """Per shared axis, the rules of which it decides the last axis: those of shared and of fixed axes alone."""
    best: Rank | None = None
    best_bytes: int | None = None
    found: dict[str, Value] | None = None


def _within(amount: int, limit: int | None) -> bool:
    return limit is None or amount <= limit


def needed_bytes(phases: Sequence[Phase], demands: Sequence[Demand]) -> int:
    """Bytes that must be there: the largest phase, or the largest that runs beside what another keeps."""
    kept = max((demand.kept_bytes for demand in demands), default=0)
    return max((_with_kept(phase, demand, kept) for phase, demand in zip(phases, demands, strict=True)), default=0)


def _with_kept(phase: Phase, demand: Demand, kept: int) -> int:
    return demand.peak_bytes + (kept if phase.beside and not demand.kept_bytes else 0)


@dataclass(slots=True)
class Solver:
    """Answers questions about one problem; prices are computed once, whatever is asked.

    ``evaluations`` counts exact prices of a phase, ``visited`` decided sets of shared axes.
    """

    problem: Problem
    evaluations: int = 0
    visited: int = 0
    shared: tuple[str, ...] = field(init=False)
    _private: tuple[tuple[str, ...], ...] = field(init=False)
    _phases: tuple[Phase, ...] = field(init=False)
    _private_rules: tuple[tuple[Rule, ...], ...] = field(init=False)
    _seen_by: tuple[tuple[str, ...], ...] = field(init=False)
    _touched: dict[int, tuple[int, ...]] = field(init=False)
    """By depth at which a group begins, the phases whose floors it changes."""
    _ends: dict[int, int] = field(init=False)
    """By depth at which a group begins, the depth at which it ends."""
    _stock_depth: int = field(init=False)
    _index: dict[str, dict[Value, int]] = field(init=False)
    _place: dict[str, int] = field(init=False)
    priced: dict[tuple[int, ...], Candidate] = field(default_factory=dict)
    """Every assignment that was priced in full, by the indices of its values."""
    _prices: dict[object, Demand] = field(default_factory=dict)
    _floors: dict[object, Demand] = field(default_factory=dict)
    _menus: dict[object, list[_Option]] = field(default_factory=dict)
    _refusals: dict[object, bool] = field(default_factory=dict)
    _stocks: dict[object, int] = field(default_factory=dict)
    _answers: dict[object, Candidate | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self.problem
        self._index = {axis.name: {value: index for index, value in enumerate(axis.values)} for axis in problem.axes}
        self._place = {axis.name: place for place, axis in enumerate(problem.axes)}
        used = {name for phase in problem.phases for name in phase.axes}
        idle = tuple(Phase(axis.name, (axis.name,), _free, None, False) for axis in problem.axes if axis.name not in used)
        self._phases = problem.phases + idle
        shared = _shared_axes(problem, self._phases)
        groups = [group for names in problem.first if (group := [name for name in names if name in shared])]
        groups += [[axis.name] for axis in problem.axes if axis.name in shared and all(axis.name not in group for group in groups)]
        self.shared = tuple(name for group in groups for name in group)
        starts = [0, *accumulate(map(len, groups))]
        self._ends = dict(pairwise(starts))
        own = [axis.name for axis in problem.axes if axis.name not in shared]
        self._private = tuple(tuple(name for name in own if name in phase.axes) for phase in self._phases)
        depth = {name: place for place, name in enumerate(self.shared)}
        self._private_rules = tuple(tuple(rule for rule in problem.rules if set(rule.axes) & set(private)) for private in self._private)
        self._seen_by = tuple(
            tuple(n for n in self.shared if n in phase.axes or any(n in rule.axes for rule in rules))
            for phase, rules in zip(self._phases, self._private_rules, strict=True)
        )
        bounded = [(place, phase) for place, phase in enumerate(self._phases) if phase.floor is not None]
        self._touched = {start: tuple(place for place, phase in bounded if not set(self.shared[start:end]).isdisjoint(phase.axes))
                         for start, end in self._ends.items()}  # fmt: skip
        self._stock_depth = max((depth[name] for name in problem.stock.axes), default=-1) if problem.stock else -1

    def best(self, limits: Limits = NO_LIMITS, fixed: Assignment | None = None) -> Candidate | None:
        """The candidate of least cost within the limits, or None when nothing fits. ``fixed`` decides some axes."""
        return self._answer("cost", limits, fixed or {})

    def leanest(self, fixed: Assignment | None = None, stock_bytes: int | None = None) -> Candidate | None:
        """The candidate that needs least bytes, of those the one of least cost; None when rules forbid all."""
        return self._answer("bytes", Limits(None, stock_bytes), fixed or {})

    def evaluate(self, assignment: Assignment) -> Candidate:
        """Price one full assignment, whether or not it fits or a rule forbids it."""
        demands = tuple(self._price(place, assignment) for place in range(len(self.problem.phases)))
        time, setup = sum(d.nanoseconds for d in demands), sum(d.setup_nanoseconds for d in demands)
        indices = tuple(self._index[axis.name][assignment[axis.name]] for axis in self.problem.axes)
        rank = (sum(self.problem.cost(d) for d in demands), sum(index > 0 for index in indices), indices)
        stock = self.problem.stock.bytes(assignment) if self.problem.stock else 0
        values = tuple((axis.name, assignment[axis.name]) for axis in self.problem.axes)
        found = Candidate(values, demands, needed_bytes(self.problem.phases, demands), stock, time, setup, rank)
        self.priced[indices] = found
        return found

    def refusal(self, assignment: Assignment) -> tuple[Rule, str] | None:
        """The first rule that forbids a full assignment, and its reason."""
        for rule in self.problem.rules:
            reason = rule.refuse(assignment)
            if reason is not None:
                return rule, reason
        return None

    def candidates(self) -> Iterator[dict[str, Value]]:
        """Every assignment on paper. For small problems."""
        names = [axis.name for axis in self.problem.axes]
        return (dict(zip(names, values, strict=True)) for values in product(*(axis.values for axis in self.problem.axes)))

    def _answer(self, goal: Goal, limits: Limits, fixed: Assignment) -> Candidate | None:
        key = (goal, limits, frozenset(fixed.items()))
        if key not in self._answers:
            run = self._start(goal, limits, {**(self._light(fixed) if goal == "bytes" else {}), **fixed})
            if not self._refused(run.fixed):  # floors may only be asked of what the rules allow
                self._walk(0, dict(run.fixed), tuple(self._floor(place, run.fixed) for place in range(len(self._phases))), 0, 0, run)
            if goal == "bytes" and run.best_bytes is not None:
                self._answers[key] = self._answer("cost", Limits(run.best_bytes, limits.stock_bytes), fixed)
            else:
                self._answers[key] = self.evaluate(run.found) if run.found is not None else None
        return self._answers[key]

    def _refused(self, fixed: Assignment) -> bool:
        """Whether a rule forbids what is fixed, whatever the rest."""
        return any(rule.refuse(fixed) is not None for rule in self.problem.rules if fixed.keys() >= set(rule.axes))

    def _light(self, fixed: Assignment) -> dict[str, Value]:
        """Any allowed values of the axes that neither change bytes nor are tied to one that does: all are as lean."""
        rules = self.problem.rules
        tied = {name for rule in rules if not self.problem.weightless.issuperset(rule.axes) for name in rule.axes}
        names = [axis.name for axis in self.problem.axes if axis.name in self.problem.weightless - tied]
        own = [rule for rule in rules if set(rule.axes) <= set(names)]
        domains = [(fixed[name],) if name in fixed else self.problem.values(name) for name in names]
        made = (dict(zip(names, values, strict=True)) for values in product(*domains))
        return next((each for each in made if all(rule.refuse(each) is None for rule in own)), {})

    def _start(self, goal: Goal, limits: Limits, fixed: dict[str, Value]) -> _Run:
        domains = {axis.name: tuple(enumerate(axis.values)) for axis in self.problem.axes}
        for name, value in fixed.items():
            domains[name] = tuple(pair for pair in domains[name] if pair[1] == value)
        return _Run(goal, limits, domains, fixed, self._rules_by_depth(set(fixed)))

    def _rules_by_depth(self, fixed: Set[str]) -> list[tuple[Rule, ...]]:
        depth = {name: place for place, name in enumerate(self.shared)}
        found: list[list[Rule]] = [[] for _ in self.shared]
        for rule in self.problem.rules:
            last = max((depth[name] for name in rule.axes if name in depth), default=None)
            if last is not None and all(name in depth or name in fixed for name in rule.axes):
                found[last].append(rule)
        return [tuple(rules) for rules in found]

    def _walk(self, depth: int, chosen: dict[str, Value], floors: tuple[Demand, ...], bound: int, departures: int, run: _Run) -> None:
        if depth == len(self.shared):
            self.visited += 1
            self._leaf(chosen, run)
            return
        children = []
        for left, values in self._choices(depth, self._ends[depth], chosen, bound, departures, run):
            renewed = list(floors)
            for place in self._touched[depth]:
                renewed[place] = self._floor(place, chosen)
            least = self._bound(renewed, run)
            if least is not None and not self._hopeless(least, left, run):
                children.append((least, left, [index for index, _ in values], values, tuple(renewed)))
        names = self.shared[depth : self._ends[depth]]
        for least, left, _, values, renewed_floors in sorted(children, key=lambda child: child[:3]):
            if self._hopeless(least, left, run):
                break
            chosen.update(zip(names, (value for _, value in values), strict=True))
            self._walk(self._ends[depth], chosen, renewed_floors, least, left, run)
        for name in names:
            if name not in run.fixed:
                chosen.pop(name, None)

    def _choices(self, depth: int, end: int, chosen: dict[str, Value], bound: int, departures: int,
                 run: _Run) -> Iterator[tuple[int, tuple[tuple[int, Value], ...]]]:  # fmt: skip
        """What the axes up to ``end`` can be, with the departures so far; each is in ``chosen`` while it is looked at."""
        if depth == end:
            yield departures, ()
            return
        for index, value in run.domains[self.shared[depth]]:
            chosen[self.shared[depth]] = value
            if not self._hopeless(bound, departures + (index > 0), run) and not self._forbidden(depth, chosen, run):
                for left, rest in self._choices(depth + 1, end, chosen, bound, departures + (index > 0), run):
                    yield left, ((index, value), *rest)

    def _forbidden(self, depth: int, chosen: dict[str, Value], run: _Run) -> bool:
        for rule in run.rules_at[depth]:
            key = (id(rule), *(chosen[name] for name in rule.axes))
            known = self._refusals.get(key)
            if known is None:
                known = self._refusals[key] = rule.refuse(chosen) is not None
            if known:
                return True
        stock = self.problem.stock
        if stock is None or run.limits.stock_bytes is None or depth != self._stock_depth:
            return False
        key = tuple(chosen[name] for name in stock.axes)
        if key not in self._stocks:
            self._stocks[key] = stock.bytes(chosen)
        return self._stocks[key] > run.limits.stock_bytes

    def _bound(self, floors: Sequence[Demand], run: _Run) -> int | None:
        """A lower bound of what the goal minimises; None when a limit is exceeded already."""
        most = max((floor.peak_bytes for floor in floors), default=0)
        if not _within(most, run.limits.bytes):
            return None
        return most if run.goal == "bytes" else sum(self.problem.cost(floor) for floor in floors)

    def _hopeless(self, bound: int, departures: int, run: _Run) -> bool:
        if run.goal == "bytes":
            return run.best_bytes is not None and bound >= run.best_bytes
        return run.best is not None and (bound, departures) > run.best[:2]

    # -- private axes of each phase, shared ones decided --------------------------------------------------------------

    def _leaf(self, chosen: dict[str, Value], run: _Run) -> None:
        menus = [self._menu(place, chosen, run) for place in range(len(self._phases))]
        if any(not menu for menu in menus):
            return
        if run.goal == "bytes":
            self._leaf_bytes(chosen, menus, run)
            return
        picked = [self._pick(place, menu, chosen, run.limits.bytes, 0, None) for place, menu in enumerate(menus)]
        if not all(picked) or not self._improves(chosen, picked, run):
            return
        demands = [self._price(place, chosen | option.values) for place, (_, option) in enumerate(_known(picked))]
        if _within(needed_bytes(self._phases, demands), run.limits.bytes):
            self._accept(chosen, picked, run)
            return
        for most_kept in self._kept_sizes(menus, chosen):
            picked = [self._pick(place, menu, chosen, run.limits.bytes, most_kept, most_kept) for place, menu in enumerate(menus)]
            if all(picked) and self._improves(chosen, picked, run):
                self._accept(chosen, picked, run)

    def _pick(self, place: int, menu: list[_Option], chosen: dict[str, Value], limit: int | None, beside: int,
              most_kept: int | None) -> tuple[Rank, _Option] | None:  # fmt: skip
        """The option of least rank that fits a limit, next to ``beside`` bytes that others keep."""
        best: tuple[Rank, _Option] | None = None
        for option in menu:
            if best is not None and option.rank >= best[0]:
                break
            if not _within(option.floor_bytes, limit):
                continue
            demand = self._price(place, chosen | option.values)
            if most_kept is not None and demand.kept_bytes > most_kept:
                continue
            rank = (self.problem.cost(demand), *option.rank[1:])
            if _within(_with_kept(self._phases[place], demand, beside), limit) and (best is None or rank < best[0]):
                best = rank, option
        return best

    def _kept_sizes(self, menus: list[list[_Option]], chosen: dict[str, Value]) -> list[int]:
        """Every amount that some option keeps, and none: the pool of any choice is one of them."""
        sizes = {self._price(place, chosen | option.values).kept_bytes for place, menu in enumerate(menus) for option in menu}
        return sorted(sizes | {0})

    def _leaf_bytes(self, chosen: dict[str, Value], menus: list[list[_Option]], run: _Run) -> None:
        least = [self._least_bytes(place, menu, chosen, 0, None) for place, menu in enumerate(menus)]
        if run.best_bytes is not None and max((amount for amount, _ in least), default=0) >= run.best_bytes:
            return
        if any(kept for _, kept in least):
            sizes = self._kept_sizes(menus, chosen)
            found = [self._least_beside(menus, chosen, most_kept) for most_kept in sizes]
        else:
            found = [max((amount for amount, _ in least), default=0)]
        run.best_bytes = min([amount for amount in found if amount is not None] + ([] if run.best_bytes is None else [run.best_bytes]))

    def _least_beside(self, menus: list[list[_Option]], chosen: dict[str, Value], most_kept: int) -> int | None:
        if any(all(self._price(place, chosen | o.values).kept_bytes > most_kept for o in menu) for place, menu in enumerate(menus)):
            return None
        return max((self._least_bytes(place, menu, chosen, most_kept, most_kept)[0] for place, menu in enumerate(menus)), default=0)

    def _least_bytes(self, place: int, menu: list[_Option], chosen: dict[str, Value], beside: int,
                     most_kept: int | None) -> tuple[int, int]:  # fmt: skip
        """Least bytes of any option that keeps no more than ``most_kept``, and what that option keeps."""
        best: tuple[int, int] | None = None
        for option in sorted(menu, key=lambda each: each.floor_bytes):
            if best is not None and option.floor_bytes > best[0]:
                break
            demand = self._price(place, chosen | option.values)
            if most_kept is None or demand.kept_bytes <= most_kept:
                amount = _with_kept(self._phases[place], demand, beside), demand.kept_bytes
                best = amount if best is None else min(best, amount)
        assert best is not None  # callers pass menus that have such an option
        return best

    def _improves(self, chosen: dict[str, Value], picked: Sequence[tuple[Rank, _Option] | None], run: _Run) -> bool:
        return run.best is None or self._rank(chosen, _known(picked)) < run.best

    def _accept(self, chosen: dict[str, Value], picked: Sequence[tuple[Rank, _Option] | None], run: _Run) -> None:
        run.best = self._rank(chosen, _known(picked))
        run.found = dict(chosen)
        for _, option in _known(picked):
            run.found.update(option.values)

    def _rank(self, chosen: dict[str, Value], picked: Sequence[tuple[Rank, _Option]]) -> Rank:
        indices = [0] * len(self._place)
        cost = 0
        for rank, option in picked:
            cost += rank[0]
            for name, value in option.values.items():
                indices[self._place[name]] = self._index[name][value]
        for name, value in chosen.items():
            indices[self._place[name]] = self._index[name][value]
        return cost, sum(index > 0 for index in indices), tuple(indices)

    def _menu(self, place: int, chosen: dict[str, Value], run: _Run) -> list[_Option]:
        """Options of a phase's private axes that its rules allow, by lower bound."""
        private = self._private[place]
        fixed = tuple(pair for pair in run.fixed.items() if pair[0] in private)
        key = (place, fixed, *(chosen[name] for name in self._seen_by[place]))
        known = self._menus.get(key)
        if known is None:
            known = self._menus[key] = self._build_menu(place, private, chosen, run)
        return known

    def _build_menu(self, place: int, private: tuple[str, ...], chosen: dict[str, Value], run: _Run) -> list[_Option]:
        options = []
        for pairs in product(*(run.domains[name] for name in private)):
            values = dict(zip(private, (value for _, value in pairs), strict=True))
            full = chosen | values
            if any(rule.refuse(full) is not None for rule in self._private_rules[place]):
                continue
            floor = self._floor(place, full)
            indices = tuple(index for index, _ in pairs)
            rank = (self.problem.cost(floor), sum(index > 0 for index in indices), indices)
            options.append(_Option(rank, floor.peak_bytes, values))
        return sorted(options, key=lambda option: option.rank)

    def _price(self, place: int, assignment: Assignment) -> Demand:
        phase = self._phases[place]
        key = (place, *map(assignment.__getitem__, phase.axes))
        known = self._prices.get(key)
        if known is None:
            self.evaluations += 1
            known = self._prices[key] = phase.price(assignment)
        return known

    def _floor(self, place: int, partial: Assignment) -> Demand:
        phase = self._phases[place]
        if phase.floor is None:
            return NOTHING
        key = (place, *map(partial.get, phase.axes))
        known = self._floors.get(key)
        if known is None:
            known = self._floors[key] = phase.floor(partial)
        return known


def _known(picked: Sequence[tuple[Rank, _Option] | None]) -> list[tuple[Rank, _Option]]:
    return [pick for pick in picked if pick is not None]


def _free(_: Assignment) -> Demand:
    """What an axis costs that no phase depends on."""
    return NOTHING


def _shared_axes(problem: Problem, phases: Sequence[Phase]) -> set[str]:
    """Axes of several phases or of the stock, and those that a rule ties across phases."""
    owners: dict[str, set[int]] = {axis.name: set() for axis in problem.axes}
    for place, phase in enumerate(phases):
        for name in phase.axes:
            owners[name].add(place)
    shared = {name for name, places in owners.items() if len(places) > 1}
    shared |= set(problem.stock.axes) if problem.stock else set()
    for rule in problem.rules:
        tied = {place for name in rule.axes if name not in shared for place in owners[name]}
        if len(tied) > 1:
            shared |= set(rule.axes)
    return shared
