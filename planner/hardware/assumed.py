"""Devices without a profile: peaks assumed from what NVML tells of cores, clocks and the memory bus."""

from __future__ import annotations

from planner.errors import HardwareError
from planner.hardware.nvml import NvmlDevice
from planner.hardware.profiles import GpuProfile, device_from_profile, match_gpu, pcie_bytes_per_second
from planner.types import Device

FLOP_PER_CLOCK_AND_SM: dict[tuple[int, int], dict[str, int]] = {
    (6, 0): {"fp32": 128, "fp16": 256},
    (6, 1): {"fp32": 256, "fp16": 256},
    (7, 0): {"fp32": 128, "fp16": 1024},
    (7, 5): {"fp32": 128, "fp16": 512, "int8": 2048},
    (8, 0): {"fp32": 128, "tf32": 1024, "fp16": 2048, "bf16": 2048, "int8": 4096},
    (8, 6): {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "int8": 2048},
    (8, 9): {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024, "int8": 2048},
    (9, 0): {"fp32": 256, "tf32": 2048, "fp16": 4096, "bf16": 4096, "fp8": 8192, "int8": 8192},
    (12, 0): {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024, "int8": 2048},
}
"""Dense, with fp32 accumulation: NVIDIA's whitepapers of Pascal to Blackwell. Where GeForce and workstation cards of
one compute capability differ, the lower GeForce rate."""
CORES_PER_SM = {(6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 5): 64, (8, 0): 64, (8, 6): 128, (8, 9): 128, (9, 0): 128}
CORES_PER_SM |= {(12, 0): 128}
"""CUDA C++ Programming Guide, arithmetic instructions."""
ARCHITECTURES = {6: "Pascal", 7: "Volta", 8: "Ampere", 9: "Hopper", 10: "Blackwell", 12: "Blackwell"}
_NAMED = {(7, 5): "Turing", (8, 9): "Ada Lovelace"}


def architecture_of(capability: tuple[int, int] | None) -> str:
    """NVIDIA's name of the generation; ``"unknown"`` for one that is not listed."""
    if capability is None:
        return "unknown"
    return _NAMED.get(capability) or ARCHITECTURES.get(capability[0], "unknown")


def device_from_nvml(device: NvmlDevice) -> Device:
    """The cost model's device for what NVML reports: its profile, a MIG share of one, or assumed peaks.

    Raises:
        HardwareError: no profile has the name and NVML tells too little to assume peaks.
    """
    if device.parent_name is not None:
        base = _mig_device(device)
    else:
        profile = match_gpu(device.name, device.total_bytes)
        base = _assumed_device(device) if profile is None else _profiled_device(profile, device)
    return base.model_copy(update={"total_bytes": device.total_bytes, "free_bytes": device.free_bytes})


def _link(device: NvmlDevice) -> float | None:
    """The slot as it is, which may be narrower than the card."""
    if device.pcie_generation is None or device.pcie_lanes is None:
        return None
    return pcie_bytes_per_second(device.pcie_generation, device.pcie_lanes)


def _profiled_device(profile: GpuProfile, device: NvmlDevice) -> Device:
    base = device_from_profile(profile)
    slot = None if profile.link_gb_per_second is not None else _link(device)
    return base if slot is None else base.model_copy(update={"link_bytes_per_second": slot})


def _mig_device(device: NvmlDevice) -> Device:
    """The parent's peaks by share: throughput by SM count, bandwidth by memory (MIG User Guide, partitioning)."""
    profile = match_gpu(device.parent_name or "", device.parent_total_bytes or 0)
    if profile is None or profile.sm_count is None or device.sm_count is None or device.parent_total_bytes is None:
        raise HardwareError(
            f"{device.name}: a MIG instance of {device.parent_name}, whose profile or share is not known; "
            "name a whole GPU with --gpu, or calibrate this instance."
        )
    share, memory_share = device.sm_count / profile.sm_count.value, device.total_bytes / device.parent_total_bytes
    base = device_from_profile(profile)
    return base.model_copy(
        update={
            "name": device.name,
            "flops_per_second": {dtype: peak * share for dtype, peak in base.flops_per_second.items()},
            "bandwidth_bytes_per_second": base.bandwidth_bytes_per_second * memory_share,
            "link_bytes_per_second": _link(device) or base.link_bytes_per_second,
            "l2_bytes": None,
            "sm_count": device.sm_count,
            "basis": "assumed",
            "note": f"MIG instance: {share:.0%} of the SMs and {memory_share:.0%} of the memory of {profile.name}",
        }
    )


def _assumed_device(device: NvmlDevice) -> Device:
    capability = device.compute_capability
    rates = FLOP_PER_CLOCK_AND_SM.get(capability) if capability is not None else None
    bandwidth = _bandwidth_bytes_per_second(device)
    sm_count = _sm_count(device)
    if rates is None or bandwidth is None or sm_count is None or device.max_sm_clock_hz is None:
        raise HardwareError(
            f"{device.name} (compute capability {capability}) has no profile, and its driver does not tell enough to "
            "assume its speed. Name the nearest known card with --gpu (`planner profiles` lists them), or add it to "
            "profiles/gpus as profiles/README.md says."
        )
    return Device(
        name=device.name,
        kind="cuda",
        architecture=architecture_of(capability),
        compute_capability=capability,
        total_bytes=device.total_bytes,
        flops_per_second={dtype: sm_count * device.max_sm_clock_hz * rate for dtype, rate in rates.items()},
        bandwidth_bytes_per_second=bandwidth,
        link_bytes_per_second=_link(device),
        sm_count=sm_count,
        basis="assumed",
        note="no profile has this name: peaks assumed from NVML's core count, highest clocks and memory bus",
    )


def _sm_count(device: NvmlDevice) -> int | None:
    if device.sm_count is not None:
        return device.sm_count
    per_sm = CORES_PER_SM.get(device.compute_capability) if device.compute_capability is not None else None
    return None if per_sm is None or device.cuda_cores is None else device.cuda_cores // per_sm


def _bandwidth_bytes_per_second(device: NvmlDevice) -> float | None:
    """Two transfers per memory clock as NVML counts it: 10501 MHz x 2 x 384 bit = 1008 GB/s on an RTX 4090."""
    if device.max_memory_clock_hz is None or device.memory_bus_bits is None:
        return None
    return device.max_memory_clock_hz * 2 * device.memory_bus_bits / 8
