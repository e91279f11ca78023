"""Fresh memory on the CPU: which allocations of a call the C library takes anew from the kernel, page by page.

glibc (mallopt(3), M_MMAP_THRESHOLD): blocks above 32 MiB are always mapped anew, so a probe of the operation has that cost
in its timing already. Smaller ones come from the heap, whose free top goes back to the kernel when it exceeds twice the
largest mapped block freed so far; what is taken again afterwards is fresh. The heap is modelled as one stack.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np

from planner.dryrun.trace import CallTrace, Floats

LARGEST_THRESHOLD_BYTES = 32 << 20


def uses_glibc() -> bool:
    """Whether this process allocates as modelled here."""
    return platform.libc_ver()[0] == "glibc"


def trim_bytes(calls: Sequence[CallTrace]) -> int:
    """Free heap that a process which ran these calls keeps: twice its largest freed block, at most 64 MiB."""
    sizes = [int(call.spans[:, 2].max()) for call in calls if len(call.spans)]
    return 2 * min(max(sizes, default=0), LARGEST_THRESHOLD_BYTES)


def fresh_bytes(call: CallTrace, kept_bytes: int) -> Floats:
    """Bytes each operation of a call takes anew from the kernel, once the call has been made before."""
    out = np.zeros(len(call))
    if not len(call):
        return out
    spans = [(int(born), int(died), int(size)) for born, died, size in call.spans if died > born and size <= LARGEST_THRESHOLD_BYTES]
    changes = sorted([(born, 1, size) for born, _, size in spans] + [(died, 0, size) for _, died, size in spans])
    live = heap = 0
    for lap in range(2):
        for at, allocates, size in changes:
            live += size if allocates else -size
            if live > heap:
                if lap:
                    out[min(at, len(call) - 1)] += live - heap
                heap = live
            elif heap - live > kept_bytes:
                heap = live
    return out
