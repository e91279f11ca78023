"""NVML, and nothing else of the machine: the only module that touches ``pynvml``.

Answers are copied into frozen values; what a driver does not support is None. No NVML error leaves this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from planner.errors import HardwareError
from planner.types import Frozen
from planner.units import MIB

# nvml.h, enum nvmlReturn_t. Compared by number: older pynvml lacks some of the exception classes.
_INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 2, 3, 4, 6
_DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND, _FUNCTION_NOT_FOUND = 9, 12, 13
_VERSION_MISMATCH, _NO_DATA, _ARGUMENT_VERSION_MISMATCH, _DEPRECATED = 18, 21, 25, 26
_UNANSWERED = {_INVALID_ARGUMENT, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND, _FUNCTION_NOT_FOUND, _NO_DATA}
_UNANSWERED |= {_ARGUMENT_VERSION_MISMATCH, _DEPRECATED}
_INIT_REASONS = {
    _DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded (is there a GPU, and was its kernel module built?)",
    _LIBRARY_NOT_FOUND: "libnvidia-ml is not installed: this machine or container has no NVIDIA driver",
    _NO_PERMISSION: "no permission to talk to the NVIDIA driver (are the /dev/nvidia* files readable?)",
    _VERSION_MISMATCH: "the loaded driver and libnvidia-ml differ in version; reboot or reload the driver",
}
_CLOCK_SM, _CLOCK_MEM = 1, 2
_MEMORY_V2 = 0x2000028
"""``nvmlMemory_v2``: struct size 40 with version 2 in the top byte, as nvml.h builds it."""


class GpuProcess(Frozen):
    """A process with a context on the GPU; ``used_bytes`` is None where the driver does not tell (Windows, MIG)."""

    pid: int
    used_bytes: int | None = None


class NvmlDevice(Frozen):
    """What NVML says of one GPU, or of one MIG instance (``parent_*`` are then those of its GPU)."""

    nvml_index: int
    name: str
    uuid: str | None = None
    total_bytes: int
    free_bytes: int
    used_bytes: int
    driver_reserved_bytes: int | None = None
    compute_capability: tuple[int, int] | None = None
    cuda_cores: int | None = None
    sm_count: int | None = None
    """Known of MIG instances only; of whole GPUs NVML tells the cores."""
    max_sm_clock_hz: int | None = None
    max_memory_clock_hz: int | None = None
    memory_bus_bits: int | None = None
    pcie_generation: int | None = None
    pcie_lanes: int | None = None
    power_limit_watts: float | None = None
    processes: tuple[GpuProcess, ...] | None = None
    mig_enabled: bool = False
    mig: tuple[NvmlDevice, ...] = ()
    parent_name: str | None = None
    parent_total_bytes: int | None = None

    def others(self, own_pid: int | None = None) -> tuple[GpuProcess, ...]:
        """Processes on this GPU besides ``own_pid`` (default: this one)."""
        own_pid = os.getpid() if own_pid is None else own_pid
        return tuple(process for process in self.processes or () if process.pid != own_pid)


class NvmlReport(Frozen):
    """All GPUs NVML could read; ``problems`` names those it could not."""

    driver_version: str | None = None
    cuda_driver_version: str | None = None
    devices: tuple[NvmlDevice, ...] = ()
    problems: tuple[str, ...] = ()


def read_nvml(library: Any = None) -> NvmlReport:
    """Every GPU of this machine, whatever CUDA_VISIBLE_DEVICES says. ``library`` stands in for pynvml in tests.

    Raises:
        HardwareError: pynvml or the driver is absent or does not answer, and which of these it is.
    """
    library = library if library is not None else _import_pynvml()
    with _session(library):
        devices: list[NvmlDevice] = []
        problems: list[str] = []
        for index in range(_ask(library, "nvmlDeviceGetCount") or 0):
            try:
                devices.append(_read_device(library, index, library.nvmlDeviceGetHandleByIndex(index)))
            except (library.NVMLError, HardwareError) as error:
                problems.append(f"GPU {index} does not answer: {error}")
        return NvmlReport(
            driver_version=_text(_ask(library, "nvmlSystemGetDriverVersion")),
            cuda_driver_version=_cuda_version(_ask(library, "nvmlSystemGetCudaDriverVersion")),
            devices=tuple(devices),
            problems=tuple(problems),
        )


def _import_pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise HardwareError("NVML: the package nvidia-ml-py is not installed: pip install nvidia-ml-py") from error
    return pynvml


@contextmanager
def _session(library: Any) -> Iterator[None]:
    """NVML initialized, and shut down whatever happens; its errors become HardwareError."""
    try:
        library.nvmlInit()
    except (library.NVMLError, OSError) as error:
        reason = _INIT_REASONS.get(getattr(error, "value", -1), f"cannot be started: {error}")
        raise HardwareError(f"NVML: {reason}.") from error
    try:
        yield
    except library.NVMLError as error:
        raise HardwareError(f"NVML stopped answering: {error}. `nvidia-smi` should show why.") from error
    finally:
        with suppress(library.NVMLError):
            library.nvmlShutdown()


def _ask(library: Any, function: str, *arguments: Any) -> Any:
    """The answer, or None where this driver or this pynvml does not know the question."""
    try:
        return getattr(library, function)(*arguments)
    except AttributeError:
        return None
    except library.NVMLError as error:
        if getattr(error, "value", None) in _UNANSWERED:
            return None
        raise


def _read_device(library: Any, index: int, handle: Any) -> NvmlDevice:
    memory = _memory(library, handle)
    mig_enabled = bool((_ask(library, "nvmlDeviceGetMigMode", handle) or (0, 0))[0])
    name = _text(_ask(library, "nvmlDeviceGetName", handle)) or "unnamed NVIDIA GPU"
    return NvmlDevice(
        nvml_index=index,
        name=name,
        uuid=_text(_ask(library, "nvmlDeviceGetUUID", handle)),
        compute_capability=_ask(library, "nvmlDeviceGetCudaComputeCapability", handle),
        cuda_cores=_ask(library, "nvmlDeviceGetNumGpuCores", handle) or None,
        max_sm_clock_hz=_megahertz(_ask(library, "nvmlDeviceGetMaxClockInfo", handle, _CLOCK_SM)),
        max_memory_clock_hz=_megahertz(_ask(library, "nvmlDeviceGetMaxClockInfo", handle, _CLOCK_MEM)),
        memory_bus_bits=_ask(library, "nvmlDeviceGetMemoryBusWidth", handle) or None,
        pcie_generation=_ask(library, "nvmlDeviceGetMaxPcieLinkGeneration", handle) or None,
        pcie_lanes=_ask(library, "nvmlDeviceGetMaxPcieLinkWidth", handle) or None,
        power_limit_watts=_watts(_ask(library, "nvmlDeviceGetPowerManagementLimit", handle)),
        processes=_processes(library, handle),
        mig_enabled=mig_enabled,
        mig=_mig_instances(library, index, handle, name, memory["total_bytes"]) if mig_enabled else (),
        **memory,
    )


def _memory(library: Any, handle: Any) -> dict[str, Any]:
    """Version 2 tells the driver's own share apart; version 1 counts it as used."""
    info, reserved = _ask(library, "nvmlDeviceGetMemoryInfo", handle, _MEMORY_V2), None
    if info is not None:
        reserved = int(getattr(info, "reserved", 0))
    else:
        info = _ask(library, "nvmlDeviceGetMemoryInfo", handle)
    if info is None:
        raise HardwareError("its driver does not report memory")
    sizes = {f"{field}_bytes": int(getattr(info, field)) for field in ("total", "free", "used")}
    return {**sizes, "driver_reserved_bytes": reserved}


def _processes(library: Any, handle: Any) -> tuple[GpuProcess, ...] | None:
    """Compute and graphics processes, one entry per pid; None when the driver tells neither."""
    found: dict[int, int | None] = {}
    answered = False
    for function in ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses"):
        listed = _ask(library, function, handle)
        answered |= listed is not None
        for process in listed or ():
            used = getattr(process, "usedGpuMemory", None)
            found[int(process.pid)] = None if used is None else int(used)
    return tuple(GpuProcess(pid=pid, used_bytes=used) for pid, used in sorted(found.items())) if answered else None


def _mig_instances(library: Any, index: int, parent: Any, parent_name: str, parent_total_bytes: int) -> tuple[NvmlDevice, ...]:
    """The MIG devices that exist now; slots without one answer "not found"."""
    instances = []
    for slot in range(_ask(library, "nvmlDeviceGetMaxMigDeviceCount", parent) or 0):
        handle = _ask(library, "nvmlDeviceGetMigDeviceHandleByIndex", parent, slot)
        if handle is None:
            continue
        attributes = _ask(library, "nvmlDeviceGetAttributes", handle)
        instances.append(
            NvmlDevice(
                nvml_index=index,
                name=_text(_ask(library, "nvmlDeviceGetName", handle)) or f"{parent_name} MIG",
                uuid=_text(_ask(library, "nvmlDeviceGetUUID", handle)),
                compute_capability=_ask(library, "nvmlDeviceGetCudaComputeCapability", parent),
                sm_count=getattr(attributes, "multiprocessorCount", None),
                pcie_generation=_ask(library, "nvmlDeviceGetMaxPcieLinkGeneration", parent) or None,
                pcie_lanes=_ask(library, "nvmlDeviceGetMaxPcieLinkWidth", parent) or None,
                processes=_processes(library, handle),
                parent_name=parent_name,
                parent_total_bytes=parent_total_bytes,
                **_memory(library, handle),
            )
        )
    return tuple(instances)


def _text(value: str | bytes | None) -> str | None:
    """pynvml before 11.5 answers bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _megahertz(value: int | None) -> int | None:
    return value * 1_000_000 if value else None


def _watts(milliwatts: int | None) -> float | None:
    return milliwatts / 1000 if milliwatts else None


def _cuda_version(number: int | None) -> str | None:
    """12040 is CUDA 12.4 (nvml.h)."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def describe_processes(processes: tuple[GpuProcess, ...]) -> str | None:
    """``"2 other processes hold 3400 MiB"``; None when there are none."""
    if not processes:
        return None
    plural = "process holds" if len(processes) == 1 else "processes hold"
    known = [process.used_bytes for process in processes if process.used_bytes is not None]
    size = f"{sum(known) / MIB:.0f} MiB" if len(known) == len(processes) else "memory the driver does not itemize"
    return f"{len(processes)} other {plural} {size}"
