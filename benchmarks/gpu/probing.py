"""Probe cells: the planner's own probes of the device, and the operations of one model's traces."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.records import Cell, Failure
from planner.calibrate.samples import Run
from planner.types import Device

PROBE_MEMORY_SHARE = 0.25
MAX_OPERATIONS = 900
"""Of one model, the heaviest first; a run holds at most 1000 samples."""


def run_probes(cell: Cell, device: Device, torch_device: torch.device) -> Run | Failure:
    """The run of a probe cell; ``note`` of a device cell says whether it is the quick grid."""
    from planner.calibrate.probe import probe_device, probe_operations
    from planner.calibrate.store import now

    limit = max(int((device.free_bytes or device.total_bytes) * PROBE_MEMORY_SHARE), 256 << 20)
    dtypes = tuple(name for name in ("fp16", "bf16", "fp32") if name in device.flops_per_second) or ("fp32",)
    if device.kind == "cpu":
        dtypes = ("fp32", "bf16")
    try:
        if not cell.operations:
            return probe_device(torch_device, quick="quick" in cell.note, memory_limit_bytes=limit, dtypes=dtypes)
        samples = probe_operations(cell.operations, torch_device, cell.cost_seconds, limit)
    except Exception as error:
        return Failure(kind="error", stage="probe", text=f"{type(error).__name__}: {error}"[:600])
    date = now()
    return Run(id=f"{date}-{time.time_ns() % 10**9:09d}", date=date, quick=False, complete=len(samples) == len(cell.operations),
               threads=torch.get_num_threads(), samples=tuple(samples.values())[:1000])  # fmt: skip


__all__ = ["MAX_OPERATIONS", "run_probes"]
