"""Which device a plan is for, and how much of it a plan may use."""

from __future__ import annotations

from typing import Any

from planner.cost.coefficients import default_coefficients
from planner.progress import Progress
from planner.types import Device
from planner.units import GIB, MIB, format_bytes, parse_bytes

HEADROOM_SHARE = 0.02
HEADROOM_LEAST_BYTES = 256 * MIB
CPU_HEADROOM_BYTES = 1 * GIB
DRIVER_SHARE = 0.015
"""Of the total that NVML reports, what no process can have: torch's out-of-memory messages call a T4 (15360 MiB) 14.76 GiB
(bupticybee/FastLoRAChat issue 6) and an RTX 4090 (24564 MiB) 23.65 GiB (tloen/llama-int8 issue 7)."""
"""Assumed: what the rest of the process and the operating system need while a plan runs."""


def target_for(gpu: str | None, memory: int | str | None, host_budget_bytes: int | None) -> Device:
    """The device named by ``gpu`` (a profile, or ``cpu``), or the one detected here, with its budget filled in.

    Raises:
        HardwareError: an unknown GPU, with the nearest names.
        UsageError: a budget that is not a size.
    """
    from planner.hardware.profiles import device_from_profile, find_gpu

    if gpu is None:
        return live_target(None, None, memory, "never", lambda line: None)
    if gpu.strip().lower() == "cpu":
        from planner.hardware.detect import detect_device

        return with_budget(detect_device("cpu"), memory)
    profile, note = find_gpu(gpu)
    device = with_budget(device_from_profile(profile, note=note), memory)
    return device.model_copy(update={"host_free_bytes": host_budget_bytes}) if host_budget_bytes else device


def live_target(pipe: Any, device: Any, memory: int | str | None, calibrate: str, say: Progress) -> Device:
    """The device here: CUDA when there is one, else the CPU, whose speed is measured unless ``calibrate`` is "never"."""
    from planner.hardware.detect import detect_device

    found = device if isinstance(device, Device) else _simulated(device) or detect_device(device)
    if found.kind == "cpu" and calibrate != "never":
        from planner.calibrate import cpu_device_measured

        say("measuring this CPU")
        found = cpu_device_measured(found)
    return with_budget(found, memory, pipe)


def _simulated(device: Any) -> Device | None:
    """A device of type ``sim`` (torch's name for an accelerator that tests simulate), as it describes itself; else None."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None or device is None or str(device).partition(":")[0] != "sim" or not hasattr(torch, "sim"):
        return None
    from planner.hardware.host import host_memory

    free, total = torch.sim.mem_get_info()
    # Assumed: it has no speed of its own; these rates only put its plans in the order of a GPU's.
    rates = {"fp32": 1e13, "fp16": 4e13, "bf16": 4e13}
    return Device(name=torch.sim.get_device_name(), kind="sim", architecture="sim", total_bytes=total, free_bytes=free,
                  host_free_bytes=host_memory().free_bytes, flops_per_second=rates, bandwidth_bytes_per_second=5e11,
                  link_bytes_per_second=1e10, basis="assumed", note="simulated; rates are assumed")  # fmt: skip


def with_budget(device: Device, memory: int | str | None, pipe: Any = None) -> Device:
    """The device with ``budget_bytes``: what was asked for, or what is free less the CUDA context and a headroom.

    The headroom is 2 % of the device, at least 256 MiB (1 GiB of host memory on a CPU): an assumption, for what other
    processes and fragmentation take. Weights of ``pipe`` that are on the device already count as free.
    """
    if memory is not None:
        return device.model_copy(update={"budget_bytes": parse_bytes(memory, "memory budget")})
    free = device.free_bytes if device.free_bytes is not None else device.total_bytes
    if device.kind == "cpu":
        budget = free - CPU_HEADROOM_BYTES + _already_there(pipe, "cpu")
        return device.model_copy(update={"budget_bytes": max(budget, 1)})
    here = device.free_bytes is not None
    context = 0 if here else default_coefficients(device).context_bytes
    headroom = max(int(device.total_bytes * HEADROOM_SHARE), 0 if device.kind == "sim" else HEADROOM_LEAST_BYTES)
    budget = free - context - headroom + _already_there(pipe, device.kind)
    # What is free on a device that is here has lost the driver's share already.
    left = headroom - (0 if here else int(device.total_bytes * DRIVER_SHARE))
    return device.model_copy(update={"budget_bytes": max(budget, 1), "headroom_bytes": max(left, 0)})


def _already_there(pipe: Any, kind: str) -> int:
    if pipe is None:
        return 0
    from planner.measure import weight_bytes

    return weight_bytes(pipe, kind)


def describe_budget(device: Device) -> str:
    """``"10.90 GiB of 12.00 GiB"``."""
    return f"{format_bytes(device.budget_bytes)} of {format_bytes(device.total_bytes)}"
