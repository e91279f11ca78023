"""What moves together under sequential and group offload, when it is there, and how often it is copied."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import numpy as np

from planner.cost.condense import repeats
from planner.cost.quantized import leaf_bytes
from planner.dryrun.trace import CallTrace, Ints
from planner.facts import ComponentFacts, Leaf
from planner.recipe import Recipe

_THROUGH_FORWARD = ("forward", "generate")
"""Entry points that call the component's own ``forward``; ``decode``, ``get_text_features`` and others go around it."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One call under a moving window: bytes on the device per operation, bytes loaded and copied back and modules moved in all."""

    window: Ints
    loaded_bytes: int
    returned_bytes: int
    moves: int


Chain = tuple[tuple[int, int], ...]
"""Groups around a module, outermost first: number and bytes of each."""


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Units that move together, by the module whose call brings them in; they stay until that call returns."""

    units: Mapping[str, tuple[int, int]]
    """Module path to (number of the group, its bytes). A module's own tensors come in while its children run, too."""
    fixed_bytes: int
    """On the device all the time: some buffers under sequential offload, and with streams, from a first call on."""
    ahead: bool
    """The next unit is loaded while one runs (prefetch on a stream); known after a first ``forward``, never for ``decode``."""
    returning: frozenset[int] | None
    """Groups that are copied back; the others' originals are still on the host. None: every group."""
    pinned_bytes: int
    leaders: frozenset[int] = frozenset()
    """Groups of the modules that diffusers splits into groups: they load themselves, and the first of their groups ahead."""
    largest: Mapping[int, int] = field(default_factory=dict)
    """Bytes of the largest tensor of each group."""
    again: Mapping[int, int] = field(default_factory=dict)
    """Bytes by group of what stays there and yet is copied at each load."""
    nested: bool = False
    """Blocks of named parts, each of which has a ``forward`` of its own whatever the component's entry point."""

    def over(self, call: CallTrace, scale: float = 1.0) -> Passage:
        """What one call holds and loads; ``scale`` is for weights that were cast since the facts were read."""
        if not len(call):
            return Passage(np.zeros(0, np.int64), 0, 0, 0)
        starts = _runs(call.module)
        order = call.module[starts]
        known: dict[str, Chain] = {}
        chains = [self._chain(path, call.method, known) for path in call.modules]
        visited = [chains[module] for module in order]
        passes = self._passes([call.modules[module] for module in order])
        if self.ahead and (call.method == "forward" or self.nested):
            held, loads = _prefetched(visited, passes, self.leaders, self.largest)
        else:
            held = [sum(size for _, size in chain) for chain in visited]
            loads = [list(new) for new in _entered(visited, passes)]
        window = np.repeat(np.array(held, dtype=np.float64), np.diff([*starts.tolist(), len(call)]))
        loaded = returned = moves = 0
        for times, units in zip(repeats(call)[starts].tolist(), loads, strict=True):
            moves += times * len(units)
            loaded += times * sum(size + self.again.get(number, 0) for number, size in units)
            returned += times * sum(size for number, size in units if self.returning is None or number in self.returning)
        return Passage((window * scale).astype(np.int64), round(loaded * scale), round(returned * scale), moves)

    def _chain(self, path: str, method: str, known: dict[str, Chain]) -> Chain:
        """Groups of the module and of all modules around it; the outermost has hooks around its ``forward`` alone."""
        if path not in known:
            around = self._chain(path.rpartition(".")[0], method, known) if path else ()
            unit = self.units.get(path) if path or method in _THROUGH_FORWARD else None
            known[path] = around if unit is None else tuple({**dict(around), unit[0]: unit[1]}.items())
        return known[path]

    def _passes(self, paths: list[str]) -> list[int]:
        """Per stretch, the number of the call of the named part that it lies in: a decoder may run once per latent frame.

        A part begins anew where its first module runs again; `first` is empty until one inside the part has run.
        """
        if not self.nested:
            return [0] * len(paths)
        out: list[int] = []
        number, part, first = 0, "", ""
        for path in paths:
            around = path.split(".")[0]
            if around != part or path == first:
                number, part, first = number + 1, around, ""
            first = first or (path if path != around else "")
            out.append(number)
        return out


def _runs(order: Ints) -> Ints:
    """Starts of the stretches in which one module runs."""
    return np.flatnonzero(np.diff(order, prepend=-1)) if len(order) else np.zeros(0, np.int64)


def _entered(chains: list[Chain], passes: list[int]) -> list[Chain]:
    """Per stretch, the groups that were not there in the stretch before; all of them where a pass begins."""
    out, before, current = [], frozenset[int](), 0
    for chain, number in zip(chains, passes, strict=True):
        if number != current:
            before, current = frozenset(), number
        out.append(tuple(unit for unit in chain if unit[0] not in before))
        before = frozenset(unit for unit, _ in chain)
    return out


def _prefetched(
    chains: list[Chain], passes: list[int], leaders: Set[int], largest: Mapping[int, int]
) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Bytes on the device and what is loaded, per stretch, when each group loads the one that follows it.

    Source: diffusers ``LazyPrefetchGroupOffloadingHook``: the follower is the one after a group's last run in a pass, and it
    is loaded at each of the group's runs, tensor by tensor also where it already is there; a group that runs without having
    been loaded loads itself.
    """
    entered = _entered(chains, passes)
    following, first = _followers(entered, passes, leaders)
    held: list[int] = []
    loads: list[list[tuple[int, int]]] = []
    on: dict[int, int] = {}
    before: Set[int] = frozenset()
    current = -1
    for chain, new, number in zip(chains, entered, passes, strict=True):
        for gone in before - {unit for unit, _ in chain if unit not in {each for each, _ in new}}:
            on.pop(gone, None)
        fetched = [first[number]] if number != current and number in first else []
        for unit in new:
            fetched += [] if unit[0] in on or unit in fetched else [unit]
            fetched += [following[number, unit[0]]] if (number, unit[0]) in following else []
        twice = max((largest.get(unit, 0) for unit, _ in fetched if unit in on), default=0)
        on |= dict(fetched)
        loads.append(fetched)
        held.append(sum(on.values()) + twice)
        before, current = frozenset(unit for unit, _ in chain), number
    return held, loads


def _followers(
    entered: list[Chain], passes: list[int], leaders: Set[int]
) -> tuple[dict[tuple[int, int], tuple[int, int]], dict[int, tuple[int, int]]]:
    """By pass and group, the group that it loads ahead; and by pass the group that its leader loads ahead."""
    following: dict[tuple[int, int], tuple[int, int]] = {}
    first: dict[int, tuple[int, int]] = {}
    last: dict[int, int] = {}
    for new, number in zip(entered, passes, strict=True):
        for unit in new:
            if unit[0] in leaders:
                continue
            if number in last:
                following[number, last[number]] = unit
            else:
                first[number] = unit
            last[number] = unit[0]
    return following, first


def window_plan(component: ComponentFacts, recipe: Recipe, size: int, literal: bool = False) -> WindowPlan:
    """The units that sequential, leaf or block offload moves in one component that weighs ``size`` bytes unquantized.

    ``literal``: block level as diffusers alone would do it; the planner takes leaves where blocks do not cover a component.
    """
    own = recipe.of(component.name)
    stream = own.offload_stream and own.offload in ("group_block", "group_leaf")
    bytes_of = _scaled_leaves(component, recipe, size)
    by_block = own.offload == "group_block" and (literal or moves_by_block(component))
    fixed = _fixed_buffers(component, size) if own.offload == "sequential" else {}
    if stream:
        fixed = _buffers_left(component, size, by_block)
    moving = {path: leaf - fixed.get(path, 0) for path, leaf in bytes_of.items()}
    if by_block:
        units, leaders = _block_units(component, moving, 1 if stream else max(own.offload_blocks, 1))
    else:
        units = {path: (number, leaf) for number, (path, leaf) in enumerate(moving.items())}
        leaders = frozenset(number for path, (number, _) in units.items() if not path)
    # The rest around blocks moves without a stream: it is copied back, and never pinned.
    returning = None if own.offload != "sequential" and not stream else leaders if stream and by_block else frozenset[int]()
    streamed = [leaf for path, leaf in bytes_of.items() if not by_block or _block_of(component, path) is not None]
    pinned = sum(1 << max(leaf - 1, 1).bit_length() for leaf in streamed if leaf) if stream else 0
    largest = _largest(component, units, moving) if stream else {}
    again: dict[int, int] = {}
    for path, left in fixed.items() if stream else ():
        number = _unit_of(component, units, path)
        again[number] = again.get(number, 0) + left
    return WindowPlan(units, sum(fixed.values()), stream, returning, pinned, leaders, largest, again,
                      by_block and bool(component.group_block_modules))  # fmt: skip


def _unit_of(component: ComponentFacts, units: Mapping[str, tuple[int, int]], path: str) -> int:
    """Number of the group that a module at leaf level, or inside a block, moves with; -1 for the rest around blocks."""
    unit = units.get(path) or units.get(_block_of(component, path) or "")
    return -1 if unit is None else unit[0]


def _largest(component: ComponentFacts, units: Mapping[str, tuple[int, int]], bytes_of: Mapping[str, int]) -> dict[int, int]:
    """By group, the bytes of its largest tensor: a module's weight, or its own tensors together where it has no such weight."""
    out: dict[int, int] = {}
    for leaf in component.leaves:
        number = _unit_of(component, units, leaf.path)
        share = leaf.linear_weight_bytes / leaf.bytes if leaf.linear_weight_bytes else 1.0
        out[number] = max(out.get(number, 0), round(bytes_of[leaf.path] * share))
    return out


def _buffers_left(component: ComponentFacts, size: int, by_block: bool) -> dict[str, int]:
    """Buffers that a stream's groups bring in and leave there: of whole modules only the parameters are taken back.

    Source: diffusers ``ModuleGroup._offload_to_memory``; at leaf level whole modules are ``_GO_LC_SUPPORTED_PYTORCH_LAYERS``.
    """
    scale = size / component.weight_bytes if component.weight_bytes else 1.0

    def whole(leaf: Leaf) -> bool:
        if by_block:
            return _block_of(component, leaf.path) is not None
        is_layer = "Conv" in leaf.class_name or leaf.class_name.endswith(("Linear", "Embedding"))
        return is_layer and leaf.bytes > leaf.buffer_bytes  # rotary embeddings have no parameters

    return {leaf.path: round(leaf.buffer_bytes * scale) for leaf in component.leaves if leaf.buffer_bytes and leaf.path and whole(leaf)}


def _block_of(component: ComponentFacts, path: str) -> str | None:
    return next((prefix for prefix in component.block_paths if path == prefix or path.startswith(prefix + ".")), None)


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


def _block_units(
    component: ComponentFacts, bytes_of: Mapping[str, int], width: int
) -> tuple[dict[str, tuple[int, int]], frozenset[int]]:
    """Groups of ``width`` neighbouring blocks, brought in by any of them; the rest comes and goes with the module around it.

    Also the numbers of the groups that are such a rest.

    Buffers of that rest are there twice: ``Module.to`` replaces a buffer, and the group keeps moving the one it knew.
    """
    grouped: dict[str, int] = {}
    rest: dict[str, int] = {}
    twice = {leaf.path: leaf.buffer_bytes for leaf in component.leaves if leaf.path}
    for path, size in bytes_of.items():
        block = _block_of(component, path)
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
    return units, frozenset(range(len(rest)))


def _named_around(component: ComponentFacts, path: str) -> str:
    """The innermost of the class's ``_group_offload_block_modules`` that a module lies in: each is split by itself."""
    parts = path.split(".") if path else []
    depth = 0
    while depth < len(parts) and parts[depth] in component.group_block_modules:
        depth += 1
    return ".".join(parts[:depth])


def tied_bytes(component: ComponentFacts) -> int:
    """Bytes that the leaves count more than once because a tensor belongs to several modules."""
    return max(sum(leaf.bytes for leaf in component.leaves) - component.weight_bytes, 0)
