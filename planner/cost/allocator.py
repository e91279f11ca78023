"""Reserved bytes: torch's caching allocator replayed over the lifetimes of a trace.

Constants from torch c10/cuda/CUDACachingAllocator.cpp: 512-byte blocks; requests up to 1 MiB come from 2 MiB segments, up to
10 MiB from 20 MiB segments, larger ones from their own segment rounded up to 2 MiB; best fit, split when more than 1 MiB
(512 bytes in the small pool) would be left over.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np

from planner.dryrun.trace import CallTrace, Ints
from planner.units import MIB

SMALL_LIMIT, SMALL_SEGMENT = 1 * MIB, 2 * MIB
MIDDLE_LIMIT, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
ROUND_LARGE = 2 * MIB
BLOCK = 512


@dataclass(slots=True)
class _Block:
    segment: int
    start: int
    size: int
    free: bool = True
    previous: _Block | None = None
    following: _Block | None = None


@dataclass(slots=True)
class _Pool:
    """Free blocks ordered by size, then by where they are."""

    order: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int, int], _Block] = field(default_factory=dict)

    def add(self, block: _Block) -> None:
        key = (block.size, block.segment, block.start)
        bisect.insort(self.order, key)
        self.blocks[key] = block

    def remove(self, block: _Block) -> None:
        key = (block.size, block.segment, block.start)
        self.order.pop(bisect.bisect_left(self.order, key))
        del self.blocks[key]

    def best(self, size: int) -> _Block | None:
        at = bisect.bisect_left(self.order, (size, -1, -1))
        return self.blocks[self.order[at]] if at < len(self.order) else None


@dataclass(slots=True)
class CachingAllocator:
    """Counts what torch would report as allocated and reserved. Sizes in bytes; nothing is ever really allocated."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _small: _Pool = field(default_factory=_Pool)
    _large: _Pool = field(default_factory=_Pool)
    _segments: int = 0

    def allocate(self, size: int) -> _Block:
        """A block for ``size`` bytes, from a free one if any is large enough, else from a new segment."""
        size = max(-(-size // BLOCK) * BLOCK, BLOCK)
        small = size <= SMALL_LIMIT
        pool = self._small if small else self._large
        block = pool.best(size)
        if block is None:
            block = self._new_segment(size)
        else:
            pool.remove(block)
        left = block.size - size
        if left >= BLOCK if small else left > SMALL_LIMIT:
            rest = _Block(block.segment, block.start + size, left, True, block, block.following)
            if block.following is not None:
                block.following.previous = rest
            block.following, block.size = rest, size
            pool.add(rest)
        block.free = False
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: _Block) -> None:
        """Give a block back and merge it with free neighbours of its segment."""
        self.allocated_bytes -= block.size
        pool = self._small if block.size <= SMALL_LIMIT and self._is_small(block) else self._large
        block.free = True
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.free:
                pool.remove(neighbour)
                block = _merged(neighbour, block) if neighbour is block.previous else _merged(block, neighbour)
        pool.add(block)

    def _new_segment(self, size: int) -> _Block:
        if size <= SMALL_LIMIT:
            whole = SMALL_SEGMENT
        elif size < MIDDLE_LIMIT:
            whole = MIDDLE_SEGMENT
        else:
            whole = -(-size // ROUND_LARGE) * ROUND_LARGE
        self._segments += 1
        self.reserved_bytes += whole
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return _Block(self._segments * 2 + (size <= SMALL_LIMIT), 0, whole)

    def _is_small(self, block: _Block) -> bool:
        return bool(block.segment % 2)


def _merged(left: _Block, right: _Block) -> _Block:
    left.size += right.size
    left.following = right.following
    if right.following is not None:
        right.following.previous = left
    left.free = True
    return left


def replay(allocator: CachingAllocator, call: CallTrace, workspace: Ints, largest: int = 0) -> None:
    """Run one component call's allocations and frees, each operation's workspace between them.

    Storages that outlive the call are freed at its end: what the pipeline keeps of them is counted by the caller.
    """
    born: dict[int, list[int]] = {}
    died: dict[int, list[int]] = {}
    for uid, (start, end, _) in enumerate(call.spans.tolist()):
        if end > start:
            born.setdefault(start, []).append(uid)
            died.setdefault(end, []).append(uid)
    sizes = call.spans[:, 2]
    blocks: dict[int, _Block] = {}
    scratch = np.asarray(workspace)
    for index in range(len(call) + 1):
        for uid in died.get(index, ()):
            allocator.free(blocks.pop(uid))
        for uid in born.get(index, ()):
            blocks[uid] = allocator.allocate(int(sizes[uid]))
        if index < len(call) and scratch[index] >= BLOCK:
            halves = [allocator.allocate(int(scratch[index]) // 2) for _ in range(2)]
            for block in halves:
                allocator.free(block)
    for block in blocks.values():
        allocator.free(block)
