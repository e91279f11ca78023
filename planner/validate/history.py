"""What earlier releases did otherwise, where a published number shows it. The planner itself follows the installed ones."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np

from planner.dryrun.trace import CallTrace, Ints, Kind
from planner.units import MIB
from planner.validate.case import Case

_BEFORE_CACHE_PASSING = re.compile(r"0\.(?:2\d|30|31)\b|2024")
LONG_LIVED = 8
"""Operations that a storage must outlive the module call that made it, to count as kept for the next chunk."""


def cogvideox_kept_one_cache(case: Case) -> bool:
    """Until diffusers 0.32 CogVideoX's VAE kept each convolution's last frames in the module; since, in a dictionary that is
    passed from chunk to chunk, so that the old one and the new one live side by side (PR #9781)."""
    return case.pipeline_class.startswith("CogVideoX") and bool(_BEFORE_CACHE_PASSING.search(case.diffusers_version or ""))


def with_one_cache(call: CallTrace) -> CallTrace:
    """The call with each kept slice freed when the same module makes the next one, not when the whole chunk is done."""
    spans = call.spans.copy()
    saved = np.zeros(len(call) + 1, dtype=np.int64)
    for uids in _kept_slices(call).values():
        for first, second in pairwise(uids):
            end, sooner = int(spans[first, 1]), int(spans[second, 0])
            if sooner < end:
                saved[sooner] += spans[first, 2]
                saved[min(end, len(call))] -= spans[first, 2]
                spans[first, 1] = sooner
    columns = {**call.columns, "live_bytes": call.live_bytes - np.cumsum(saved)[:-1]}
    return replace(call, columns=columns, spans=spans)


def _kept_slices(call: CallTrace) -> dict[tuple[int, int], list[int]]:
    """Copies that outlive their module's call by far, by module and size, in the order they were made."""
    found: dict[tuple[int, int], list[int]] = {}
    for uid, (start, end, size) in enumerate(call.spans.tolist()):
        if start < len(call) and call.kind[start] == Kind.COPY and size >= MIB // 64 and _leaves(call.module, start, end):
            found.setdefault((int(call.module[start]), size), []).append(uid)
    return {key: uids for key, uids in found.items() if len(uids) > 1}


def _leaves(module: Ints, start: int, end: int) -> bool:
    return end - start > LONG_LIVED and bool((module[start + 1 : end] != module[start]).sum() > LONG_LIVED)
