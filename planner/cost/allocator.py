"""Reserved bytes: torch's caching allocator replayed over the lifetimes of a trace.

Constants from torch c10/cuda/CUDACachingAllocator.cpp: 512-byte blocks; requests up to 1 MiB come from 2 MiB segments, up to
10 MiB from 20 MiB segments, larger ones from their own segment rounded up to 2 MiB; best fit, split when more than 1 MiB
(512 bytes in the small pool) would be left over.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.cost.condense import per_call
from planner.dryrun.trace import CallTrace, Ints
from planner.units import MIB

SMALL_LIMIT, SMALL_SEGMENT = 1 * MIB, 2 * MIB
MIDDLE_LIMIT, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
ROUND_LARGE = 2 * MIB
BLOCK = 512


@dataclass(slots=True)
class Block:
    segment: int
    start: int
    size: int
    free: bool = True
    previous: Block | None = None
    following: Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks ordered by size, then by where they are: no two are at one place, so blocks themselves are never compared."""

    order: list[tuple[int, int, int, Block]] = field(default_factory=list)

    def add(self, block: Block) -> None:
        bisect.insort(self.order, (block.size, block.segment, block.start, block))

    def remove(self, block: Block) -> None:
        self.order.pop(self._place(block.size, block.segment, block.start))

    def take(self, size: int) -> Block | None:
        """The smallest free block of at least that size, no longer free."""
        at = self._place(size)
        return self.order.pop(at)[3] if at < len(self.order) else None

    def _place(self, *key: int) -> int:
        return bisect.bisect_left(self.order, key)

    def state(self) -> tuple[tuple[int, int, int], ...]:
        """What decides where the next blocks come from."""
        return tuple(entry[:3] for entry in self.order)


@dataclass(slots=True)
class CachingAllocator:
    """Counts what torch would report as allocated and reserved. Sizes in bytes; nothing is ever really allocated."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    limit_bytes: int | None = None
    """What the device can give; before a segment would pass it, cached segments without a block in use are given back."""
    short_bytes: int = 0
    """The most that a segment passed the limit by although nothing cached was left: there torch raises an out-of-memory error."""
    limited: bool = False
    """A segment would have passed the limit."""
    _small: _Pool = field(default_factory=_Pool)
    _large: _Pool = field(default_factory=_Pool)
    _segments: int = 0

    def allocate(self, size: int) -> Block:
        """A block for ``size`` bytes, from a free one if any is large enough, else from a new segment."""
        size = max(-(-size // BLOCK) * BLOCK, BLOCK)
        small = size <= SMALL_LIMIT
        pool = self._small if small else self._large
        block = pool.take(size) or self._new_segment(size)
        left = block.size - size
        if left >= BLOCK if small else left > SMALL_LIMIT:
            rest = Block(block.segment, block.start + size, left, True, block, block.following)
            if block.following is not None:
                block.following.previous = rest
            block.following, block.size = rest, size
            pool.add(rest)
        block.free = False
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.peak_allocated_bytes:
            self.peak_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Give a block back and merge it with free neighbours of its segment."""
        self.allocated_bytes -= block.size
        pool = self._small if block.size <= SMALL_LIMIT and self._is_small(block) else self._large
        block.free = True
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = _merged(neighbour, block) if neighbour is block.previous else _merged(block, neighbour)
        pool.add(block)

    def _new_segment(self, size: int) -> Block:
        if size <= SMALL_LIMIT:
            whole = SMALL_SEGMENT
        elif size < MIDDLE_LIMIT:
            whole = MIDDLE_SEGMENT
        else:
            whole = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + whole > self.limit_bytes:
            self.limited = True
            self.empty_cache()
            self.short_bytes = max(self.short_bytes, self.reserved_bytes + whole - self.limit_bytes)
        self._segments += 1
        self.reserved_bytes += whole
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return Block(self._segments * 2 + (size <= SMALL_LIMIT), 0, whole)

    def empty_cache(self) -> None:
        """Give segments without a block in use back to the device (``torch.cuda.empty_cache``)."""
        for pool in (self._small, self._large):
            for *_, block in list(pool.order):
                if block.previous is None and block.following is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def state(self) -> tuple[object, ...]:
        """Equal states do the same with what is allocated and freed next."""
        return self._small.state(), self._large.state(), self.reserved_bytes

    def _is_small(self, block: Block) -> bool:
        return bool(block.segment % 2)


def _merged(left: Block, right: Block) -> Block:
    left.size += right.size
    left.following = right.following
    if right.following is not None:
        right.following.previous = left
    left.free = True
    return left


@dataclass(frozen=True, slots=True)
class Script:
    """What one pass of a component call does to an allocator, operation by operation.

    ``steps``: storages that end, the moving window's new size (None: as before), storages that begin (with their bytes), and
    the operation's workspace blocks, which live together. Storages that outlive the call are freed at its end: what the
    pipeline keeps of them is counted by the caller.
    """

    steps: tuple[tuple[Sequence[int], int | None, Sequence[tuple[int, int]], Sequence[int]], ...]

    @classmethod
    def of(cls, call: CallTrace, workspace: Sequence[Ints] = (), window: Ints | None = None) -> Script:
        """``workspace``: bytes per operation of each of its blocks; ``window``: bytes of weights per operation that move through."""
        born, died = _lifetimes(call)
        moving, scratch = _window_of(call, window), _scratch(workspace)
        turns = {index: size for index, size in enumerate(moving) if index == 0 or size != moving[index - 1]}
        indices = sorted(born.keys() | died.keys() | scratch.keys() | turns.keys())
        return cls(tuple((died.get(at, ()), turns.get(at), born.get(at, ()), scratch.get(at, ())) for at in indices))

    def play(self, allocator: CachingAllocator) -> None:
        """Run one pass. All that it allocates is free again at its end."""
        blocks: dict[int, Block] = {}
        held: Block | None = None
        for ended, window, begun, scratch in self.steps:
            for uid in ended:
                allocator.free(blocks.pop(uid))
            if window is not None:
                if held is not None:
                    allocator.free(held)
                held = allocator.allocate(window) if window else None
            for uid, size in begun:
                blocks[uid] = allocator.allocate(size)
            if scratch:
                for block in [allocator.allocate(size) for size in scratch]:
                    allocator.free(block)
        for block in (*blocks.values(), *((held,) if held is not None else ())):
            allocator.free(block)


def _scratch(workspace: Sequence[Ints]) -> dict[int, list[int]]:
    """By operation, the sizes of its blocks."""
    found: dict[int, list[int]] = {}
    for piece in workspace:
        for index in np.flatnonzero(piece >= BLOCK).tolist():
            found.setdefault(index, []).append(int(piece[index]))
    return found


@per_call
def _lifetimes(call: CallTrace) -> tuple[dict[int, list[tuple[int, int]]], dict[int, list[int]]]:
    """Storages (with their bytes) that begin before each operation, and those that end there."""
    born: dict[int, list[tuple[int, int]]] = {}
    died: dict[int, list[int]] = {}
    for uid, (start, end, size) in enumerate(call.spans.tolist()):
        if end > start:
            born.setdefault(start, []).append((uid, size))
            died.setdefault(end, []).append(uid)
    return born, died


def _window_of(call: CallTrace, window: Ints | None) -> list[int]:
    """The window per operation; another VAE mode has other operations, for which its largest unit stands."""
    if window is None:
        return []
    if len(window) != len(call):
        return [int(window.max(initial=0))] * len(call)
    return [int(size) for size in window]
