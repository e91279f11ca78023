"""The caching allocator's replay, against sizes worked out by hand from torch's rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.cost.allocator import CachingAllocator
from planner.units import MIB


def test_small_middle_and_large_requests_take_segments_of_their_class() -> None:
    for request, segment, allocated in (
        (1, 2 * MIB, 512),
        (MIB, 2 * MIB, MIB),
        (MIB + 1, 20 * MIB, MIB + 512),
        (10 * MIB - 512, 20 * MIB, 10 * MIB - 512),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left over, less than 1 MiB, is not split off
    ):
        allocator = CachingAllocator()
        allocator.allocate(request)
        assert (allocator.reserved_bytes, allocator.allocated_bytes) == (segment, allocated), request


def test_a_freed_block_serves_the_next_request_and_neighbours_merge() -> None:
    allocator = CachingAllocator()
    first, second = allocator.allocate(8 * MIB), allocator.allocate(8 * MIB)
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(first)
    allocator.free(second)
    allocator.allocate(18 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_a_gap_too_small_for_the_next_request_costs_a_segment() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.allocate(16 * MIB) for _ in range(3)]
    allocator.free(blocks[0])
    allocator.free(blocks[2])
    allocator.allocate(32 * MIB)
    assert allocator.allocated_bytes == 48 * MIB
    assert allocator.reserved_bytes == 80 * MIB


def test_empty_cache_gives_back_free_segments_only() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.allocate(16 * MIB), allocator.allocate(32 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 16 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.allocated_bytes) == (0, 0)


def test_a_full_device_is_asked_for_no_more_while_the_cache_can_give() -> None:
    allocator = CachingAllocator(limit_bytes=64 * MIB)
    allocator.free(allocator.allocate(40 * MIB))
    allocator.allocate(50 * MIB)
    assert allocator.reserved_bytes == 50 * MIB
    assert allocator.peak_reserved_bytes == 50 * MIB


def test_what_a_device_lacks_is_counted_once_the_cache_is_empty() -> None:
    allocator = CachingAllocator(limit_bytes=64 * MIB)
    first, second = allocator.allocate(16 * MIB), allocator.allocate(32 * MIB)
    assert allocator.short_bytes == 0
    allocator.free(first)
    allocator.allocate(20 * MIB)  # the hole of 16 MiB is given back first
    assert allocator.short_bytes == 0
    allocator.allocate(16 * MIB)
    assert allocator.short_bytes == 4 * MIB
    allocator.free(second)


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.booleans()), max_size=60))
def test_reserved_covers_allocated_and_everything_comes_back(steps: list[tuple[int, bool]]) -> None:
    allocator, live = CachingAllocator(), []
    for size, frees in steps:
        live.append(allocator.allocate(size))
        if frees:
            allocator.free(live.pop(0))
        assert allocator.reserved_bytes >= allocator.allocated_bytes
        assert allocator.allocated_bytes == sum(block.size for block in live)
    for block in live:
        allocator.free(block)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)
