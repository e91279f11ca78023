"""Copies between host and device: how long they take, and how much of them hides behind compute."""

from __future__ import annotations

from planner.cost.coefficients import Coefficients
from planner.cost.kernels import CallTime
from planner.cost.residency import Residency
from planner.recipe import Recipe
from planner.types import Device


def transfer_seconds(placed: Residency, index: int, count: int, time: CallTime, device: Device, coefficients: Coefficients,
                     recipe: Recipe, component: str = "") -> float:  # fmt: skip
    """Seconds that copies add to all repetitions of one distinct call, beyond its compute.

    Pageable copies block the host and hide nothing; back to the host they also fault in fresh memory. On a stream, unit
    ``k + 1`` is copied while unit ``k`` computes, so a call takes the longer of the two and the first unit's copy; the sum is
    never more than copying serially.
    """
    onload, offload = placed.onload_bytes[index], placed.offload_bytes[index]
    link = device.link_bytes_per_second
    if not (onload or offload) or not link:
        return 0.0
    pageable = link * coefficients.pageable_share
    own = recipe.of(component)
    each = coefficients.sequential_module_seconds if own.offload == "sequential" else coefficients.onload_module_seconds
    handling = placed.moves[index] * each
    streams = own.offload_stream and own.offload in ("group_block", "group_leaf")
    if component in placed.disk_bytes:  # the host reads each group's file and waits for it, on a stream too
        return onload / min(_file_rate(placed, device, coefficients), link if streams else pageable) + handling
    if not streams:
        return onload / pageable + offload / min(pageable, coefficients.fresh_bytes_per_second) + handling
    pinned = max(min(link * coefficients.link_share, coefficients.stream_bytes_per_second), pageable)
    copy_each = onload / max(count, 1) / pinned
    first = copy_each / max(placed.moves[index] / max(count, 1), 1)
    return min(max(copy_each + first - time.seconds, first), copy_each) * count + handling


def _file_rate(placed: Residency, device: Device, coefficients: Coefficients) -> float:
    """Files that the host's free memory holds are read once; of more than that, read in turn, none is ever there still."""
    free = device.host_free_bytes
    cached = free is None or sum(placed.disk_bytes.values()) + placed.host_bytes <= free
    return coefficients.cached_file_bytes_per_second if cached else coefficients.disk_bytes_per_second
