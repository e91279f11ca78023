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
    if component in placed.disk_bytes:  # each group's file is read by the host, which waits for it, on a stream too
        return onload / min(pageable, coefficients.file_bytes_per_second) + handling
    if not own.offload_stream or own.offload not in ("group_block", "group_leaf"):
        return onload / pageable + offload / min(pageable, coefficients.fresh_bytes_per_second) + handling
    pinned = max(min(link * coefficients.link_share, coefficients.stream_bytes_per_second), pageable)
    copy_each = onload / max(count, 1) / pinned
    first = copy_each / max(placed.moves[index] / max(count, 1), 1)
    return min(max(copy_each + first - time.seconds, first), copy_each) * count + handling
